"""The training set of a run, and what it is evaluated on."""

import numpy as np

from examples.cifar_lt.config import Config
from examples.cifar_lt.data import Split, load
from examples.cifar_lt.imbalance import class_counts, subset


def training_and_held_out(config: Config) -> tuple[Split, Split, np.ndarray]:
    """The imbalanced training set, the split to evaluate on, and the class counts of the former.

    With a validation fraction that is held out of the training data and the test split is not touched.
    """
    train, test = load(config.dataset, config.data_dir)
    if config.validation:
        share = np.bincount(train.labels, minlength=config.classes) * config.validation
        chosen = subset(train.labels, np.maximum(share.astype(int), 1), config.subset_seed)
        rest = np.setdiff1d(np.arange(len(train.labels)), chosen)
        train, held_out = _take(train, rest), _take(train, chosen)
    else:
        held_out = test
        if config.test_per_class is not None:
            counts = np.full(config.classes, config.test_per_class)
            held_out = _take(test, subset(test.labels, counts, config.subset_seed))
    available = np.bincount(train.labels, minlength=config.classes).min()
    counts = class_counts(config.imbalance, config.ratio, config.classes, config.n_max or int(available))
    return _take(train, subset(train.labels, counts, config.subset_seed)), held_out, counts


def _take(split: Split, indices: np.ndarray) -> Split:
    return Split(split.images[indices], split.labels[indices])
