"""Laboratory: RECOVER against its formulas with plain exponentials, and where those would overflow."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import absgd_jax
from examples.lab.methods.recover import Recover, RecoverState


def problem(steps=50, scale=1.0):
    """Batches of a least-squares problem, shape (T, B, D) and (T, B), and where to start."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps, 8, 3))
    y = x @ np.array([1.0, -2.0, 0.5]) + 0.3 * rng.normal(size=(steps, 8))
    return scale * x, scale * y, np.array([0.2, 0.1, -0.3])


def risk_and_grad_of(x, y, temperature):
    f = absgd_jax.value_and_grad(lambda params: (x @ params["w"] + params["b"] - y) ** 2 / 2)
    return lambda params: f(params, temperature=temperature)


def train(x, y, start, temperature, a, learning_rate):
    """The parameters, risks and directions of all steps."""

    def body(carry, batch):
        params, state = carry
        at = risk_and_grad_of(batch[0], batch[1], temperature)
        direction, state = Recover(temperature, a).direction(at, params, state)
        params = jax.tree.map(lambda p, q: p - learning_rate * q, params, direction)
        return (params, state), (params, state.risk, direction)

    params = {"w": jnp.asarray(start), "b": jnp.zeros((), jnp.asarray(start).dtype)}
    return jax.lax.scan(body, (params, Recover(temperature).init(params)), (jnp.asarray(x), jnp.asarray(y)))[1]


def literal(x, y, start, lam, a, learning_rate):
    """The paper's recursion, as it is written."""

    def g_and_gradient(w, x, y):
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        residuals = x @ w - y
        exponentials = np.exp(residuals**2 / 2 / lam)
        return exponentials.mean(), (exponentials * residuals / lam) @ x / len(x)

    w, before, u, v, history = np.append(start, 0.0), None, None, None, []
    for batch in zip(x, y, strict=True):
        g, gradient = g_and_gradient(w, *batch)
        if before is None:
            u, v = g, gradient
        else:
            g_before, gradient_before = g_and_gradient(before, *batch)
            terms = [g, (1 - a) * u, (1 - a) * g_before]
            u = g + (1 - a) * (u - g_before)
            v = gradient + (1 - a) * (v - gradient_before)
            assert u > 0.1 * a * max(terms)  # the floor is not needed here
        before, w = w, w - learning_rate * lam * v / u
        history.append((w, lam * np.log(u)))
    return history


@pytest.mark.parametrize(("lam", "a"), [(3.0, 0.9), (3.0, 0.3), (-2.0, 0.5), (1e3, 0.1)])
def test_the_paper_s_recursion(lam, a):
    x, y, start = problem()
    expected = literal(x, y, start, lam, a, 0.02)
    with jax.enable_x64(True):
        params, risks, _ = jax.jit(train)(x, y, start, lam, a, 0.02)  # λ and a are traced
    assert risks.dtype == np.float64
    np.testing.assert_allclose(np.column_stack([params["w"], params["b"]]), [w for w, _ in expected], rtol=1e-8)
    np.testing.assert_allclose(risks, [risk for _, risk in expected], rtol=1e-7, atol=1e-10)


def test_one_is_the_minibatch_softmax():
    x, y, start = problem(10)
    params, risks, directions = jax.jit(train)(x, y, start, 0.5, 1.0, 0.02)
    assert risks.dtype == np.float32
    w = {"w": jnp.asarray(start), "b": jnp.zeros(())}
    at = jax.jit(lambda x, y, w: risk_and_grad_of(x, y, 0.5)(w))
    for t in range(10):
        risk, grads = at(x[t], y[t], w)
        assert float(risks[t]) == pytest.approx(float(risk), rel=1e-5)
        np.testing.assert_allclose(directions["w"][t], grads["w"], rtol=1e-4)
        w = jax.tree.map(lambda p, t=t: p[t], params)


@pytest.mark.parametrize("lam", [math.inf, 1e6])
def test_at_infinity_it_is_storm(lam):
    x, y, start = problem()
    a = 0.2
    with jax.enable_x64(True):
        params, risks, directions = jax.jit(train)(x, y, start, lam, a, 0.02)

    def mean_and_gradient(w, x, y):
        x = np.concatenate([x, np.ones((len(x), 1))], axis=1)
        return np.mean((x @ w - y) ** 2 / 2), (x @ w - y) @ x / len(x)

    w = np.append(start, 0.0)
    risk, q = mean_and_gradient(w, x[0], y[0])
    for t in range(50):
        if t > 0:
            before, w = w, w - 0.02 * q
            (new, gradient), (old, past) = mean_and_gradient(w, x[t], y[t]), mean_and_gradient(before, x[t], y[t])
            risk, q = new + (1 - a) * (risk - old), gradient + (1 - a) * (q - past)
        assert float(risks[t]) == pytest.approx(risk, rel=1e-4)
        np.testing.assert_allclose(np.append(directions["w"][t], directions["b"][t]), q, rtol=1e-3, atol=1e-4)
    assert np.all(np.isfinite(params["w"]))


@pytest.mark.parametrize("lam", [1.0, -1.0, 1e-3])
def test_nothing_overflows(lam):
    x, y, start = problem(scale=100.0)
    assert np.max((x[0] @ start - y[0]) ** 2 / 2) > 1e4
    for a in (0.1, 0.9):
        everything = jax.jit(train)(x, y, start, lam, a, 1e-6)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(everything))


def made_up(risk, risk_before):
    """Risks and gradients of a batch at the parameters 1 and, before, 0."""
    return lambda w: (jnp.where(w == 1, risk, risk_before), jnp.where(w == 1, 10.0, 20.0))


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
    state = RecoverState(jnp.float32(0), jnp.float32(7), jnp.float32(0), jnp.float32(1), jnp.int32(3))
    at = made_up(risk, risk_before)
    direction, new = Recover(1.0, 0.5).direction(at, jnp.float32(1), state)
    if goes_on:
        g, before = math.exp(risk), math.exp(risk_before)
        u = g + 0.5 * (1 - before)
        assert float(new.risk) == pytest.approx(math.log(u), abs=1e-5)
        assert float(direction) == pytest.approx((10 * g + 0.5 * (7 - 20 * before)) / u, rel=1e-5)
    else:
        assert float(new.risk) == pytest.approx(risk)
        assert float(direction) == 10
    assert int(new.count) == 4


def test_another_temperature_starts_afresh():
    state = RecoverState(jnp.float32(0), jnp.float32(7), jnp.float32(0), jnp.float32(2), jnp.int32(3))
    direction, new = Recover(1.0).direction(made_up(0.5, 0.4), jnp.float32(1), state)
    assert (float(direction), float(new.risk), float(new.temperature)) == (10, 0.5, 1)


def test_runs_can_be_vectorised():
    x, y, start = problem(5)
    lams, rates = np.array([0.5, 3.0, np.inf]), np.array([0.9, 0.5, 0.2])
    together = jax.jit(jax.vmap(train, (None, None, None, 0, 0, None)))(x, y, start, lams, rates, 0.02)
    for i in range(3):
        alone = jax.jit(train)(x, y, start, lams[i], rates[i], 0.02)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)
