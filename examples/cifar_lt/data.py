"""CIFAR-10 and CIFAR-100 from the official archives, binary or Python, downloaded where missing."""

import pickle
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pooch

from examples.lab import files, safe_pickle
from examples.lab.errors import UserError
from examples.lab.task import Split

IMAGE_BYTES = 3 * 32 * 32
TRAIN, TEST = 50_000, 10_000  # images


class Archive(NamedTuple):
    """One of the four official archives: https://www.cs.toronto.edu/~kriz/cifar.html."""

    name: str
    md5: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    classes: int
    label_bytes: int = 0  # of a binary record, the class being the last; 0 for a Python archive
    label_key: str = ""  # of a Python archive

    @property
    def url(self) -> str:
        return f"https://www.cs.toronto.edu/~kriz/{self.name}"


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_BINARY_BATCHES = tuple(f"{name}.bin" for name in _BATCHES)

ARCHIVES = {
    "cifar10": (
        Archive(
            name="cifar-10-binary.tar.gz",
            md5="c32a1d4ab5d03f1284b67883e8d87530",
            folder="cifar-10-batches-bin",
            train=_BINARY_BATCHES,
            test=("test_batch.bin",),
            classes=10,
            label_bytes=1,
        ),
        Archive(
            name="cifar-10-python.tar.gz",
            md5="c58f30108f718f92721af3b95e74349a",
            folder="cifar-10-batches-py",
            train=_BATCHES,
            test=("test_batch",),
            classes=10,
            label_key="labels",
        ),
    ),
    "cifar100": (
        Archive(
            name="cifar-100-binary.tar.gz",
            md5="03b5dce01913d631647c71ecec9e9cb8",
            folder="cifar-100-binary",
            train=("train.bin",),
            test=("test.bin",),
            classes=100,
            label_bytes=2,
        ),
        Archive(
            name="cifar-100-python.tar.gz",
            md5="eb9058c3a382ffc7106e4002c42a8d85",
            folder="cifar-100-python",
            train=("train",),
            test=("test",),
            classes=100,
            label_key="fine_labels",
        ),
    ),
}


def load(dataset: str, data_dir: Path) -> tuple[Split, Split]:
    """The training and the test split, images of shape (N, 32, 32, 3) and dtype uint8.

    The binary archive is downloaded where neither of the two is in ``data_dir``.

    Raises:
      UserError: if a file is missing, truncated or not what it should be, or the download fails.
    """
    archives = ARCHIVES[dataset]
    archive = next((a for a in archives if (data_dir / a.folder).is_dir()), None)
    if archive is None:
        archive = archives[0]
        unpack = pooch.Untar(extract_dir=".")
        files.download(archive.url, f"md5:{archive.md5}", data_dir / archive.name, data_dir / archive.folder, unpack)
    splits = []
    for names, total in ((archive.train, TRAIN), (archive.test, TEST)):
        parts = [read(data_dir / archive.folder / name, archive, total // len(names)) for name in names]
        splits.append(Split(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True))))
    return splits[0], splits[1]


def read(path: Path, archive: Archive, size: int) -> Split:
    """Reads one file of an archive, which has to hold ``size`` images."""
    remedy = f"Delete {path.parent} and start again to download {archive.url}, or unpack that archive again."
    if not path.is_file():
        raise UserError(f"{path} is missing: {archive.name} holds a file of this name. {remedy}")
    split = (
        _read_binary(path, archive, size, remedy) if archive.label_bytes else _read_python(path, archive, size, remedy)
    )
    if split.labels.min() < 0 or split.labels.max() >= archive.classes:
        raise UserError(f"{path} has classes outside 0 to {archive.classes - 1}: it is damaged. {remedy}")
    return split


def _read_binary(path: Path, archive: Archive, size: int, remedy: str) -> Split:
    record = archive.label_bytes + IMAGE_BYTES
    found, expected = path.stat().st_size, size * record
    if found != expected:
        raise UserError(
            f"{path} has {found:,} bytes, expected {expected:,} ({size:,} records of {record:,} bytes): it is "
            f"truncated or another file. {remedy}"
        )
    records = np.fromfile(path, np.uint8).reshape(size, record)
    return Split(_to_nhwc(records[:, archive.label_bytes :]), records[:, archive.label_bytes - 1].astype(np.int32))


def _read_python(path: Path, archive: Archive, size: int, remedy: str) -> Split:
    try:
        with path.open("rb") as file:
            content = safe_pickle.load(file)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is not a pickle of images and classes ({error}). {remedy}") from None
    content = content if isinstance(content, dict) else {}
    images, labels = content.get("data"), content.get(archive.label_key)
    shape = (size, IMAGE_BYTES)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != shape:
        raise UserError(f"{path} has no array 'data' of shape {shape} and type uint8, as expected. {remedy}")
    if not isinstance(labels, list) or len(labels) != size or not all(type(label) is int for label in labels):
        raise UserError(f"{path} has no list '{archive.label_key}' of {size:,} classes, as expected. {remedy}")
    return Split(_to_nhwc(images), np.array(labels, np.int32))


def _to_nhwc(rows: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
