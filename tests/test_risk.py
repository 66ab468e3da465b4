"""The entropic risk, its derivatives and its merge against 60-digit arithmetic, and where exp overflows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from absgd_jax import attention_weights, effective_sample_size, entropic_risk, merge_risks
from tests import reference

INF = float("inf")
EPS = np.finfo(np.float32).eps
rng = np.random.default_rng(0)
BATCHES = {
    "exponential": rng.exponential(size=128),
    "huge": 1e30 * rng.exponential(size=128),
    "tiny": 1e-30 * rng.exponential(size=128),
    "one outlier": np.append(rng.exponential(size=127), 1e6),
    "negative outlier": np.append(rng.exponential(size=127), -1e6),
    "all equal": np.full(128, 2.3),
    "all zero": np.zeros(128),
    "one example": np.array([1.7]),
    "many": 1 + rng.normal(size=1000),
}
TEMPERATURES = [s * lam for lam in (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 1e3, 1e5, 1e8, INF) for s in (1, -1)]


@jax.jit
def risk_and_gradients(losses, temperature):
    return entropic_risk(losses, temperature), *jax.grad(entropic_risk, (0, 1))(losses, temperature)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_risk_and_gradients_against_sixty_digits(batch, temperature):
    losses = np.float32(BATCHES[batch])
    risk, shares, slope = risk_and_gradients(losses, np.float32(temperature))
    true_risk, true_shares, true_kl = reference.entropic_risk(losses, np.float32(temperature))
    np.testing.assert_allclose(risk, float(true_risk), rtol=3e-6)
    # A share exp(-x) is known to eps x; below 1e-35 it underflows.
    np.testing.assert_allclose(shares, np.array(true_shares, float), rtol=100 * EPS, atol=1e-35)
    np.testing.assert_allclose(-slope, float(true_kl), rtol=1e-5, atol=20 * EPS)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_float64_stays_float64(batch, temperature):
    with jax.enable_x64(True):
        risk, shares, _ = risk_and_gradients(BATCHES[batch], np.float64(temperature))
        assert risk.dtype == shares.dtype == np.float64
    true_risk, _, _ = reference.entropic_risk(BATCHES[batch], temperature)
    np.testing.assert_allclose(risk, float(true_risk), rtol=1e-14)


@pytest.mark.parametrize("temperature", [INF, -INF, 0, 0.0, 1e-3, -1e-3, 2.0])
def test_python_numbers_and_traced_values_agree(temperature):
    losses = jnp.float32(BATCHES["exponential"])
    traced = jax.jit(entropic_risk)(losses, jnp.float32(temperature))
    np.testing.assert_allclose(entropic_risk(losses, temperature), traced, rtol=1e-6)


def test_limits_are_the_mean_and_the_maximum():
    losses = jnp.array([1.0, 5.0, 3.0, 5.0])
    assert entropic_risk(losses, INF) == entropic_risk(losses, -INF) == 3.5
    assert entropic_risk(losses, 0) == 5
    np.testing.assert_array_equal(jax.grad(entropic_risk)(losses, INF), 0.25)
    np.testing.assert_array_equal(jax.grad(entropic_risk)(losses, 0.0), [0, 0.5, 0, 0.5])


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_reduced_in_float32(dtype):
    losses = jnp.asarray(BATCHES["exponential"], dtype)
    risk = entropic_risk(losses, 0.5)
    assert risk.dtype == jnp.float32
    np.testing.assert_allclose(risk, float(reference.entropic_risk(losses, 0.5)[0]), rtol=3e-6)
    assert jax.grad(entropic_risk)(losses, 0.5).dtype == dtype
    assert attention_weights(losses, 1.0, 0.5).dtype == jnp.float32


def test_integer_losses():
    np.testing.assert_allclose(entropic_risk(jnp.arange(4), 1.0), float(reference.entropic_risk(range(4), 1.0)[0]))


def test_weights_are_normalised_and_differentiable():
    losses, weights = np.float32(rng.exponential(size=9)), np.float32(rng.exponential(size=9))
    risk, grads = jax.value_and_grad(lambda w: entropic_risk(losses, 0.7, weights=w))(weights)
    np.testing.assert_allclose(risk, float(reference.entropic_risk(losses, 0.7, weights)[0]), rtol=1e-6)
    z = weights.astype(float) @ np.exp(losses / 0.7)
    np.testing.assert_allclose(grads, 0.7 * (np.exp(losses / 0.7) / z - 1 / weights.sum()), rtol=1e-4, atol=1e-7)
    mean_grads = jax.grad(lambda w: entropic_risk(losses, INF, weights=w))(weights)
    mean = np.average(losses, weights=weights)
    np.testing.assert_allclose(mean_grads, (losses - mean) / weights.sum(), rtol=1e-5, atol=1e-7)


def masked_risk(losses, temperature, where):
    return entropic_risk(losses, temperature, where=where)


masked_grads = jax.jit(jax.grad(masked_risk))
masked_hessian = jax.jit(jax.hessian(masked_risk))


@pytest.mark.parametrize("temperature", [0.5, -0.5, 20.0, INF])
@pytest.mark.parametrize("garbage", [0.0, np.nan, INF, -INF, 1e38])
def test_masked_is_removed_whatever_the_loss(temperature, garbage):
    kept = jnp.float32(rng.exponential(size=5))
    padded = jnp.concatenate([kept[:2], jnp.full(2, garbage), kept[2:]])
    where = jnp.array([1, 1, 0, 0, 1, 1, 1], bool)
    np.testing.assert_allclose(masked_risk(padded, temperature, where), entropic_risk(kept, temperature), rtol=1e-6)
    grads = masked_grads(padded, temperature, where)
    np.testing.assert_allclose(grads[where], jax.grad(entropic_risk)(kept, temperature), rtol=1e-6)
    np.testing.assert_array_equal(grads[~where], 0)
    _, tangent = jax.jvp(lambda x: masked_risk(x, temperature, where), [padded], [jnp.where(where, 1.0, jnp.nan)])
    np.testing.assert_allclose(tangent, 1, rtol=1e-6)
    assert np.all(np.isfinite(masked_hessian(padded, temperature, where)))


@pytest.mark.parametrize("temperature", [1.0, -1.0, INF, 0.0])
def test_nothing_left_is_minus_zero_with_gradient_zero(temperature):
    losses = jnp.array([1.0, jnp.nan])

    def risk(losses, temperature):
        return entropic_risk(losses, temperature, where=jnp.zeros(2, bool))

    value, grads = jax.jit(jax.value_and_grad(risk, (0, 1)))(losses, temperature)
    assert value == 0
    assert np.signbit(value)
    np.testing.assert_array_equal(grads[0], 0)
    assert grads[1] == 0


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_risk_of_zero_has_the_sign_of_something_seen(zero):
    assert not np.signbit(jax.jit(entropic_risk)(jnp.full(3, zero), -1.0))
    assert not np.signbit(entropic_risk(jnp.full(3, zero), INF))


def test_infinite_and_nan_losses():
    assert entropic_risk(jnp.array([1.0, INF]), 1.0) == INF
    assert entropic_risk(jnp.array([1.0, -INF]), -1.0) == -INF
    assert entropic_risk(jnp.array([1.0, INF]), INF) == entropic_risk(jnp.array([1.0, INF]), -INF) == INF
    np.testing.assert_allclose(entropic_risk(jnp.array([1.0, INF]), -1.0), 1 + np.log(2), rtol=1e-6)
    np.testing.assert_allclose(entropic_risk(jnp.array([1.0, -INF]), 1.0), 1 - np.log(2), rtol=1e-6)
    assert np.isnan(entropic_risk(jnp.array([1.0, jnp.nan]), 1.0))


@pytest.mark.parametrize(("loss", "temperature"), [(1e30, 1.0), (508263.8, -1e-4), (5.6214164e9, 1.0)])
@pytest.mark.parametrize("size", [1, 3, 6, 7, 100])
def test_the_risk_of_equal_losses_is_the_loss_however_large(loss, temperature, size):
    losses, weights = jnp.full(size, loss, jnp.float32), jnp.float32(rng.uniform(1e-5, 1, size))
    for risk in (entropic_risk, jax.jit(entropic_risk)):
        np.testing.assert_allclose(risk(losses, temperature), losses[0], rtol=1e-6)
        np.testing.assert_allclose(risk(losses, temperature, weights=weights), losses[0], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(entropic_risk)(losses, temperature), 1 / size, rtol=1e-5)


def test_axis_reduces_some_axes_only():
    losses = jnp.float32(rng.exponential(size=(3, 4, 5)))
    where = losses > 0.2
    for axis, shape in ((0, (4, 5)), (-1, (3, 4)), ((0, 2), (4,)), (None, ())):
        assert jax.eval_shape(lambda axis=axis: entropic_risk(losses, 0.7, where=where, axis=axis)).shape == shape
    rows = [float(reference.entropic_risk(x[m], 0.7)[0]) for x, m in zip(losses[0], where[0], strict=True)]
    np.testing.assert_allclose(entropic_risk(losses, 0.7, where=where, axis=-1)[0], rows, rtol=1e-6)
    grads = jax.grad(lambda x: entropic_risk(x, 0.7, axis=-1).sum())(losses)
    np.testing.assert_allclose(grads.sum(-1), 1, rtol=1e-6)


def test_forward_reverse_and_second_derivatives_are_those_of_the_formula():
    losses = np.float32(rng.exponential(size=6))
    lam = 0.7
    p = np.exp(losses.astype(float) / lam)
    p /= p.sum()
    mean = p @ losses
    hessian = (np.diag(p) - np.outer(p, p)) / lam
    mixed = -p * (losses - mean) / lam**2
    curvature = p @ (losses - mean) ** 2 / lam**3

    close = lambda actual, desired: np.testing.assert_allclose(actual, desired, rtol=1e-4, atol=1e-6)  # noqa: E731
    close(jax.jacfwd(entropic_risk)(losses, lam), p)
    close(jax.jacrev(entropic_risk)(losses, lam), p)
    for outer in (jax.jacfwd, jax.jacrev):
        for inner in (jax.jacfwd, jax.jacrev):
            second = jax.jit(outer(inner(entropic_risk, (0, 1)), (0, 1)))(losses, lam)
            for actual, desired in zip(jax.tree.leaves(second), (hessian, mixed, mixed, curvature), strict=True):
                close(actual, desired)
    np.testing.assert_array_equal(jax.hessian(entropic_risk)(losses, INF), 0)


def test_vmap_over_batches_and_temperatures():
    losses, lams = jnp.float32(rng.exponential(size=(3, 6))), jnp.array([0.5, -2.0, INF])
    together = jax.vmap(jax.grad(entropic_risk))(losses, lams)
    alone = [jax.grad(entropic_risk)(x, lam) for x, lam in zip(losses, lams, strict=True)]
    np.testing.assert_allclose(together, jnp.stack(alone), rtol=1e-6)


@pytest.mark.parametrize("temperature", [1e-3, 0.5, -0.5, 1e6, INF])
def test_merging_unequal_parts_is_the_whole(temperature):
    losses = jnp.float32(rng.exponential(size=12))
    parts = [losses[:1], losses[1:6], losses[6:6], losses[6:]]
    risks = jnp.stack([entropic_risk(x, temperature) for x in parts[:2] + parts[3:]])
    risk, shares = merge_risks(risks, temperature, weights=jnp.array([1, 5, 6]))
    np.testing.assert_allclose(risk, entropic_risk(losses, temperature), rtol=1e-6)
    whole = jax.grad(entropic_risk)(losses, temperature)
    # Risks in units of loss are rounded by ε·L, which moves exp(L/λ) by ε·L/λ.
    rtol = max(1e-5, 4 * np.finfo(np.float32).eps * float(losses.max()) / abs(temperature))
    np.testing.assert_allclose(shares, [whole[:1].sum(), whole[1:6].sum(), whole[6:].sum()], rtol=rtol, atol=1e-30)
    with_empty, shares = merge_risks(jnp.append(risks, jnp.nan), temperature, weights=jnp.array([1, 5, 6, 0]))
    assert with_empty == risk
    assert shares[3] == 0


def test_attention_weights_and_effective_sample_size():
    losses = jnp.array([0.0, 1.0, 3.0])
    np.testing.assert_allclose(attention_weights(losses, 1.0, -2.0), np.exp([0.5, 0, -1]), rtol=1e-6)
    np.testing.assert_array_equal(attention_weights(losses, 1.0, INF), 1)
    assert effective_sample_size(jnp.array([3e-30, 3e-30, 0, 0])) == 2
    assert effective_sample_size(jnp.array([2e30, 2e30, 2e30])) == 3
    assert effective_sample_size(jnp.zeros(3)) == 0
    assert effective_sample_size(jnp.array([3.4e38, 3.4e38, 1.0])) == 2
    overflowing = attention_weights(jnp.array([0.0, 1e4, 2e4]), 0.0, 1.0)
    assert np.isfinite(overflowing).all()
    assert effective_sample_size(overflowing) == 2
    np.testing.assert_array_equal(effective_sample_size(jnp.eye(3), axis=1), 1)


@pytest.mark.parametrize("function", [entropic_risk, merge_risks, lambda x, t: attention_weights(x, 1.0, t)])
def test_nan_temperature_is_refused(function):
    with pytest.raises(ValueError, match="temperature=nan"):
        function(jnp.ones(3), float("nan"))


def test_a_temperature_for_each_example_is_refused():
    with pytest.raises(ValueError, match=r"temperature has shape \(3,\).*vmap"):
        entropic_risk(jnp.ones(3), jnp.ones(3))


@pytest.mark.parametrize(("temperature", "plain"), [(INF, jnp.mean), (-INF, jnp.mean), (0.0, jnp.max)])
def test_a_risk_taken_beside_its_gradient_is_still_differentiable(temperature, plain):
    """As in a gradient penalty: the risk is then a result of the derivative's own rule."""
    start = jnp.float32([0.3, 1.0, -0.7])

    def penalised(risk):
        def objective(x):
            value, grads = jax.value_and_grad(risk)(x)
            return value + 0.1 * jnp.sum(grads**2)

        return objective

    ours = jax.grad(penalised(lambda x: entropic_risk(x**2, temperature)))(start)
    np.testing.assert_allclose(ours, jax.grad(penalised(lambda x: plain(x**2)))(start), rtol=1e-6)
    merged = jax.grad(lambda x: merge_risks(x**2, temperature)[0])(start)
    np.testing.assert_allclose(merged, jax.grad(lambda x: plain(x**2))(start), rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.8, -0.8, INF])
