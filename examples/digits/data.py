"""scikit-learn's handwritten digits: a long-tailed stream, a long tail, wrong labels."""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CLASSES = 10
SPLIT = 1  # the settings themselves were chosen on split 0


class Split(NamedTuple):
    """Images as vectors, and their classes."""

    x: np.ndarray  # shape=(N, 64), dtype=float32, in [0, 1]
    y: np.ndarray  # shape=(N,), dtype=int


def load() -> tuple[Split, Split, Split]:
    """Training, validation and test split: 1077, 360 and 360 images, stratified, the same in every run."""
    x, y = map(np.asarray, load_digits(return_X_y=True))
    x = (x / 16).astype(np.float32)
    train, rest = train_test_split(np.arange(len(y)), test_size=720, stratify=y, random_state=SPLIT)
    validation, test = train_test_split(rest, test_size=360, stratify=y[rest], random_state=SPLIT)
    train, validation, test = (Split(x[i], y[i]) for i in (train, validation, test))
    return train, validation, test


def stream(split: Split, rng: np.random.Generator, *, size: int = 12_800, ratio: float = 100.0) -> Split:
    """``size`` examples drawn one after another, with replacement, class i with probability ∝ ρ^(-i/(C-1))."""
    likelihood = ratio ** (-split.y / (CLASSES - 1)) / np.bincount(split.y)[split.y]
    drawn = rng.choice(len(split.y), size, p=likelihood / likelihood.sum())
    return Split(split.x[drawn], split.y[drawn])


def long_tail(split: Split, rng: np.random.Generator, *, ratio: float = 10.0) -> Split:
    """All examples of class 0, fewer of each following class, 1/``ratio`` of them of the last."""
    numbers = np.bincount(split.y).min() * ratio ** (-np.arange(CLASSES) / (CLASSES - 1))
    members = [rng.permutation(np.flatnonzero(split.y == c))[: round(n)] for c, n in enumerate(numbers)]
    kept = np.concatenate(members)
    return Split(split.x[kept], split.y[kept])


def wrong_labels(split: Split, rng: np.random.Generator, *, rate: float) -> Split:
    """The same images, a fraction ``rate`` of which has the label of another class."""
    y = split.y.copy()
    wrong = rng.permutation(len(y))[: round(rate * len(y))]
    y[wrong] = (y[wrong] + rng.integers(1, CLASSES, len(wrong))) % CLASSES
    return Split(split.x, y)
