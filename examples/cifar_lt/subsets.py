"""What a run is trained and evaluated on."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.cifar_lt import noise, pack
from examples.cifar_lt.config import Config
from examples.cifar_lt.data import Split, load
from examples.cifar_lt.errors import UserError
from examples.cifar_lt.imbalance import class_counts, subset

HELD_OUT_PER_CLASS = 10
IDENTITY = (
    "dataset",
    "imbalance",
    "ratio",
    "n_max",
    "test_per_class",
    "validation",
    "symmetric_noise",
    "human_labels",
    "subset_seed",
)


class Splits(NamedTuple):
    """The images of a run."""

    train: Split  # imbalanced, with wrong labels where asked for
    held_out: Split  # a few of each class, with which META and L2RW learn their weights
    validation: Split  # balanced, to choose by; may be empty
    test: Split


def identity(config: Config) -> dict[str, Any]:
    """The settings on which the images depend."""
    return {name: value for name, value in config.identity().items() if name in IDENTITY}


def packed_file(config: Config, folder: Path) -> Path:
    """Where the images of a run lie in a folder of packs."""
    validation = f"-validation{config.validation:g}" if config.validation else ""
    return folder / f"{config.preset}-{config.column}{validation}.pack"


def prepare(config: Config) -> Splits:
    """The images of a run, from its pack where one is given, else from the archives."""
    if config.packed is not None:
        return Splits(**pack.read(packed_file(config, config.packed), identity(config)))
    train, test = load(config.dataset, config.data_dir)
    labels = train.labels
    if config.human_labels is not None:
        labels = noise.human(config.dataset, config.human_labels, config.data_dir, clean=train.labels)
    everyone = np.bincount(train.labels, minlength=config.classes)

    share = np.ceil(everyone * config.validation).astype(int)
    validation = subset(train.labels, share, config.subset_seed)
    rest = np.setdiff1d(np.arange(len(train.labels)), validation)
    n_max = config.n_max or int((everyone - share).min())
    counts = class_counts(config.imbalance, config.ratio, config.classes, n_max)
    chosen = rest[subset(train.labels[rest], counts, config.subset_seed)]

    given = labels[chosen]
    if config.symmetric_noise:
        given = noise.symmetric(given, config.symmetric_noise, config.classes, config.subset_seed)
    if config.test_per_class is not None:
        test = _take(test, subset(test.labels, np.full(config.classes, config.test_per_class), config.subset_seed))
    return Splits(
        train=Split(train.images[chosen], given),
        held_out=_take(train, _held_out(train.labels, rest, chosen, config)),
        validation=_take(train, validation),
        test=test,
    )


def _held_out(labels: np.ndarray, rest: np.ndarray, chosen: np.ndarray, config: Config) -> np.ndarray:
    """Images that are not trained on; of a class that has no others, ones that are."""
    spare, indices = np.setdiff1d(rest, chosen), []
    for c in range(config.classes):
        members = [np.flatnonzero(labels[of] == c) for of in (spare, chosen)]
        members = np.concatenate([spare[members[0]], chosen[members[1]]])
        if len(members) < HELD_OUT_PER_CLASS:
            raise UserError(f"class {c} has only {len(members)} images, META needs {HELD_OUT_PER_CLASS}.")
        indices.append(members[:HELD_OUT_PER_CLASS])
    return np.concatenate(indices)


def _take(split: Split, indices: np.ndarray) -> Split:
    return Split(split.images[indices], split.labels[indices])