def test_beside_its_gradient_a_risk_has_the_slopes_that_it_has_alone(temperature):
    """A loss beyond the threshold keeps its whole slope, a weight of 0 and the threshold have none."""
    losses, weights = np.array([0.3, 1.0, 4.0, -3.0, 2.0]), np.array([1.0, 2.0, 3.0, 1.0, 0.0])
    clipped = {0.8: np.minimum(losses, 2.5), -0.8: np.maximum(losses, 0.5), INF: losses}[temperature]
    threshold = {0.8: 2.5, -0.8: 0.5, INF: None}[temperature]
    tilted = weights * np.exp(clipped / temperature)
    shares = tilted / tilted.sum()
    risk = np.sum(shares * losses) if temperature == INF else temperature * np.log(tilted.sum() / weights.sum())
    of_weights = (losses - risk) if temperature == INF else temperature * np.expm1((clipped - risk) / temperature)

    def beside(losses, weights, threshold):
        return jax.value_and_grad(lambda x: entropic_risk(x, temperature, weights=weights, threshold=threshold))(losses)

    which = (0, 1) if threshold is None else (0, 1, 2)
    slopes = jax.jit(jax.grad(lambda *args: beside(*args)[0], which))
    found = slopes(jnp.float32(losses), jnp.float32(weights), threshold)
    np.testing.assert_allclose(found[0], shares, rtol=1e-5)
    np.testing.assert_allclose(found[1], np.where(weights > 0, of_weights, 0) / weights.sum(), rtol=2e-5, atol=1e-7)
    assert all(slope == 0 for slope in found[2:])
    merged_risk = lambda w: merge_risks(jnp.float32(clipped), temperature, weights=w)[0]  # noqa: E731
    merged = jax.jit(jax.grad(merged_risk))(jnp.float32(weights))
    np.testing.assert_allclose(merged, found[1], rtol=1e-5)


