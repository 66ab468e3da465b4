"""Imbalanced subsets: how many images of each class, and which."""

import numpy as np

from examples.lab.errors import UsageError


def class_counts(imbalance: str, ratio: float, classes: int, n_max: int) -> np.ndarray:
    r"""The number of training images of each class.

    .. math::
        n_i = n_{\max}\, \rho^{-i/(C-1)} \quad\text{(lt)}, \qquad
        n_i = n_{\max} \text{ or } n_{\max}/\rho \quad\text{(st: first and second half of the classes)}

    The integer part is taken, as in the code of LDAM.

    Args:
      imbalance: ``lt`` (long-tailed) or ``st`` (step).
      ratio: ρ ≥ 1, the largest class over the smallest.
      classes: C.
      n_max: images of the largest class.

    Returns:
      Counts, shape (C,), in the order of the classes.

    Raises:
      UserError: if ``ratio`` is less than 1 or leaves a class empty.
    """
    if not 1 <= ratio < float("inf"):
        raise UsageError(f"An imbalance ratio of {ratio}: it must be at least 1, the largest class over the smallest.")
    place = np.arange(classes)
    exponents = place / (classes - 1) if imbalance == "lt" else np.where(place < classes // 2, 0.0, 1.0)
    # The same expression as in the published code, so that the integer parts are the same.
    counts = np.array([int(n_max * (1 / ratio) ** exponent) for exponent in exponents])
    if counts.min() < 1:
        raise UsageError(
            f"An imbalance ratio of {ratio} leaves no image of the rarest class: the most frequent has only {n_max}."
        )
    return counts


def subset(labels: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Indices of a random subset with ``counts[c]`` images of each class c; a smaller one is contained in a larger."""
    rng = np.random.default_rng(seed)
    chosen = []
    for c, count in enumerate(counts):
        members = np.flatnonzero(labels == c)
        if count > len(members):
            raise UsageError(f"{count} images of class {c} are asked for, but there are only {len(members)}.")
        chosen.append(rng.permutation(members)[:count])
    return np.sort(np.concatenate(chosen))
