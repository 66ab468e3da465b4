"""Weights of at most c: against a transcription in long doubles, the convex duality behind them, and their limits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from scipy.optimize import brentq

import absgd_jax
from tests import reference

STEPS, BATCH, INF = 12, 16, float("inf")
rng = np.random.default_rng(0)
LOSSES = rng.exponential(size=(STEPS, BATCH)) * np.linspace(4, 1, STEPS)[:, None]
SLOPES = rng.normal(size=(STEPS, BATCH))


def factors(optimizer, *, slices=1, losses=LOSSES, around=lambda f: f):
    """The update of one parameter w for per-example losses L + (w - w_0) · slope, w_0 the parameter, step by step."""
    w = jnp.zeros((), jnp.result_type(float))
    state, updates, states = optimizer.init(w), [], []
    f = absgd_jax.value_and_grad(lambda w, x, d: x + w * d, num_microbatches=slices, with_kl=True)

    @jax.jit
    def step(state, x, d):
        (risk, kl), grad = f(w, x, d, state=state)
        return optimizer.update(grad, state, w, value=risk, kl=kl)

    for x, d in zip(losses, SLOPES, strict=True):
        update, state = step(state, x, d)
        updates.append(update)
        states.append(state)
    return np.array(updates), states


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


SETTINGS = [(1.0, 3.0, 0.9), (0.3, 1.5, 0.5), (0.05, 10.0, 0.9), (-0.7, 2.0, 0.9), (-0.1, 4.0, 0.3)]


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.parametrize(("lam", "c", "gamma"), SETTINGS)
def test_the_transform_is_the_transcription(float64, lam, c, gamma, slices, bias_correction):
    rules = {"temperature": lam, "gamma": gamma, "max_weight": c, "bias_correction": bias_correction}
    weights, risks = reference.bounded_algorithm1(LOSSES, **rules)
    assert (weights == weights.max(1, keepdims=True)).sum() > 2 * STEPS  # several examples of a batch reach the bound
    updates, states = factors(absgd_jax.scale_by_absgd(**rules), slices=slices)
    np.testing.assert_allclose(updates, np.mean(weights * SLOPES, axis=1), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose([s.risk for s in states], risks, rtol=1e-10)


@pytest.mark.parametrize(("lam", "c", "gamma"), SETTINGS)
def test_the_loss_level_weights_are_the_transcription(float64, lam, c, gamma):
    rules = {"temperature": lam, "gamma": gamma, "max_weight": c}
    weighting, (weights, _) = absgd_jax.weight_by_absgd(**rules), reference.bounded_algorithm1(LOSSES, **rules)
    state = weighting.init()
    for losses, expected in zip(LOSSES, weights, strict=True):
        actual, state = jax.jit(weighting.update)(losses, state)
        np.testing.assert_allclose(actual, expected, rtol=1e-9)


def test_float32_is_float64_to_rounding():
    weights, _ = reference.bounded_algorithm1(LOSSES, temperature=1.0, gamma=0.9, max_weight=3.0)
    updates, _ = factors(absgd_jax.scale_by_absgd(1.0, max_weight=3.0), losses=np.float32(LOSSES))
    np.testing.assert_allclose(updates, np.mean(weights * SLOPES, axis=1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["absgd", "abadam"])
def test_the_aliases_hand_the_bound_on(optimizer):
    bounded = getattr(absgd_jax, optimizer)(0.1, 1.0, max_weight=3.0)
    assert bounded.init(jnp.zeros(2))[0].max_weight == 3


def test_devices_merge_exactly(float64):
    weighting = absgd_jax.weight_by_absgd(0.3, max_weight=2.0)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    update = partial(weighting.update, axis_name="data")
    mapped = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P())))
    on_one = jax.jit(weighting.update)
    state, alone = weighting.init(), weighting.init()
    for losses in LOSSES:
        weights, state = mapped(losses, state)
        expected, alone = on_one(losses, alone)
        np.testing.assert_allclose(weights, expected, rtol=1e-12)

    f = absgd_jax.value_and_grad(lambda w, x, d: x + w * d, axis_name="data", num_microbatches=2)
    opt = absgd_jax.scale_by_absgd(0.3, max_weight=2.0)
    specs = {"in_specs": (P(), P("data"), P("data"), P()), "out_specs": P()}
    grad = jax.jit(jax.shard_map(lambda w, x, d, s: f(w, x, d, state=s), mesh=mesh, **specs))
    f_on_one = absgd_jax.value_and_grad(lambda w, x, d: x + w * d)
    grad_on_one = jax.jit(lambda w, x, d, s: f_on_one(w, x, d, state=s))
    update = jax.jit(lambda g, s, risk: opt.update(g, s, value=risk)[1])
    w, here, there = jnp.zeros(()), opt.init(jnp.zeros(())), opt.init(jnp.zeros(()))
    for x, d in zip(LOSSES, SLOPES, strict=True):
        risk, g = grad(w, x, d, there)
        expected = grad_on_one(w, x, d, here)
        np.testing.assert_allclose((risk, g), expected, rtol=1e-12)
        there, here = update(g, there, risk), update(expected[1], here, expected[0])


@pytest.mark.parametrize("lam", [0.9, -0.7])
@pytest.mark.parametrize("how", ["whole", "micro-batches", "devices"])
def test_the_gradient_of_a_batch_in_parts_is_differentiated_as_that_of_the_whole(float64, how, lam):
    x, y = rng.normal(size=(8, 2)), rng.normal(size=8)
    state = absgd_jax.ScaleByAbsgdState(jnp.int32(1), *jnp.array([1.0, lam, 0.9, 2.0]))

    def risk_and_gradient(w, x, y):
        options = {"micro-batches": {"num_microbatches": 4}, "devices": {"axis_name": "data"}}.get(how, {})
        f = absgd_jax.value_and_grad(lambda w, x, y: (x @ w - y) ** 2, **options)
        return f(w, x, y, state=state)

    if how == "devices":
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        risk_and_gradient = jax.shard_map(
            risk_and_gradient, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P()
        )
    f = jax.jit(lambda w: risk_and_gradient(w, x, y))
    w = np.array([0.5, -0.3])
    losses = (x @ w - y) ** 2
    assert 1 <= np.sum(np.sign(lam) * (losses - state.threshold) > 0) <= 7
    steps = 1e-6 * np.eye(2)
    numeric = np.stack([(f(w + d)[1] - f(w - d)[1]) / 2e-6 for d in steps], axis=1)
    np.testing.assert_allclose(jax.jacfwd(lambda w: f(w)[1])(w), numeric, rtol=1e-6)
    np.testing.assert_allclose(jax.jacrev(lambda w: f(w)[1])(w), numeric, rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda w: f(w)[0])(w), f(w)[1], rtol=1e-12)


@pytest.mark.parametrize("lam", [1.0, -1.0])
def test_without_a_bound_it_is_algorithm_1_bit_for_bit(lam):
    plain, _ = factors(absgd_jax.scale_by_absgd(lam, 0.5))
    np.testing.assert_array_equal(factors(absgd_jax.scale_by_absgd(lam, 0.5, max_weight=INF))[0], plain)
    np.testing.assert_array_equal(factors(absgd_jax.scale_by_absgd(lam, 0.5, max_weight=np.float32(INF)))[0], plain)
    # A bound that nothing reaches changes nothing once there is a risk to compare with, as after a stage with SGD.
    stages = lambda count: jnp.where(count < 1, INF, lam)  # noqa: E731
    one, other = (factors(absgd_jax.scale_by_absgd(stages, 0.5, max_weight=c))[0] for c in (INF, 1e30))
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("c", [1.5, 3.0])
def test_at_infinity_a_bound_changes_nothing(c):
    updates, _ = factors(absgd_jax.scale_by_absgd(INF, max_weight=c))
    np.testing.assert_array_equal(updates, factors(absgd_jax.scale_by_absgd(INF))[0])


def level(losses, lam, c):
    """R with mean min(exp((L - R)/λ), c) = 1, the minimiser of the objective."""
    mean_weight = lambda r: np.mean(np.minimum(np.exp(np.minimum((losses - r) / lam, 50)), c)) - 1  # noqa: E731
    spread = 60 * abs(lam)
    return brentq(mean_weight, losses.min() - spread, losses.max() + spread, xtol=1e-13)


@pytest.mark.parametrize(("lam", "c"), [(1.0, 3.0), (0.2, 1.6), (-0.5, 2.0)])
def test_the_recursion_ends_at_the_minimiser_of_the_bounded_dro(float64, lam, c):
    losses, weighting = LOSSES[0], absgd_jax.weight_by_absgd(lam, 0.5, max_weight=c)
    end = jax.lax.fori_loop(0, 20_000, lambda _, state: weighting.update(losses, state)[1], weighting.init())
    weights, state = weighting.update(losses, end)
    risk = level(losses, lam, c)
    q = np.minimum(np.exp((losses - risk) / lam), c)
    np.testing.assert_allclose(state.risk, risk, rtol=1e-10)
    np.testing.assert_allclose(weights, q, rtol=1e-9)

    # The docstring's two forms of the objective agree there (strong duality), and q is the best density below c.
    x = (losses - risk) / lam
    e_c = np.where(x < np.log(c), np.exp(x), c * (1 + x - np.log(c)))
    dual, primal = risk + lam * np.mean(e_c - 1), lambda q: np.mean(q * losses) - lam * np.mean(q * np.log(q))
    np.testing.assert_allclose(primal(q), dual, rtol=1e-12)
    for _ in range(200):
        other = rng.uniform(1e-6, c, BATCH)
        for _ in range(100):  # into the densities: mean 1, at most c
            other = np.clip(other / np.mean(other), 1e-9, c)
        np.testing.assert_allclose(np.mean(other), 1, rtol=1e-6)
        assert np.sign(lam) * (primal(other) - dual) < 1e-6
        assert np.sign(lam) * (primal(0.9 * q + 0.1 * other) - dual) < 1e-9


@pytest.mark.parametrize("sign", [1, -1])
def test_towards_zero_it_is_the_conditional_value_at_risk_of_level_1_over_c(float64, sign):
    losses, c = LOSSES[0], 4.0  # the largest, or the smallest, quarter: 4 of 16
    lam = sign * 1e-6
    weighting = absgd_jax.weight_by_absgd(lam, 0.5, max_weight=c)
    state = weighting.init()._replace(risk=jnp.float64(level(losses, lam, c)), mass=jnp.float64(1.0))
    weights, _ = weighting.update(losses, state)
    tail = np.argsort(-sign * losses)[:4]
    expected = np.zeros(BATCH)
    expected[tail] = c
    np.testing.assert_allclose(weights, expected, atol=1e-6)


def test_schedules_injection_and_vmap_reach_the_bound():
    injected = optax.inject_hyperparams(absgd_jax.scale_by_absgd)(0.5, max_weight=2.0)
    w, (x, d) = jnp.zeros(()), (LOSSES[1], SLOPES[1])
    f = absgd_jax.value_and_grad(lambda w, x, d: x + w * d)

    @jax.jit
    def step(state, x, d):
        risk, grad = f(w, x, d, state=state)
        return risk, injected.update(grad, state, w, value=risk)[1]

    _, state = step(injected.init(w), LOSSES[0], SLOPES[0])
    for c in (2.0, 5.0):
        state.hyperparams["max_weight"] = jnp.float32(c)
        risk, _ = step(state, x, d)
        clipped = np.minimum(x, np.mean(LOSSES[0]) + 0.5 * np.log(c))
        np.testing.assert_allclose(risk, 0.5 * np.log(np.mean(np.exp(clipped / 0.5))), rtol=1e-5)

    def largest(c):
        weighting = absgd_jax.weight_by_absgd(0.2, 1.0, max_weight=c)
        _, state = weighting.update(LOSSES[0], weighting.init())
        return absgd_jax.attention_weights(LOSSES[1], state.risk, 0.2, max_weight=c).max()

    np.testing.assert_allclose(jax.jit(jax.vmap(largest))(jnp.array([1.5, 3.0])), [1.5, 3.0])


def test_a_gradient_far_above_the_bound_keeps_its_direction_and_weight():
    state = absgd_jax.scale_by_absgd(1.0, max_weight=3.0).init(jnp.zeros(1))
    state = state._replace(risk=jnp.float32(1.0), mass=jnp.float32(1.0), temperature=jnp.float32(1.0))
    losses = jnp.array([1.0, 1e6])  # exp(1e6) without the bound
    risk_of = lambda x: absgd_jax.entropic_risk(x, state.temperature, threshold=state.threshold)  # noqa: E731
    risk, grads = jax.jit(jax.value_and_grad(risk_of))(losses)
    np.testing.assert_allclose(risk, 1 + np.log((1 + 3) / 2), rtol=1e-6)
    np.testing.assert_allclose(grads, [1 / 4, 3 / 4], rtol=1e-6)


def test_rgd_is_written_with_attention_weights():
    losses, tau = jnp.float32(LOSSES[0]), 1.0
    weights = absgd_jax.attention_weights(jnp.minimum(losses, tau), 0.0, tau + 1)
    np.testing.assert_allclose(weights, np.exp(np.minimum(LOSSES[0], tau) / (tau + 1)), rtol=1e-6)
    assert weights.max() / weights.min() < np.e


@pytest.mark.parametrize("c", [1, 0.5, -3.0, float("nan"), np.float32(1.0), np.array(0.5)])
def test_a_bound_that_is_none_is_refused(c):
    for make in (absgd_jax.scale_by_absgd, absgd_jax.weight_by_absgd):
        with pytest.raises(ValueError, match=r"max_weight=.*above 1"):
            make(1.0, max_weight=c)
    with pytest.raises(ValueError, match=r"max_weight has shape \(2,\)"):
        absgd_jax.scale_by_absgd(1.0, max_weight=jnp.ones(2))
