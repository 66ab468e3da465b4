"""Both APIs against a literal transcription of Algorithm 1, over 200 steps."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import absgd_jax
from tests.reference import algorithm1

STEPS, DIM, LEARNING_RATE = 200, 5, 0.01
TEMPERATURES = [sign * lam for lam in (1e-3, 1e-2, 0.1, 1.0, 10.0, 1e3, 1e8) for sign in (1, -1)]
GRID = list(itertools.product(TEMPERATURES, (0.01, 0.5, 0.9, 1.0), ((0.0, 0.0), (0.9, 1e-2))))


def make_stream(batch_size, dtype):
    rng = np.random.default_rng(batch_size)
    losses = rng.exponential(size=(STEPS, batch_size)).astype(dtype)
    gradients = rng.normal(size=(STEPS, batch_size, DIM)).astype(dtype)
    return losses, gradients, rng.normal(size=DIM).astype(dtype)


def through_gradients(losses, gradients, w, temperature, gamma, momentum, weight_decay):
    """scale_by_absgd: the risk of losses that are linear in w, so that the given gradients are theirs."""
    optimizer = absgd_jax.absgd(LEARNING_RATE, temperature, gamma, momentum, weight_decay)

    def step(carry, batch):
        w, state = carry

        def per_example_loss(v, batch_losses, batch_gradients):
            return batch_losses + batch_gradients @ (v - w)

        risk, grads = absgd_jax.value_and_grad(per_example_loss)(w, *batch, temperature=temperature)
        updates, state = optimizer.update(grads, state, w, value=risk)
        return (optax.apply_updates(w, updates), state), state[0]

    (w, _), states = jax.lax.scan(step, (w, optimizer.init(w)), (losses, gradients))
    return w, states


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("batch_size", [1, 7, 128])
def test_parameters_and_risk_at_the_level_of_the_gradient(batch_size, dtype):
    with jax.enable_x64(dtype == np.float64):
        losses, gradients, w = make_stream(batch_size, dtype)
        settings = np.array([(lam, gamma, *rest) for lam, gamma, rest in GRID], dtype)
        ours, states = jax.jit(jax.vmap(partial(through_gradients, losses, gradients, w)))(*settings.T)
        assert ours.dtype == states.risk.dtype == dtype

    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    for (lam, gamma, momentum, weight_decay), params, risk in zip(settings, ours, states.risk[:, -1], strict=True):
        expected, _, log_s = algorithm1(
            losses, gradients, w, temperature=lam, gamma=gamma, learning_rate=np.float64(LEARNING_RATE),
            momentum=momentum, weight_decay=weight_decay,
        )  # fmt: skip
        # A risk kept in units of loss is rounded by eps |R|, which moves s by eps |R| / λ: all that λ << R costs.
        rounding = np.finfo(dtype).eps * losses.max() / abs(lam)
        error = np.linalg.norm(np.asarray(params) - expected) / np.linalg.norm(expected)
        assert error <= max(tolerance, rounding), (lam, gamma, momentum, weight_decay)
        if (1 - gamma) ** STEPS < np.finfo(dtype).eps:  # then mass is 1 and R is λ log s
            truth_rounding = 4 * np.finfo(np.longdouble).eps * abs(lam)
            np.testing.assert_allclose(np.float64(risk), np.float64(log_s[-1]), rtol=tolerance, atol=truth_rounding)


@partial(jax.jit, static_argnums=3)
def through_losses(losses, temperature, gamma, bias_correction):
    weighting = absgd_jax.weight_by_absgd(temperature, gamma, bias_correction=bias_correction)

    def step(state, batch):
        weights, state = weighting.update(batch, state)
        return state, (weights, state)

    return jax.lax.scan(step, weighting.init(), losses)[1]


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("gamma", [0.05, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [-2.0, 0.1, 1.0, 30.0])
def test_weights_and_state_of_the_loss_level_weights(temperature, gamma, bias_correction):
    losses, gradients, w = make_stream(16, np.float32)
    weights, states = through_losses(losses, temperature, gamma, bias_correction)
    lam, gamma = np.float32(temperature), np.float32(gamma)
    _, expected, log_s = algorithm1(
        losses, gradients, w, temperature=lam, gamma=gamma, learning_rate=1.0, bias_correction=bias_correction
    )
    close = partial(
        np.testing.assert_allclose, rtol=1e-5 + 8 * np.finfo(np.float32).eps * losses.max() / abs(lam), atol=1e-36
    )
    close(weights, expected.astype(float))
    s = np.float64(states.mass) * np.exp(np.float64(states.risk) / lam)
    close(s, np.exp((log_s / lam).astype(float)))
    close(states.mass, 1 - (1 - np.float64(gamma)) ** np.arange(1, STEPS + 1))
    by_hand = absgd_jax.attention_weights(losses, states.risk[:, None], temperature)
    if not bias_correction:
        by_hand = by_hand / states.mass[:, None]
    close(by_hand, expected.astype(float))


@pytest.mark.parametrize("max_weight", [float("inf"), 2.0])
@pytest.mark.parametrize(
    "temperature",
    [2.0, -1.0, optax.linear_schedule(-4.0, -0.5, STEPS), absgd_jax.trust_fraction(0.6), absgd_jax.kl_radius(0.3)],
    ids=["positive", "negative", "schedule", "trust", "radius"],
)
def test_the_weights_of_a_step_are_those_of_its_losses_and_the_state_before_it(temperature, max_weight):
    optimizer = absgd_jax.scale_by_absgd(temperature, max_weight=max_weight)
    weighting = absgd_jax.weight_by_absgd(temperature, max_weight=max_weight)
    in_the_losses = absgd_jax.value_and_grad(lambda losses: losses, with_kl=True)

    def step(state, losses):
        (risk, kl), slopes = in_the_losses(losses, state=state)
        weights, _ = weighting.update(losses, state)
        updates, state = optimizer.update(slopes, state, value=risk, kl=kl)
        return state, (32 * updates, weights)

    _, (expected, weights) = jax.lax.scan(step, optimizer.init(jnp.zeros(32)), 100 + make_stream(32, np.float32)[0])
    np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-6)


def test_attention_weights_take_the_temperature_before_and_the_risk_after_the_update():
    losses, *_ = make_stream(16, np.float32)
    weighting = absgd_jax.weight_by_absgd(optax.linear_schedule(4.0, 0.5, STEPS), gamma=0.5)
    state, risk, mass = weighting.init(), 0.0, 0.0
    for t, batch in enumerate(losses):
        before = state.temperature
        _, state = weighting.update(batch, state)
        lam = 4.0 - 3.5 * t / STEPS
        exponentials = np.exp(np.float64(batch) / lam)
        s, mass = 0.5 * mass * np.exp(risk / lam) + 0.5 * exponentials.mean(), 0.5 * mass + 0.5
        risk = lam * np.log(s / mass)  # is what a λ that changes carries over
        weights = absgd_jax.attention_weights(batch, state.risk, before) / state.mass
        np.testing.assert_allclose(weights, exponentials / s, rtol=1e-4)


def test_without_a_temperature_every_weight_is_one_in_a_batch_of_any_size():
    weighting, losses = absgd_jax.weight_by_absgd(float("inf")), 0.1 * jnp.arange(128)
    left = jnp.arange(128) <= jnp.arange(128)[:, None]
    weights, _ = jax.vmap(lambda where: weighting.update(losses, weighting.init(), where=where))(left)
    np.testing.assert_array_equal(weights, left)


def test_weights_have_no_slope_in_the_temperature():
    def first(lam):
        weighting = absgd_jax.weight_by_absgd(lam)
        return weighting.update(jnp.arange(4.0), weighting.init())[0][0]

    assert first(1.0) != first(1.1)
    assert jax.grad(first)(1.0) == 0


def test_the_mean_weight_of_a_batch_is_at_most_one_over_gamma():
    weighting = absgd_jax.weight_by_absgd(0.01, gamma=0.2)
    _, state = weighting.update(jnp.zeros(4), weighting.init())
    weights, _ = weighting.update(jnp.full(4, 1e6), state)
    np.testing.assert_allclose(weights, 5.0, rtol=1e-6)


def test_adaptive_gamma_is_scents_recursion():
    losses, _, _ = make_stream(16, np.float32)
    alpha, lam = 0.3, 0.7
    weighting = absgd_jax.weight_by_absgd(lam, absgd_jax.adaptive_gamma(float(np.log(alpha))))
    _, states = jax.lax.scan(lambda s, x: (weighting.update(x, s)[1],) * 2, weighting.init(), losses)
    s, expected = None, []
    for batch in losses.astype(np.float64):
        g = np.mean(np.exp(batch / lam))
        gamma = 1.0 if s is None else alpha * s / (1 + alpha * s)
        s = g if s is None else (1 - gamma) * s + gamma * g
        expected.append(lam * np.log(s))
    np.testing.assert_allclose(states.risk, expected, rtol=1e-5)


@pytest.mark.parametrize("gamma", [0.1, 0.9])
@pytest.mark.parametrize("init", [2.0, -2.0])
def test_kl_radius_is_the_mirror_step_and_reaches_its_radius(init, gamma):
    losses, _, _ = make_stream(64, np.float32)
    rho, step_size = 0.5, 0.2
    rule = absgd_jax.kl_radius(rho, init=init, step_size=step_size)
    weighting = absgd_jax.weight_by_absgd(rule, gamma)

    def step(state, batch):
        weights, state = weighting.update(batch, state)
        return state, (weights.mean(), state)

    _, (means, states) = jax.lax.scan(step, weighting.init(), losses)
    lam, risk, mass, expected, expected_means, kls = init, 0.0, 0.0, [], [], []
    for batch in losses.astype(np.float64):
        p = np.exp((batch - batch.mean()) / lam)
        g = np.exp(batch / lam).mean()
        s = (1 - gamma) * mass * np.exp(risk / lam) + gamma * g
        mass = (1 - gamma) * mass + gamma
        risk = lam * np.log(s / mass)
        expected_means.append(min(1, g / s))
        p /= p.sum()
        kls.append(np.sum(p * np.log(p * p.size)))
        lam *= np.exp(step_size * (kls[-1] - rho))
        expected.append(lam)
    np.testing.assert_allclose(states.temperature, expected, rtol=1e-4)
    np.testing.assert_allclose(means, expected_means, rtol=1e-3)
    assert 0 < np.sum(np.equal(expected_means, 1)) < len(expected_means)  # the bound is met, and not always
    assert np.mean(kls[100:]) == pytest.approx(rho, rel=0.05)


def test_kl_radius_starts_at_init_when_handed_a_state_at_infinity():
    plain = absgd_jax.weight_by_absgd(float("inf"))
    _, state = plain.update(jnp.arange(8.0), plain.init())
    robust = absgd_jax.weight_by_absgd(absgd_jax.kl_radius(0.5, init=3.0))
    weights, state = robust.update(jnp.arange(8.0), state)
    np.testing.assert_array_equal(weights, 1)
    assert state.temperature == 3
    assert state.mass == 0


def test_kl_radius_survives_batches_without_any_spread():
    weighting = absgd_jax.weight_by_absgd(absgd_jax.kl_radius(1.0, step_size=50.0))
    state = weighting.init()
    for losses in [jnp.zeros(8)] * 5 + [jnp.arange(8.0)] * 20:
        weights, state = weighting.update(losses, state)
        assert np.all(np.isfinite(weights))
        assert 0 < state.temperature < np.inf


COSINE = np.array([0.5 * (1 + np.cos(np.pi * min(t, 6) / 6)) for t in range(10)])
GAMMAS = {
    "falls to 0": COSINE,
    "0 in between": np.array([0.5, 0, 0.5, 0, 0, 0.2, 1, 0, 0.9, 0]),
    "denormal": np.array([0.5, *[1e-42] * 9]),
    "tiny": np.array([0.9, *[1e-7, 3e-6, 1e-12] * 3]),
}


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("lam", [1.0, -0.5])
@pytest.mark.parametrize("name", GAMMAS)
def test_a_gamma_of_zero_leaves_the_past_as_it_is(name, lam, bias_correction):
    gammas = GAMMAS[name]
    values = np.linspace(3, 1, 10) + 0.3 * np.sin(np.arange(10))
    expected, s, mass = [], 0.0, 0.0
    for value, gamma in zip(values, gammas, strict=True):
        s, mass = (1 - gamma) * s + gamma * np.exp(value / lam), (1 - gamma) * mass + gamma
        expected.append(np.exp(value / lam) / (s / mass if bias_correction else s))
    schedule = lambda count: jnp.asarray(gammas, jnp.result_type(float))[count]  # noqa: E731
    for wide in (False, True):
        with jax.enable_x64(wide):
            optimizer = absgd_jax.scale_by_absgd(lam, schedule, bias_correction=bias_correction)
            state, actual = optimizer.init(jnp.ones(())), []
            for value in values:
                update, state = jax.jit(optimizer.update)(jnp.ones(()), state, value=value)
                actual.append(update)
        np.testing.assert_allclose(actual, expected, rtol=1e-10 if wide else 3e-5)


def test_a_batch_far_above_a_past_that_stays_has_a_finite_weight():
    optimizer = absgd_jax.scale_by_absgd(1.0, lambda count: jnp.where(count < 1, 1.0, 0.0))
    _, state = optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), value=0.0)
    updates, state = optimizer.update(jnp.array([1.0, 0.0]), state, value=100.0)  # e^100 is no float32
    assert updates.tolist() == [float(jnp.finfo(jnp.float32).max), 0.0]
    assert state.risk == 0


def test_batches_of_one_huge_value_do_not_poison_the_state():
    optimizer = absgd_jax.scale_by_absgd(1.0)
    step, state = jax.jit(lambda state, value: optimizer.update(jnp.ones(1), state, value=value)), optimizer.init(1.0)
    for value in np.float32([7e19, 7e19, 7e19]):
        update, state = step(state, value)
        np.testing.assert_allclose(state.risk, value, rtol=1e-6)
        assert np.isfinite(update)


@pytest.mark.parametrize("max_weight", [float("inf"), 3.0])
@pytest.mark.parametrize("lam", [1.0, -1.0])
def test_an_infinite_loss_leaves_the_state_as_it_is(lam, max_weight):
    """Alone in a batch, or all of it; at λ < 0 the loss of weight 0 is +inf, and the others are counted."""
    weighting = absgd_jax.weight_by_absgd(lam, max_weight=max_weight)
    state = weighting.init()
    for _ in range(2):
        _, state = weighting.update(jnp.array([1.0, 2.0, 4.0]), state)
    bad = np.copysign(np.inf, lam)
    for losses in ([1.0, bad, 2.0], [bad, bad, bad]):
        _, after = jax.jit(weighting.update)(jnp.array(losses), state)
        assert after.risk == state.risk
    _, after = jax.jit(weighting.update)(jnp.array([1.0, -bad, 2.0]), state)
    assert np.isfinite(after.risk)


def test_weights_that_overflow_are_as_large_as_they_can_be():
    weighting = absgd_jax.weight_by_absgd(0.01, lambda count: jnp.where(count < 1, 1.0, 0.0))
    _, state = weighting.update(jnp.array([0.1, 0.2]), weighting.init())
    weights, _ = weighting.update(jnp.array([-5.0, 3.0]), state)
    assert weights.tolist() == [0.0, float(jnp.finfo(jnp.float32).max)]


@pytest.mark.parametrize(("lam", "log_alpha", "value"), [(-0.02, -1.0, 2.3), (0.5, -1.0, -60.0), (-2.0, 0.0, 300.0)])
def test_an_adaptive_gamma_that_underflows_has_the_weights_of_the_recursion(lam, log_alpha, value):
    weighting = absgd_jax.weight_by_absgd(lam, absgd_jax.adaptive_gamma(log_alpha))
    state = weighting.init()
    assert jax.nn.sigmoid(jnp.float32(log_alpha + value / lam)) == 0
    for drop in (0.0, 0.0, 0.1, 0.2):  # γ is 0 to 26 digits, so s stays that of the first batch
        weights, state = weighting.update(jnp.full(4, value - drop * abs(lam)), state)
        np.testing.assert_allclose(weights, np.exp(-drop * np.sign(lam)), rtol=1e-4)
        assert np.isfinite(state.risk)


def test_a_gamma_of_zero_before_anything_was_seen_is_the_softmax_of_the_batch():
    weighting = absgd_jax.weight_by_absgd(1.0, lambda count: jnp.where(count < 2, 0.0, 0.5))
    state = weighting.init()
    for _ in range(2):
        weights, state = weighting.update(jnp.arange(4.0), state)
        np.testing.assert_allclose(weights, 4 * np.exp(np.arange(4.0)) / np.exp(np.arange(4.0)).sum(), rtol=1e-6)
        assert (state.mass, state.risk) == (0, 0)
    _, state = weighting.update(jnp.arange(4.0), state)
    np.testing.assert_allclose(state.risk, np.log(np.mean(np.exp(np.arange(4.0)))), rtol=1e-6)


@pytest.mark.parametrize("lam", [1.0, -1.0])
def test_a_schedule_that_runs_into_zero_stops_training_with_finite_numbers(lam):
    schedule = lambda count: lam * jnp.maximum(1 - count / 4, 0.0)  # noqa: E731
    optimizer = absgd_jax.absgd(0.1, schedule, momentum=None)
    state, w = optimizer.init(jnp.ones(())), jnp.ones(())
    f, updates = absgd_jax.value_and_grad(lambda w, x: w * x), []
    for t in range(8):
        risk, grad = f(w, jnp.arange(1.0, 5.0) - lam * t, state=state)  # risks fall for λ > 0, and rise for λ < 0
        update, state = optimizer.update(grad, state, w, value=risk)
        updates.append(float(update))
        assert np.isfinite(update)
        assert np.isfinite(state[0].risk)
    assert all(updates[:4])
    assert not any(updates[5:])