@pytest.mark.parametrize("axis", [[0, 1], [1], (0,), -1, None])
def test_axes_are_given_as_in_a_mean(axis):
    losses = np.float32(rng.exponential(size=(3, 4)))
    axes = tuple(axis) if isinstance(axis, list) else axis
    np.testing.assert_allclose(
        entropic_risk(losses, 0.7, axis=axis), 0.7 * np.log(np.exp(losses / 0.7).mean(axes)), rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64, np.int8, bool])
def test_weights_are_real_numbers_of_any_dtype(dtype):
    weights = np.array([1, 0, 1]).astype(dtype)
    np.testing.assert_allclose(entropic_risk(jnp.arange(3.0), INF, weights=weights), 1)
    with pytest.raises(TypeError, match="weights has dtype complex64: give real numbers"):
        entropic_risk(jnp.arange(3.0), INF, weights=np.complex64([1, 0, 1]))


@pytest.mark.parametrize(
    "number", [np.full((), np.nan, jnp.bfloat16), np.float32("nan").astype(jnp.bfloat16), np.float16("nan")]
)
def test_a_temperature_of_no_number_is_refused_in_every_precision(number):
    with pytest.raises(ValueError, match=r"temperature=.*nan.*: it must be a number"):
        entropic_risk(jnp.arange(3.0), number)


