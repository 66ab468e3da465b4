"""Labels that are wrong at random."""

import numpy as np
import pytest

from examples.lab.errors import UserError
from examples.lab.noise import symmetric


@pytest.mark.parametrize(
    ("size", "rate", "changed"), [(10, 0, 0), (10, 0.4, 4), (7, 0.5, 4), (1000, 0.999, 999), (3, 0.1, 0)]
)
def test_symmetric_noise_replaces_exactly_the_share_by_other_classes(size, rate, changed):
    labels = (np.arange(size) % 3).astype(np.int32)
    noisy = symmetric(labels, rate, 3, seed=0)
    assert (noisy != labels).sum() == changed
    assert noisy.dtype == np.int32
    assert noisy.min() >= 0
    assert noisy.max() < 3
    np.testing.assert_array_equal(labels, np.arange(size) % 3)  # the input is left alone


def test_symmetric_noise_is_uniform_over_images_and_other_classes():
    labels = np.repeat(np.arange(5, dtype=np.int32), 8000)
    noisy = symmetric(labels, 0.5, 5, seed=0)
    table = np.zeros((5, 5), int)
    np.add.at(table, (labels, noisy), 1)
    assert np.diag(table) == pytest.approx(np.full(5, 4000), abs=5 * np.sqrt(8000 * 0.5 * 0.5))
    others = table[~np.eye(5, dtype=bool)]
    assert others == pytest.approx(np.full(20, 1000), abs=5 * np.sqrt(8000 * 0.125 * 0.875))


def test_symmetric_noise_follows_its_seed():
    labels = np.zeros(100, np.int32)
    first = symmetric(labels, 0.4, 10, seed=0)
    np.testing.assert_array_equal(first, symmetric(labels, 0.4, 10, seed=0))
    assert (first != symmetric(labels, 0.4, 10, seed=1)).any()
    # Not the images that the same seed would choose for a subset.
    assert set(np.flatnonzero(first)) != set(np.random.default_rng(0).permutation(100)[:40])


@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan"), float("inf")])
def test_impossible_rates_are_told(rate):
    with pytest.raises(UserError, match=f"noise rate {rate}: it must be at least 0 and less than 1"):
        symmetric(np.zeros(3, np.int32), rate, 10, seed=0)
