"""Weights within groups: Algorithm 1 for each group on its own, in plain exponentials, on one device and on many."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import absgd_jax

GROUPS, STEPS, BATCH = 4, 6, 24
rng = np.random.default_rng(0)
# The last group is in every other batch only, the one before it has a single example in some.
SIZES = ((14, 7, 1, 2), (12, 9, 3, 0)) * (STEPS // 2)
MEMBERS = np.stack([rng.permutation(np.repeat(np.arange(GROUPS), sizes)) for sizes in SIZES])
LOSSES = rng.exponential(size=(STEPS, BATCH)) * (1 + MEMBERS)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def make(temperature, gamma=0.3, **options):
    return absgd_jax.within_groups(absgd_jax.weight_by_absgd(temperature, gamma, **options), GROUPS)


def run(weighting, losses=LOSSES, groups=MEMBERS, **options):
    update, state, weights = jax.jit(weighting.update), weighting.init(), []
    for t in range(STEPS):
        batch = {name: values[t] for name, values in options.items()}
        of_batch, state = update(losses[t], state, groups[t], **batch)
        weights.append(of_batch)
    return np.array(weights), state


def transcription(losses, groups, where, *, temperature, gamma, bias_correction):
    """The paper's s and p̃ = exp(L/λ)/s for each group; what the mask leaves out has the weight 0."""
    s, mass, weights = np.zeros(GROUPS), np.zeros(GROUPS), np.zeros(losses.shape)
    for t, k in np.ndindex(STEPS, GROUPS):
        own = (groups[t] == k) & where[t]
        if own.any():
            tilted = np.exp(losses[t, own] / temperature)
            s[k] = (1 - gamma) * s[k] + gamma * tilted.mean()
            mass[k] = (1 - gamma) * mass[k] + gamma
            weights[t, own] = tilted / s[k] * (mass[k] if bias_correction else 1)
    return weights, temperature * np.log(s / mass)


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [-0.5, 0.8])
def test_each_group_has_an_algorithm_of_its_own(temperature, masked, bias_correction):
    where = rng.random(LOSSES.shape) < 0.7 if masked else np.ones(LOSSES.shape, bool)
    rules = {"temperature": temperature, "gamma": 0.3, "bias_correction": bias_correction}
    expected, risks = transcription(LOSSES, MEMBERS, where, **rules)
    broken = np.where(where, LOSSES, np.nan)
    weights, state = run(make(**rules), broken, **({"where": where} if masked else {}))
    np.testing.assert_allclose(weights, expected, rtol=1e-9)
    np.testing.assert_allclose(state.risk, risks, rtol=1e-9)


def test_every_group_keeps_its_weight():
    """With γ = 1 exactly so; under a common risk groups gain and lose."""
    weights, _ = run(make(-0.5, 1.0))
    common = absgd_jax.weight_by_absgd(-0.5, 1.0)
    for losses, groups, of_batch in zip(LOSSES, MEMBERS, weights, strict=True):
        plain, present = common.update(losses, common.init())[0], np.unique(groups)
        means, others = ([float(w[groups == k].mean()) for k in present] for w in (of_batch, plain))
        np.testing.assert_allclose(means, 1, rtol=1e-9)
        assert np.abs(np.array(others) - 1).max() > 0.3


def test_one_group_is_the_weighting_itself():
    weighting = absgd_jax.weight_by_absgd(absgd_jax.kl_radius(0.3, init=2.0), max_weight=3.0)
    state, one = weighting.init(), absgd_jax.within_groups(weighting, 1)
    states = one.init()
    for losses in LOSSES:
        expected, state = weighting.update(losses, state)
        weights, states = one.update(losses, states, np.zeros(BATCH, int))
        np.testing.assert_allclose(weights, expected, rtol=1e-9)
    assert float(state.temperature) != 2.0
    for actual, expected in zip(states, state, strict=True):
        np.testing.assert_allclose(actual, [expected], rtol=1e-9)


def test_schedules_count_all_batches():
    """Also those in which a group has no examples: λ is the same for all groups."""
    _, state = run(make(optax.linear_schedule(5.0, 1.0, STEPS)))
    np.testing.assert_array_equal(state.count, STEPS)
    np.testing.assert_allclose(state.temperature, 1.0)


