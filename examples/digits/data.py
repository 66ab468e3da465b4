"""scikit-learn's digits (1,797 images of 8×8 pixels, inside its wheel): a fixed split and the two ways to spoil it."""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CLASSES = 10
PIXELS = 64


class Split(NamedTuple):
    images: np.ndarray  # shape=(n, 64), dtype=float32, in [0, 1]
    labels: np.ndarray  # shape=(n,), dtype=int32


class Sample(NamedTuple):
    """What one seed trains on."""

    images: np.ndarray  # shape=(n, 64)
    labels: np.ndarray  # shape=(n,)
    special: np.ndarray  # shape=(n,), dtype=bool: the examples to watch, rare or wrongly labelled


class Digits(NamedTuple):
    train: Split
    validation: Split
    test: Split


def load() -> Digits:
    """60 / 20 / 20 percent, stratified, the same for every seed; validation and test are balanced and clean."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    train, rest = train_test_split(np.arange(len(labels)), train_size=0.6, stratify=labels, random_state=0)
    validation, test = train_test_split(rest, train_size=0.5, stratify=labels[rest], random_state=0)
    return Digits(*(Split(images[rows], labels[rows]) for rows in (train, validation, test)))


def long_tail_counts(largest: int = 100, imbalance: float = 100) -> np.ndarray:
    """n_i = largest · imbalance^(-i / (C - 1)): class 0 is the most frequent, class 9 the rarest."""
    return np.rint(largest * imbalance ** (-np.arange(CLASSES) / (CLASSES - 1))).astype(int)


def long_tail(split: Split, seed: int) -> Sample:
    """A long-tailed part of a split; the five rarest classes are special."""
    rng = np.random.default_rng(seed)
    counts = long_tail_counts()
    rows = [rng.permutation(np.flatnonzero(split.labels == c))[:n] for c, n in enumerate(counts)]
    images, labels = (array[np.concatenate(rows)] for array in split)
    return Sample(images, labels, labels >= CLASSES // 2)


def wrong_labels(split: Split, seed: int, rate: float = 0.4) -> Sample:
    """Exactly a fraction ``rate`` of the labels, replaced by one of the nine others; those are special."""
    rng = np.random.default_rng(seed)
    wrong = rng.permutation(len(split.labels)) < round(rate * len(split.labels))
    shift = rng.integers(1, CLASSES, len(split.labels), dtype=np.int32)
    return Sample(split.images, np.where(wrong, (split.labels + shift) % CLASSES, split.labels), wrong)
