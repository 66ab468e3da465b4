"""Wrong labels for the training set: drawn at random, or given by people (CIFAR-10N and CIFAR-100N, Wei et al. 2022).

The human labels are those of http://noisylabels.com, under the licence CC BY-NC 4.0.
"""

import io
import zipfile
from pathlib import Path

import numpy as np

from examples.cifar_lt.data import ARCHIVES, TRAIN
from examples.lab import files, safe_pickle
from examples.lab.errors import UsageError, UserError
from examples.lab.noise import symmetric

# The official release; the commit is named because the checksums are of its files.
URL = "https://raw.githubusercontent.com/UCSC-REAL/cifar-10-100n/49df7d8a69e355470c77c1c2f2424916325a394b/data/"
RELEASES = {  # name of the file, its SHA-256, and its keys for the kinds of labels
    "cifar10": (
        "CIFAR-10_human.pt",
        "873e69c39cb9b5e97fb6bae2d60bb59b38a5cbc31d2b868f7903dcb2b9dd2310",
        {"aggre": "aggre_label", "worse": "worse_label"} | {f"random{i}": f"random_label{i}" for i in (1, 2, 3)},
    ),
    "cifar100": (
        "CIFAR-100_human.pt",
        "bd2d80409754d420292d622e15e25248ba21e37d27429efac49c8da723f44394",
        {"noisy": "noisy_label"},
    ),
}


# What CIFAR-10's classes are taken for (Patrini et al. 2017): truck for automobile, bird for airplane, deer for horse,
# and cat and dog for each other.
LOOKALIKE = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}


def wrong(kind: str, labels: np.ndarray, rate: float, classes: int, seed: int) -> np.ndarray:
    """Labels with symmetric (``sym``) or asymmetric (``asym``) noise.

    Asymmetric noise replaces each label of some classes with probability ``rate`` by that of a similar class: see
    ``LOOKALIKE`` for CIFAR-10; of more classes, each by the next.
    """
    if kind == "sym":
        return symmetric(labels, rate, classes, seed)
    following = np.array([LOOKALIKE.get(c, c) if classes == 10 else (c + 1) % classes for c in range(classes)])
    replaced = np.random.default_rng([seed, 1]).random(len(labels)) < rate
    return np.where(replaced, following[labels], labels).astype(labels.dtype)


def human(dataset: str, kind: str, data_dir: Path, clean: np.ndarray | None = None) -> np.ndarray:
    """The labels that people gave to the training images, in the order of the archives; downloaded where missing.

    Args:
      dataset: ``cifar10`` or ``cifar100``.
      kind: ``aggre``, ``worse``, ``random1``, ``random2`` or ``random3`` for CIFAR-10, ``noisy`` for CIFAR-100.
      data_dir: The folder that holds ``CIFAR-10_human.pt`` or ``CIFAR-100_human.pt``, or is to hold it.
      clean: The true labels, shape (50000,), to notice a file in another order.

    Returns:
      Labels, shape (50000,), dtype int32.

    Raises:
      UserError: if the file is not what it should be, or the download fails.
    """
    name, sha256, keys = RELEASES[dataset]
    classes = ARCHIVES[dataset][0].classes
    if kind not in keys:
        raise UsageError(f"human labels {kind!r}: {dataset} has {', '.join(keys)}.")
    path, remedy = data_dir / name, f"Delete it and start again to download {URL}{name}."
    if not path.is_file():
        files.download(URL + name, f"sha256:{sha256}", path, path)
    wanted = ("clean_label", keys[kind])
    true, given = _load(path, wanted, remedy)
    for key, labels in zip(wanted, (true, given), strict=True):
        if labels.shape != (TRAIN,) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= classes:
            raise UserError(f"{path} has no {TRAIN:,} classes from 0 to {classes - 1} as '{key}'. {remedy}")
    if clean is not None and (wrong := np.count_nonzero(true != clean)):
        raise UserError(
            f"{path} has other true labels than {dataset}, {wrong:,} of {TRAIN:,}: another order or dataset. {remedy}"
        )
    return given.astype(np.int32)


def _load(path: Path, keys: tuple[str, ...], remedy: str) -> list[np.ndarray]:
    # A .pt file is a zip archive; what is no tensor lies as a pickle in its data.pkl.
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith("/data.pkl")), "data.pkl")
            content = safe_pickle.load(io.BytesIO(archive.read(name)))  # read whole, or no checksum is compared
        return [np.asarray(content[key]) for key in keys]
    except Exception as error:  # a damaged zip archive or pickle can fail in any way
        raise UserError(f"{path} is not a .pt file of labels ({type(error).__name__}: {error}). {remedy}") from None