def test_mixed_second_derivative_at_an_infinite_temperature():
    losses, weights = jnp.float32([0, 1, 4]), jnp.float32([1, 2, 3])
    found = jax.jacobian(jax.grad(lambda w, x: entropic_risk(x, INF, weights=w)), 1)(weights, losses)
    share = weights / weights.sum()  # of R = Σ w L / Σ w
    np.testing.assert_allclose(found, (np.eye(3) - share[None]) / weights.sum(), atol=1e-6)


def test_slope_of_the_weights_with_a_threshold_is_continuous_at_infinity():
    losses, weights = jnp.float32([0, 1, 4]), jnp.float32([1, 2, 3])
    for temperature in (INF, 1e6):
        slopes = jax.grad(lambda w, lam=temperature: entropic_risk(losses, lam, weights=w, threshold=1.0))(weights)
        np.testing.assert_allclose(slopes, (np.array([0, 1, 1]) - 5 / 6) / 6, rtol=1e-4)  # of Σ w min(L, 1) / Σ w


def test_at_zero_devices_without_the_largest_loss_have_no_say():
    risk = jax.vmap(lambda x, lam: entropic_risk(x, lam, axis_name="d"), (0, None), axis_name="d")
    losses = jnp.arange(6.0).reshape(3, 2)
    value, slope = jax.jvp(risk, (losses, jnp.float32(0)), (losses, jnp.float32(0)))
    np.testing.assert_array_equal(value, [5, 5, 5])
    np.testing.assert_array_equal(slope, [5, 5, 5])


def test_weights_of_far_losses_have_a_derivative():
    bounded = lambda x: attention_weights(x, 0.0, 1.0, max_weight=3.0)  # noqa: E731
    slopes = jax.jacobian(bounded)(jnp.float32([200, 1, -200]))
    np.testing.assert_allclose(slopes, np.diag([0, np.e, 0]), rtol=1e-6)
    np.testing.assert_array_equal(attention_weights([INF, 1.0], 1.0, INF), [1, 1])
