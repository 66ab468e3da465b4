"""Labels that are wrong at random."""

import numpy as np

from examples.lab.errors import UsageError


def symmetric(labels: np.ndarray, rate: float, classes: int, seed: int) -> np.ndarray:
    """Labels of which exactly ``round(rate * N)`` are replaced, each by any of the other classes.

    Args:
      labels: Classes, shape (N,).
      rate: The share to replace, at least 0 and less than 1.
      classes: C, at least 2.
      seed: Seed of the choice.

    Returns:
      New labels, shape (N,).

    Raises:
      UsageError: if ``rate`` is out of range.
    """
    if not 0 <= rate < 1:
        raise UsageError(f"noise rate {rate}: it must be at least 0 and less than 1, the share of labels to replace.")
    # The bare seed is that of subsets and splits, and which labels are wrong should not depend on them.
    rng = np.random.default_rng([seed, 1])
    replaced = rng.permutation(len(labels))[: round(rate * len(labels))]
    noisy = labels.copy()
    noisy[replaced] = (labels[replaced] + rng.integers(1, classes, len(replaced))) % classes
    return noisy
