"""Laboratory: RECOVER against its formulas with plain exponentials, and where those overflow; ABSGD against weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

import absgd_jax
from examples.lab.methods import Batch
from examples.lab.methods.absgd import Absgd
from examples.lab.methods.recover import Recover, RecoverState


def problem(steps=50, scale=1.0):
    """Batches of a least-squares problem, shape (T, B, D), (T, B) and (T, B), and where to start."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps, 8, 3))
    y = x @ np.array([1.0, -2.0, 0.5]) + 0.3 * rng.normal(size=(steps, 8))
    return Batch(scale * x, scale * y, rng.uniform(0.5, 1.5, (steps, 8))), np.array([0.2, 0.1, -0.3])


def losses(params, batch):
    return (batch.inputs @ params["w"] + params["b"] - batch.labels) ** 2 / 2, params["b"]


def losses_and_gradients(w, batch):
    """In NumPy, weighted by class; the bias is the last of the parameters."""
    x = np.concatenate([batch.inputs, np.ones((8, 1))], axis=1)
    residuals = x @ w - batch.labels
    return batch.weights * residuals**2 / 2, (batch.weights * residuals)[:, None] * x


def each(batches):
    return map(Batch, *batches[:3])


def flat(params):
    return np.column_stack([params["w"], params["b"]])


def train(batches, start, method, learning_rate):
    """Of all steps the parameters after them, the gradients, and what there is to log."""

    def body(carry, batch):
        params, state = carry
        grads, state, info = method.gradient(losses, params, state, batch, None)
        params = jax.tree.map(lambda p, q: p - learning_rate * q, params, grads)
        return (params, state), (params, grads, info)

    params = {"w": jnp.asarray(start), "b": jnp.zeros((), jnp.asarray(start).dtype)}
    return jax.lax.scan(body, (params, method.init(params, (0, 0))), jax.tree.map(jnp.asarray, batches))[1]


def literal(batches, start, lam, a, learning_rate):
    """The paper's recursion, as it is written: parameters and risks."""

    def g_and_gradient(w, batch):
        values, gradients = losses_and_gradients(w, batch)
        return np.exp(values / lam).mean(), np.exp(values / lam) @ gradients / lam / 8

    w, before, u, v, history = np.append(start, 0.0), None, None, None, []
    for batch in each(batches):
        g, gradient = g_and_gradient(w, batch)
        if before is None:
            u, v = g, gradient
        else:
            g_before, gradient_before = g_and_gradient(before, batch)
            terms = [g, (1 - a) * u, (1 - a) * g_before]
            u = g + (1 - a) * (u - g_before)
            v = gradient + (1 - a) * (v - gradient_before)
            assert u > 0.1 * a * max(terms)  # the floor is not needed here
        before, w = w, w - learning_rate * lam * v / u
        history.append((w, lam * np.log(u)))
    return map(np.array, zip(*history, strict=True))


@pytest.mark.parametrize(("lam", "a"), [(3.0, 0.9), (3.0, 0.3), (-2.0, 0.5), (1e3, 0.1)])
def test_the_paper_s_recursion(lam, a):
    batches, start = problem()
    expected, risks = literal(batches, start, lam, a, 0.02)
    with jax.enable_x64(True):
        params, _, info = jax.jit(train)(batches, start, Recover(lam, a), 0.02)  # λ and a are traced
    assert info.risk.dtype == np.float64
    np.testing.assert_allclose(flat(params), expected, rtol=1e-8)
    np.testing.assert_allclose(info.risk, risks, rtol=1e-7, atol=1e-10)
    # What is logged is of the parameters of the step, and not of those before.
    path = np.concatenate([[np.append(start, 0.0)], expected[:-1]])
    values = [losses_and_gradients(w, batch)[0] for w, batch in zip(path, each(batches), strict=True)]
    np.testing.assert_allclose(info.losses, values, rtol=1e-7)
    np.testing.assert_allclose(info.weights, softmax(np.array(values) / lam, axis=1), rtol=1e-7)
    np.testing.assert_allclose(info.aux, path[:, -1], rtol=1e-7)
    np.testing.assert_array_equal(info.temperature, lam)