def test_without_a_temperature_it_is_sgd():
    np.testing.assert_array_equal(run(make(float("inf")))[0], 1)


def test_bounded_weights():
    """A group's first batch is taken by SGD; then a loss is compared with the group's mean in it, and bounded."""
    temperature, bound = 0.5, 1.5
    weights, _ = run(make(temperature, 1.0, max_weight=bound))
    np.testing.assert_array_equal(weights[0], 1)
    reached = 0
    for k in range(3):  # which are in both of the first two batches
        first, own = MEMBERS[0] == k, MEMBERS[1] == k
        tilted = np.exp((LOSSES[1, own] - LOSSES[0, first].mean()) / temperature)
        reached += np.sum(tilted > bound)
        tilted = np.minimum(tilted, bound)
        np.testing.assert_allclose(weights[1, own], tilted / tilted.mean(), rtol=1e-9)
    assert reached > 3


@pytest.mark.parametrize("way", ["shard_map", "vmap"])
def test_over_devices(way):
    """Eight devices with three examples each, so that no device has all groups; one of them has nothing."""
    weighting = make(-0.5)
    where = np.ones(BATCH, bool)
    where[:3] = False
    update = partial(weighting.update, axis_name="data")
    step = lambda losses, state, groups, where: update(losses, state, groups, where=where)  # noqa: E731
    if way == "vmap":
        over = jax.vmap(step, in_axes=(0, None, 0, 0), out_axes=(0, None), axis_name="data")
        cut = lambda x: x.reshape(8, 3)  # noqa: E731
    else:
        mesh, split = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), P("data")
        over = jax.shard_map(step, mesh=mesh, in_specs=(split, P(), split, split), out_specs=(split, P()))
        cut = lambda x: x  # noqa: E731
    state = alone = weighting.init()
    for losses, groups in zip(LOSSES, MEMBERS, strict=True):
        weights, state = jax.jit(over)(cut(losses), state, cut(groups), cut(where))
        expected, alone = weighting.update(losses, alone, groups, where=where)
        np.testing.assert_allclose(np.reshape(weights, -1), expected, rtol=1e-9)
    np.testing.assert_allclose(state.risk, alone.risk, rtol=1e-9)


def test_the_sequences_of_a_group():
    """Losses (B, T): a group for each sequence, or for each token."""
    weighting, losses, groups = make(-0.5), LOSSES[0].reshape(8, 3), np.arange(8) % GROUPS
    whole, state = weighting.update(losses, weighting.init(), groups)
    flat, after = weighting.update(losses.ravel(), weighting.init(), np.repeat(groups, 3))
    np.testing.assert_allclose(whole, flat.reshape(8, 3), rtol=1e-9)
    np.testing.assert_allclose(state.risk, after.risk, rtol=1e-9)
    tokens, _ = weighting.update(losses, weighting.init(), np.repeat(groups, 3).reshape(8, 3))
    np.testing.assert_allclose(tokens, whole, rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int64])
def test_groups_of_any_integers(dtype):
    expected, _ = run(make(-0.5))
    np.testing.assert_array_equal(run(make(-0.5), groups=MEMBERS.astype(dtype))[0], expected)


def test_a_group_beyond_32_bits_is_unknown():
    weighting = absgd_jax.within_groups(absgd_jax.weight_by_absgd(-0.5), 2)
    weights, _ = jax.jit(weighting.update)(jnp.ones(3), weighting.init(), np.array([0, 1, 2**32]))
    np.testing.assert_array_equal(jnp.isnan(weights), [False, False, True])


def test_a_broken_group_breaks_no_other_and_what_is_left_out_weighs_nothing():
    losses, groups = jnp.array([1.0, 2.0, 3.0, jnp.nan]), jnp.array([0, 0, 1, 1])
    update, state = jax.jit(make(-0.5).update), make(-0.5).init()
    alone, _ = update(losses[:2], state, groups[:2])
    weights, _ = update(losses, state, groups)
    np.testing.assert_array_equal(weights, [*alone, np.nan, np.nan])
    masked, _ = update(losses, state, groups, where=jnp.array([True, True, False, True]))
    np.testing.assert_array_equal(masked, [*alone, 0, np.nan])


