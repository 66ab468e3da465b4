"""What must hold for every batch: Hypothesis looks for the one for which it does not."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays

from absgd_jax import entropic_risk, merge_risks

EPS = np.finfo(np.float32).eps
SIZE = 8  # one shape, so that nothing is compiled twice
losses = arrays(np.float32, SIZE, elements=st.floats(-100, 100, width=32))
temperatures = st.builds(
    lambda size, sign: np.float32(sign * size), st.floats(1e-3, 1e4), st.sampled_from([1, -1])
) | st.sampled_from([np.float32("inf"), np.float32("-inf"), np.float32(0)])
risk = jax.jit(entropic_risk)
gradients = jax.jit(jax.grad(entropic_risk, (0, 1)))
merge = jax.jit(lambda risks, lam, weights: merge_risks(risks, lam, weights=weights))
masked_risk = jax.jit(lambda x, lam, where: entropic_risk(x, lam, where=where))
weighted_risk = jax.jit(lambda x, lam, weights: entropic_risk(x, lam, weights=weights))

settings.register_profile("fast", max_examples=100, deadline=None, derandomize=True)
settings.load_profile("fast")


def assert_close(actual, desired, batch, slack=16):
    """To rounding of the largest number that went in."""
    np.testing.assert_allclose(actual, desired, rtol=0, atol=slack * EPS * (np.abs(batch).max() + 1e-30))


@given(losses, temperatures, st.floats(-100, 100, width=32))
def test_shifting_every_loss_shifts_the_risk(batch, temperature, shift):
    shifted = batch + np.float32(shift)
    exact_shift = np.float64(shifted) - batch  # rounding may merge or split losses; let the truth have them too
    with jax.enable_x64(True):
        expected = entropic_risk(np.float64(batch) + exact_shift, np.float64(temperature))
        shift_of_risk = expected - entropic_risk(np.float64(batch), np.float64(temperature))
    assert_close(risk(shifted, temperature), risk(batch, temperature) + np.float32(shift_of_risk), [*batch, shift])
    assert abs(float(shift_of_risk) - shift) <= 2 * EPS * max(abs(shift), np.abs(batch).max())


@given(losses, temperatures, st.floats(1e-3, 1e3))
def test_scaling_losses_and_temperature_scales_the_risk(batch, temperature, scale):
    scale = np.float32(2.0 ** np.round(np.log2(scale)))  # exact in floating point
    assert_close(risk(scale * batch, scale * temperature), scale * risk(batch, temperature), scale * batch)


@given(losses, temperatures, st.permutations(range(SIZE)))
def test_order_does_not_matter(batch, temperature, order):
    assert_close(risk(batch[order], temperature), risk(batch, temperature), batch)


@given(losses, temperatures, st.integers(0, SIZE - 1), st.floats(0, 50, width=32))
def test_monotone_in_each_loss(batch, temperature, index, increase):
    larger = batch.copy()
    larger[index] += np.float32(increase)
    slack = 16 * EPS * np.abs(larger).max()
    assert risk(larger, temperature) >= risk(batch, temperature) - slack


@given(losses, st.lists(temperatures, min_size=2, max_size=2))
def test_non_increasing_in_the_temperature_from_max_through_mean_to_min(batch, pair):
    # λ runs from 0⁺ (max) over +∞ = -∞ (mean) to 0⁻ (min): 1/λ falls.
    first, second = sorted(pair, key=lambda lam: -np.inf if lam == 0 else -1 / np.float64(lam))
    assert risk(batch, first) >= risk(batch, second) - 16 * EPS * np.abs(batch).max()


@given(losses, temperatures)
def test_between_the_smallest_and_the_largest_loss(batch, temperature):
    slack = 4 * EPS * np.abs(batch).max()
    assert batch.min() - slack <= risk(batch, temperature) <= batch.max() + slack


@given(losses, temperatures)
def test_the_gradient_is_a_distribution(batch, temperature):
    shares, _ = gradients(batch, temperature)
    assert np.all(shares >= 0)
    assert float(shares.sum()) == pytest.approx(1, abs=float(SIZE * EPS))


@given(losses, temperatures)
def test_the_divergence_is_between_zero_and_log_batch_size(batch, temperature):
    kl = -gradients(batch, temperature)[1]
    assert -16 * EPS <= kl <= np.log(SIZE) + 16 * EPS


@given(losses, temperatures, arrays(bool, SIZE))
def test_masked_is_weight_zero(batch, temperature, where):
    masked = masked_risk(batch, temperature, where)
    assert masked == weighted_risk(batch, temperature, where.astype(np.float32))
    removed = batch.copy()
    removed[~where] = np.nan
    assert masked == masked_risk(removed, temperature, where)
    if where.any():
        assert_close(masked, entropic_risk(batch[where], temperature), batch)


@given(losses, temperatures, arrays(np.float32, SIZE, elements=st.sampled_from([0.0, 0.5, 1.0, 3.0])))
def test_merging_is_associative_and_equals_the_whole(batch, temperature, weights):
    def part(first, last):
        piece = (np.arange(SIZE) >= first) & (np.arange(SIZE) < last)
        return weighted_risk(batch, temperature, weights * piece), (weights * piece).sum()

    def merged(*parts):
        risks, totals = np.float32(parts).T
        return merge(risks, temperature, totals)[0], totals.sum()

    a, b, c = part(0, 1), part(1, 4), part(4, SIZE)
    whole = weighted_risk(batch, temperature, weights)
    for grouping in (merged(merged(a, b), c), merged(a, merged(b, c)), merged(c, a, b)):
        assert_close(grouping[0], whole, batch)