def test_one_is_the_minibatch_softmax():
    batches, start = problem(10)
    params, grads, info = jax.jit(train)(batches, start, Recover(0.5, 1.0), 0.02)
    assert info.risk.dtype == np.float32
    path = np.concatenate([[np.append(start, 0.0)], flat(params)[:-1]])
    for t, (w, batch) in enumerate(zip(path, each(batches), strict=True)):
        values, gradients = losses_and_gradients(w, batch)
        assert float(info.risk[t]) == pytest.approx(0.5 * np.log(np.mean(np.exp(values / 0.5))), rel=1e-5)
        np.testing.assert_allclose(flat(grads)[t], softmax(values / 0.5) @ gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lam", [math.inf, 1e6])
def test_at_infinity_it_is_storm(lam):
    batches, start = problem()
    a = 0.2
    with jax.enable_x64(True):
        _, grads, info = jax.jit(train)(batches, start, Recover(lam, a), 0.02)

    def mean_and_gradient(w, batch):
        values, gradients = losses_and_gradients(w, batch)
        return values.mean(), gradients.mean(axis=0)

    before, w = None, np.append(start, 0.0)
    for t, batch in enumerate(each(batches)):
        risk_now, q_now = mean_and_gradient(w, batch)
        if before is None:
            risk, q = risk_now, q_now
        else:
            risk_past, q_past = mean_and_gradient(before, batch)
            risk, q = risk_now + (1 - a) * (risk - risk_past), q_now + (1 - a) * (q - q_past)
        before, w = w, w - 0.02 * q
        assert float(info.risk[t]) == pytest.approx(risk, rel=1e-4)
        np.testing.assert_allclose(flat(grads)[t], q, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(info.weights, 1 / 8, rtol=1e-3)


@pytest.mark.parametrize("lam", [1.0, -1.0, 1e-3])
def test_nothing_overflows(lam):
    batches, start = problem(scale=100.0)
    assert np.max(losses_and_gradients(np.append(start, 0), next(each(batches)))[0]) > 1e4
    for a in (0.1, 0.9):
        everything = jax.jit(train)(batches, start, Recover(lam, a), 1e-6)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(everything))


def after_a_step(method, risk, risk_before, temperature):
    """The gradient and state of a batch of one loss with gradient 10 at the parameter 1 and 20 at the last one, 0."""

    def losses(w, batch):
        return jnp.where(w == 1, risk + 10 * (w - 1), risk_before + 20 * w)[None], None

    state = RecoverState(jnp.float32(0), jnp.float32(7), jnp.float32(0), jnp.float32(temperature), jnp.int32(3))
    return method.gradient(losses, jnp.float32(1), state, Batch(None, None, jnp.ones(1)), None)[:2]


@pytest.mark.parametrize(
    ("risk", "risk_before", "goes_on"),
    [
        (0.0, 0.0, True),  # u = 1
        (0.0, math.log(2.8), True),  # u = 1 + 0.5 (1 - 2.8) = 0.1 > 0.05 · 1.4
        (0.0, math.log(2.9), False),  # u = 0.05
        (0.0, math.log(4.0), False),  # u < 0
        (-200.0, 0.0, False),  # u = 0: nothing but rounding would be left
    ],
)
def test_an_estimate_near_zero_starts_afresh(risk, risk_before, goes_on):
    grads, new = after_a_step(Recover(1.0, 0.5), risk, risk_before, 1.0)
    if goes_on:
        g, before = math.exp(risk), math.exp(risk_before)
        u = g + 0.5 * (1 - before)
        assert float(new.risk) == pytest.approx(math.log(u), abs=1e-5)
        assert float(grads) == pytest.approx((10 * g + 0.5 * (7 - 20 * before)) / u, rel=1e-5)
    else:
        assert float(new.risk) == pytest.approx(risk)
        assert float(grads) == 10
    assert int(new.count) == 4


def test_another_temperature_starts_afresh():
    grads, new = after_a_step(Recover(1.0), 0.5, 0.4, 2.0)
    assert (float(grads), float(new.risk), float(new.temperature)) == (10, 0.5, 1)


def test_runs_can_be_vectorised():
    batches, start = problem(5)
    methods = Recover(np.array([0.5, 3.0, np.inf]), np.array([0.9, 0.5, 0.2]))
    together = jax.jit(jax.vmap(train, (None, None, 0, None)))(batches, start, methods, 0.02)
    for i in range(3):
        alone = jax.jit(train)(batches, start, jax.tree.map(lambda leaf, i=i: leaf[i], methods), 0.02)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "weighting"),
    [
        (Absgd(), absgd_jax.weight_by_absgd(math.inf)),
        (Absgd(2.0), absgd_jax.weight_by_absgd(2.0)),
        (Absgd(-2.0, gamma=0.5), absgd_jax.weight_by_absgd(-2.0, 0.5)),
        (Absgd(2.0, log_alpha=-1.0), absgd_jax.weight_by_absgd(2.0, absgd_jax.adaptive_gamma(-1.0))),
        (Absgd(1.0, max_weight=1.5), absgd_jax.weight_by_absgd(1.0, max_weight=1.5)),
        (Absgd(-1.0, max_weight=1.5), absgd_jax.weight_by_absgd(-1.0, max_weight=1.5)),
        (Absgd(kl_radius=0.7), absgd_jax.weight_by_absgd(absgd_jax.focus_fraction(math.exp(-0.7)))),
        (Absgd(trusted=0.6), absgd_jax.weight_by_absgd(absgd_jax.trust_fraction(0.6))),
        (Absgd(focus=0.6), absgd_jax.weight_by_absgd(absgd_jax.focus_fraction(0.6))),
    ],
)
def test_absgd_s_gradient_is_that_of_losses_weighted_by_hand(method, weighting):
    batches, start = problem(10)
    with jax.enable_x64(True):
        params, grads, info = jax.jit(train)(batches, start, method, 0.02)
        path, state = np.concatenate([[np.append(start, 0.0)], flat(params)[:-1]]), weighting.init()
        for t, (w, batch) in enumerate(zip(path, each(batches), strict=True)):
            values, gradients = losses_and_gradients(w, batch)
            assert float(info.temperature[t]) == pytest.approx(float(state.temperature), rel=1e-9)
            weights, state = weighting.update(values, state)
            np.testing.assert_allclose(flat(grads)[t], weights @ gradients / 8, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(info.weights[t] / info.weights[t].sum(), weights / weights.sum(), rtol=1e-9)
            np.testing.assert_allclose(info.losses[t], values, rtol=1e-9)
            assert float(info.risk[t]) == pytest.approx(float(state.risk), rel=1e-9)
    np.testing.assert_allclose(info.aux, path[:, -1])
    uneven = np.ptp(info.weights, axis=1) > 1e-6
    assert uneven[1:].all() if method != Absgd() else not uneven.any()