def test_a_state_of_groups_is_no_state_of_one():
    weighting = absgd_jax.weight_by_absgd(-0.5)
    with pytest.raises(ValueError, match=r"risk has shape \(4,\), a scalar is needed"):
        weighting.update(jnp.arange(4.0), absgd_jax.within_groups(weighting, 4).init())


def test_more_groups_than_their_dtype_has_numbers():
    weighting = absgd_jax.within_groups(absgd_jax.weight_by_absgd(-0.5), 300)
    weights, _ = weighting.update(LOSSES[0], weighting.init(), MEMBERS[0].astype(np.uint8))
    expected, _ = make(-0.5, 0.9).update(LOSSES[0], make(-0.5, 0.9).init(), MEMBERS[0])
    np.testing.assert_allclose(weights, expected, rtol=1e-9)


@pytest.mark.parametrize("unknown", [-1, GROUPS, 255])
def test_an_unknown_group_is_seen(unknown):
    """Its weight is NaN, as the loss of a label that does not exist; the state and the others do not change."""
    weighting, groups = make(-0.5), np.where(np.arange(BATCH) < 2, unknown, MEMBERS[0])
    weights, state = weighting.update(LOSSES[0], weighting.init(), groups)
    assert np.isnan(weights[:2]).all()
    masked, after = weighting.update(LOSSES[0], weighting.init(), groups, where=np.arange(BATCH) >= 2)
    np.testing.assert_array_equal(masked[:2], 0)
    np.testing.assert_array_equal(weights[2:], masked[2:])
    np.testing.assert_array_equal(state.risk, after.risk)


@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_broken_loss_does_not_poison_the_state(broken):
    weighting, losses = make(-0.5), LOSSES.copy()
    losses[0, MEMBERS[0] == 1] = broken
    _, state = weighting.update(losses[0], weighting.init(), MEMBERS[0])
    _, healthy = weighting.update(LOSSES[0], weighting.init(), MEMBERS[0])
    np.testing.assert_array_equal(state.mass, np.where(np.arange(GROUPS) == 1, 0, healthy.mass))
    np.testing.assert_array_equal(state.risk, np.where(np.arange(GROUPS) == 1, 0, healthy.risk))


def test_nothing_recompiles_and_the_state_is_donated():
    weighting, traces = make(-0.5), []

    def update(losses, state, groups):
        traces.append(losses)
        return weighting.update(losses, state, groups)

    jitted, state = jax.jit(update, donate_argnums=1), weighting.init()
    for losses, groups in zip(LOSSES, MEMBERS, strict=True):
        before, (_, state) = state, jitted(losses, state, groups)
        assert before.risk.is_deleted()
    assert len(traces) == 1


@pytest.mark.parametrize("number", [0, -1])
def test_there_is_at_least_one_group(number):
    with pytest.raises(ValueError, match=f"num_groups={number}: there has to be at least one"):
        absgd_jax.within_groups(absgd_jax.weight_by_absgd(1.0), number)


@pytest.mark.parametrize("number", [2.0, "2", None])
def test_the_number_of_groups_is_an_integer(number):
    with pytest.raises(TypeError, match="integer"):
        absgd_jax.within_groups(absgd_jax.weight_by_absgd(1.0), number)


def test_refused_input():
    weighting = make(-0.5)
    losses, groups, state = LOSSES[0], MEMBERS[0], weighting.init()
    with pytest.raises(TypeError, match="groups have dtype float64: give integers from 0 to 3"):
        weighting.update(losses, state, groups.astype(float))
    with pytest.raises(TypeError, match="groups have dtype bool"):
        weighting.update(losses, state, groups > 1)
    with pytest.raises(ValueError, match=r"groups has shape \(23,\), the losses have \(24,\)"):
        weighting.update(losses, state, groups[:23])
    with pytest.raises(TypeError, match="where has dtype float64"):
        weighting.update(losses, state, groups, where=np.ones(BATCH))
    with pytest.raises(ValueError, match=r"risk has shape \(\), that of 4 groups has \(4,\)"):
        weighting.update(losses, absgd_jax.weight_by_absgd(-0.5).init(), groups)
