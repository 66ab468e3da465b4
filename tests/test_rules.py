"""Rules for λ and γ: the one protocol, the fraction that is trusted or focused on, and a user's own."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

import absgd_jax
from absgd_jax import Rule, focus_fraction, kl_radius, trust_fraction

rng = np.random.default_rng(0)


def mixture(steps, batch=250, hard=0.4, right=1.0, scale=1.0, seed=0):
    """Losses of which a fraction is far above the others, unless they are too; the first ones of each batch."""
    rng = np.random.default_rng(seed)
    losses = rng.normal(right, 0.2 * right, size=(steps, batch))
    losses[:, : round(hard * batch)] = rng.normal(4.0, 0.5, size=(steps, round(hard * batch)))
    return np.float32(scale * losses)


def follow(rule, batches, **rules):
    """The weights of the last batch, λ of every step, and the effective fraction exp(-KL) over the last tenth."""
    weighting = absgd_jax.weight_by_absgd(rule, **rules)

    def step(state, losses):
        weights, new = weighting.update(losses, state)
        share = weights / jnp.sum(weights)
        kl = jnp.sum(jnp.where(share > 0, share * jnp.log(share * losses.size), 0))
        return new, (weights, state.temperature, kl)

    _, (weights, lam, kl) = jax.lax.scan(step, weighting.init(), batches)
    return weights[-1], lam, jnp.exp(-jnp.mean(kl[-len(kl) // 10 :]))


@pytest.mark.parametrize("fraction", [0.45, 0.6])  # 0.6 is right, and what a smaller one comes to as well
def test_the_fraction_to_trust_is_reached_and_made_of_the_small_losses(fraction):
    batches = mixture(1500, right=0.05)
    weights, lam, reached = follow(trust_fraction(fraction), batches)
    assert reached == pytest.approx(0.6, abs=0.015)
    assert weights[:100].mean() < 0.03  # of wrong labels
    assert weights[100:].mean() == pytest.approx(fraction / 0.6, abs=0.02)  # at the right fraction that of SGD
    assert lam[0] == -np.finfo(np.float32).max
    assert lam[1] == pytest.approx(-10 * batches[0].mean(), rel=1e-5)
    assert (lam < 0).all()
    assert (lam[2:] / lam[1:-1] > 0.97).all()  # it comes down slowly


@pytest.mark.parametrize(("fraction", "right"), [(0.6, 4.0), (0.4, 4.0), (0.6, 1.0), (0.9, 4.0), (0.8, 4.0)])
def test_trust_waits_for_losses_to_become_small(fraction, right):
    """What λ is then solves an equation: an example with no loss would weigh φ^(-1/2) or φ e^(3/4), and no more."""
    losses = mixture(1, right=right)[0].astype(float)
    weights, lam, reached = follow(trust_fraction(fraction), np.float32([losses] * 1500))
    weight_without_loss = lambda lam: fraction / np.mean(np.exp(losses / lam))  # noqa: E731
    largest = max(fraction**-0.5, fraction * math.exp(0.75))
    expected = brentq(lambda lam: weight_without_loss(lam) - largest, -1e4, -1e-1)
    np.testing.assert_allclose(lam[-1], expected, rtol=1e-4)
    np.testing.assert_allclose(weights, np.exp(losses / expected) * weight_without_loss(expected), rtol=1e-3)
    assert reached > 1.01 * fraction


def test_a_large_fraction_does_not_wait_for_small_losses():
    _, _, reached = follow(trust_fraction(0.9), mixture(1500, hard=0.2))
    assert reached == pytest.approx(0.9, abs=0.015)


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_the_fraction_to_focus_on_is_reached_and_made_of_the_large_losses(fraction):
    weights, lam, reached = follow(focus_fraction(fraction), mixture(600, hard=0.3))
    assert reached == pytest.approx(fraction, abs=0.02)
    assert weights[:75].sum() / weights.sum() > 0.95
    assert (lam > 0).all()


def test_a_fraction_is_free_of_the_unit_of_loss():
    ends = [follow(trust_fraction(0.6), mixture(300, scale=scale)) for scale in (1.0, 1024.0)]
    np.testing.assert_allclose(ends[1][0], ends[0][0], rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(ends[1][1][1:], 1024 * ends[0][1][1:], rtol=2e-4)


def test_losses_of_zero_leave_a_fraction_at_infinity_until_there_is_a_scale():
    weighting = absgd_jax.weight_by_absgd(trust_fraction(0.6))
    weights, state = weighting.update(jnp.zeros(8), weighting.init())
    np.testing.assert_array_equal(weights, 1)
    assert state.temperature == -np.finfo(np.float32).max
    _, state = weighting.update(jnp.ones(8), state)
    assert state.temperature == -10


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    ("fraction", "steps"), [(0.05, 154), (0.3, 154), (0.5, 154), (0.6, 154), (0.7, 216), (0.9, 729)]
)
def test_lambda_takes_its_time_to_come_down(fraction, steps, traced):
    def tenth(fraction):
        """Steps of weights that stay even until λ is a tenth of its start."""
        state = absgd_jax.weight_by_absgd(10.0).init()
        after = focus_fraction(fraction).at(state._replace(temperature=jnp.float32(10)), jnp.float32(0))
        return jnp.ceil(jnp.log(10) / jnp.log(10 / after))

    assert abs(float((jax.jit(tenth) if traced else tenth)(fraction)) - steps) <= 1


@pytest.mark.parametrize("make", [trust_fraction, focus_fraction])
@pytest.mark.parametrize("bad", [0, 1, -0.2, 1.5, float("nan"), np.float32(0.0)])
def test_a_fraction_outside_0_and_1_is_refused(make, bad):
    with pytest.raises(ValueError, match=r"fraction=.*between 0 and 1"):
        make(bad)


def test_a_fraction_of_less_than_an_example_is_refused():
    with pytest.raises(ValueError, match=r"fraction of 0.01\).*log\(32\).*larger fraction"):
        trust_fraction(0.01, batch_size=32)
    with pytest.raises(ValueError, match=r"log\(128\)"):
        absgd_jax.kl_radius(math.log(128), batch_size=128)
    weighting = absgd_jax.weight_by_absgd(focus_fraction(0.2))
    with pytest.raises(ValueError, match=r"log\(4\)"):
        weighting.update(jnp.ones(4), weighting.init())


@pytest.mark.parametrize("make", [kl_radius, trust_fraction])
@pytest.mark.parametrize(
    ("bad", "error"),
    [(-5, ValueError), (0, ValueError), (float("nan"), ValueError), ("128", TypeError), ([2], TypeError)],
)
def test_a_batch_size_is_a_number_of_examples(make, bad, error):
    with pytest.raises(error, match=f"batch_size={re.escape(repr(bad))}"):
        make(0.5, batch_size=bad)


@pytest.mark.parametrize("handed", [2.0, -2.0])
@pytest.mark.parametrize(
    ("rule", "start"),
    [
        (kl_radius(0.3), lambda risk: 1.0),
        (kl_radius(0.3, init=-4.0), lambda risk: -4.0),
        (trust_fraction(0.6), lambda risk: -10 * risk),
        (focus_fraction(0.5), lambda risk: 10 * risk),
    ],
)
def test_a_rule_starts_anew_from_a_temperature_of_the_other_sign(handed, rule, start):
    """A state that a fixed λ has left."""
    losses = jnp.float32([1, 2, 3, 9])
    before = absgd_jax.weight_by_absgd(handed)
    _, state = before.update(losses, before.init())
    following = absgd_jax.weight_by_absgd(rule)
    _, state = following.update(losses, state)
    expected = float(start(state.risk))
    if np.sign(expected) == np.sign(handed):  # no reason to start anew: one step from the λ that was handed over
        assert abs(np.log(state.temperature / handed)) < 0.5
    else:
        np.testing.assert_allclose(state.temperature, expected, rtol=1e-6)


def test_losses_below_zero_start_at_their_distance_from_it():
    weighting = absgd_jax.weight_by_absgd(trust_fraction(0.6))
    _, state = weighting.update(-jnp.arange(1.0, 4), weighting.init())
    np.testing.assert_allclose(state.temperature, -20)


@pytest.mark.parametrize("rule", [False, True])
def test_a_temperature_that_is_not_a_number_is_not_remembered(rule):
    """A schedule's batch without a λ is not counted; a rule's λ stays as it was, so that no batch is lost."""
    broken = 2
    lam = lambda count: jnp.where(count == broken, jnp.nan, 1.5)  # noqa: E731
    weighting = absgd_jax.weight_by_absgd(Rule(lambda state, kl: lam(state.count)) if rule else lam)
    plain = absgd_jax.weight_by_absgd(Rule(lambda state, kl: jnp.float32(1.5)) if rule else 1.5)
    state, expected = weighting.init(), plain.init()
    for step in range(5):
        losses = jnp.float32([1, 2, 3, 9]) + step
        _, state = weighting.update(losses, state)
        if rule or step != broken:
            _, expected = plain.update(losses, expected)
        np.testing.assert_allclose(state.risk, expected.risk, rtol=1e-6)
    assert state.temperature == 1.5


@pytest.mark.parametrize("mean", [1.0, 0.25])
def test_a_rule_says_what_weights_come_to_on_average(mean):
    batches = rng.exponential(size=(8, 8))
    batches[4:] += 9  # harder than the running risk, where the mean weight is held
    weighting = absgd_jax.weight_by_absgd(Rule(lambda state, kl: jnp.float32(1.5), mean_weight=mean))
    state, s = weighting.init(), 0.0
    for losses in batches:
        weights, state = weighting.update(jnp.float32(losses), state)
        tilted = np.exp(losses / 1.5)
        s = 0.1 * s + 0.9 * tilted.mean()
        expected = mean * min(tilted.mean() / s, 1) * tilted / tilted.mean()
        np.testing.assert_allclose(weights, expected, rtol=1e-5)


@pytest.mark.parametrize(("bad", "error"), [(0.0, ValueError), (-1.0, ValueError), ("1", TypeError)])
def test_a_mean_weight_is_a_positive_number(bad, error):
    with pytest.raises(error, match=f"mean_weight={bad!r}"):
        absgd_jax.scale_by_absgd(Rule(lambda state, kl: 1.0, mean_weight=bad))


def test_the_numbers_of_a_rule_may_be_traced_and_mapped():
    batches = mixture(50)
    for make, values in ((trust_fraction, (0.6, 0.8)), (kl_radius, (0.3, 0.7))):
        end = lambda value, make=make: follow(make(value), batches)[0]  # noqa: E731
        together = jax.vmap(end)(jnp.array(values))
        inits = jax.vmap(lambda init: follow(kl_radius(0.5, init=init), batches)[0])(jnp.array([2.0, -3.0]))
        for i, value in enumerate(values):
            np.testing.assert_allclose(together[i], end(value), rtol=1e-4)
            np.testing.assert_allclose(inits[i], follow(kl_radius(0.5, init=(2.0, -3.0)[i]), batches)[0], rtol=1e-4)
    rule = jax.tree.map(jnp.float32, kl_radius(0.5, init=-2.0))  # a rule is a pytree and passes through jit
    through = jax.jit(lambda rule: follow(rule, batches)[0])(rule)
    np.testing.assert_allclose(through, follow(kl_radius(0.5, init=-2.0), batches)[0], rtol=1e-5)
    check = jnp.array(2.0)  # an array passes unchecked, and is not read
    assert kl_radius(check, batch_size=2).radius is check


def test_numpy_numbers_are_checked_as_python_s_are():
    for bad in (np.float32("nan"), np.float64(-1.0), np.array(0.0)):
        with pytest.raises(ValueError, match="rho="):
            kl_radius(bad)
    for bad in (np.float32("inf"), np.int64(0)):
        with pytest.raises(ValueError, match="init="):
            kl_radius(0.5, init=bad)
    for bad in (np.float32(0), np.float64(1.5), np.array(-0.1)):
        with pytest.raises(ValueError, match="gamma="):
            absgd_jax.scale_by_absgd(1.0, bad)
    for bad in (np.float32("nan"), np.array(0), np.int32(0)):
        with pytest.raises(ValueError, match="temperature="):
            absgd_jax.scale_by_absgd(bad)
    with pytest.raises(ValueError, match=r"log\(4\)"):
        kl_radius(np.float32(2.0), batch_size=np.int64(4))


def test_a_rule_of_one_s_own_for_the_temperature_in_every_form():
    def twice_the_risk(state, kl):
        assert kl is None  # no radius: nobody has to pass kl
        return jnp.where(state.count == 0, jnp.inf, 2 * state.risk)

    optimizer, losses = absgd_jax.absgd(0.1, Rule(twice_the_risk)), jnp.float32(rng.exponential(size=(5, 8)))
    w, risk = jnp.zeros(()), None
    state = optimizer.init(w)
    f = jax.jit(absgd_jax.value_and_grad(lambda w, x: x + 0 * w))
    for t, batch in enumerate(losses):
        lam = jnp.inf if t == 0 else 2 * float(risk)
        value, grad = f(w, batch, state=state)
        np.testing.assert_allclose(value, absgd_jax.entropic_risk(batch, lam), rtol=1e-5)
        _, state = jax.jit(optimizer.update)(grad, state, w, value=value)
        risk = state[0].risk
        np.testing.assert_allclose(state[0].temperature, 2 * risk, rtol=1e-6)


def test_a_rule_of_one_s_own_for_gamma_and_one_that_reads_kl():
    losses = np.float32(rng.exponential(size=(6, 8)))
    half_life = Rule(lambda state, kl: 1 / (1 + state.count))  # the plain mean of all batches
    state = absgd_jax.weight_by_absgd(1.0, half_life).init()
    for batch in losses:
        _, state = absgd_jax.weight_by_absgd(1.0, half_life).update(batch, state)
    np.testing.assert_allclose(state.risk, np.log(np.mean(np.exp(np.float64(losses)))), rtol=1e-5)

    seen = []
    rule = Rule(lambda state, kl: 1.0 if kl is None else seen.append(kl) or 1.0, radius=0.1)
    with pytest.raises(TypeError, match="kl=kl"):
        absgd_jax.scale_by_absgd(rule).update(jnp.ones(1), absgd_jax.scale_by_absgd(rule).init(jnp.ones(1)), value=1.0)
    weighting = absgd_jax.weight_by_absgd(rule)
    weighting.update(losses[0], weighting.init())
    share = np.exp(losses[0]) / np.exp(losses[0]).sum()
    np.testing.assert_allclose(seen[0], np.sum(share * np.log(8 * share)), rtol=1e-5)


def test_a_rule_whose_value_is_not_a_scalar_is_refused():
    for rules in ((Rule(lambda state, kl: jnp.ones(2)),), (lambda count: jnp.ones(1),)):
        with pytest.raises(ValueError, match=r"temperature has shape \(.*scalar"):
            absgd_jax.scale_by_absgd(*rules).init(jnp.ones(2))
    optimizer = absgd_jax.scale_by_absgd(1.0, lambda count: jnp.ones(1))
    with pytest.raises(ValueError, match=r"gamma has shape \(1,\)"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), value=1.0)


@pytest.mark.parametrize("wide", [False, True])
def test_numbers_of_another_precision_change_no_dtype(wide):
    """Under strict promotion nothing is converted by itself, and the state may be wider than the losses."""
    losses = np.float32([1.0, 2.0, 3.0])
    radius = kl_radius(np.float64(0.5), init=np.float64(2.0), step_size=np.float64(0.1))
    with jax.enable_x64(wide), jax.numpy_dtype_promotion("strict"):
        for rule in (radius, trust_fraction(np.float64(0.6)), 2.0):
            weighting = absgd_jax.weight_by_absgd(rule, absgd_jax.adaptive_gamma(np.float64(-1.0)))
            state = weighting.init()
            for _ in range(3):
                weights, state = weighting.update(losses, state)
            assert weights.dtype == np.float32
            assert state.risk.dtype == (np.float64 if wide else np.float32)
        assert absgd_jax.attention_weights(losses, state.risk, np.float64(2.0)).dtype == np.float32


def test_a_wide_state_keeps_lambda_within_the_range_of_narrow_losses():
    losses = jnp.array([1.0, 2.0, 3.0], jnp.float32)
    with jax.enable_x64(True):
        weighting = absgd_jax.weight_by_absgd(kl_radius(0.5, init=-1.0))
        body = lambda _, state: weighting.update(0 * losses, state)[1]  # noqa: E731
        state = jax.jit(lambda state: jax.lax.fori_loop(0, 3000, body, state))(weighting.init())
        weights, _ = weighting.update(losses, state)
    assert jnp.float32(state.temperature) < 0
    np.testing.assert_allclose(absgd_jax.entropic_risk(losses, jnp.float32(state.temperature)), 1.0)
    assert np.isfinite(weights).all()
