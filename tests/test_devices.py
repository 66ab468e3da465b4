"""Devices and micro-batches give the single-device update: parts are merged, not averaged."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P
from optax.microbatching import AccumulationType

import absgd_jax

DEVICES, BATCH, STEPS = 8, 64, 4
AUTO = jax.sharding.AxisType.Auto
MESH = jax.make_mesh((DEVICES,), ("data",), axis_types=(AUTO,))
GRID = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(AUTO, AUTO))
rng = np.random.default_rng(0)
X = np.float32(rng.normal(size=(STEPS, BATCH, 5)))
Y = np.float32(X @ rng.normal(size=5) + 3 * rng.normal(size=(STEPS, BATCH)))
WHERE = rng.random((STEPS, BATCH)) < np.linspace(0, 1, BATCH)  # unequal parts, the first ones empty
WHERE[:, : 2 * BATCH // DEVICES] = False


def per_example_loss(w, x, y):
    return (jnp.tanh(x @ w["a"]) * w["b"] - y) ** 2


PARAMS = {"a": jnp.linspace(-1.0, 1.0, 5), "b": jnp.float32(2.0)}
OPTIMIZERS = {
    "absgd": absgd_jax.absgd(0.01, 2.0, weight_decay=1e-3),
    "negative": absgd_jax.absgd(0.01, -2.0),
    "infinite": absgd_jax.absgd(0.01, float("inf")),
    "kl_radius": absgd_jax.absgd(0.01, absgd_jax.kl_radius(0.7, init=3.0)),
    "abadam": absgd_jax.abadam(0.01, 2.0, absgd_jax.adaptive_gamma(-1.0)),
}


def make_step(optimizer, **options):
    loss_and_grad = absgd_jax.value_and_grad(per_example_loss, with_kl=True, **options)

    def step(params, state, x, y, where):
        (risk, kl), grads = loss_and_grad(params, x, y, state=state, where=where)
        updates, state = optimizer.update(grads, state, params, value=risk, kl=kl)
        return optax.apply_updates(params, updates), state, (risk, kl)

    return step


def train(step, optimizer, masked=True):
    """Some steps; everything that came out, to be compared."""
    params, outs = PARAMS, []
    state = optimizer.init(params)
    for x, y, where in zip(X, Y, WHERE, strict=True):
        params, state, out = step(params, state, x, y, where if masked else np.ones_like(where))
        outs.append(out)
    return params, state, outs


def assert_same(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), actual, expected)


def shard_map_step(step, mesh=MESH, axes="data", **options):
    specs = {"in_specs": (P(), P(), P(axes), P(axes), P(axes)), "out_specs": P()}
    return jax.jit(jax.shard_map(step, mesh=mesh, **specs, **options))


@pytest.fixture(params=["negative", "kl_radius"], scope="module")
def optimizer(request):
    return OPTIMIZERS[request.param]


@pytest.fixture(scope="module")
def alone(optimizer):
    return train(jax.jit(make_step(optimizer)), optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, indirect=True)
def test_every_optimizer_over_devices_and_micro_batches(optimizer, alone):
    step = shard_map_step(make_step(optimizer, axis_name="data", num_microbatches=4))
    assert_same(train(step, optimizer), alone)


@pytest.mark.parametrize(("microbatches", "check_vma"), [(1, True), (4, False)])
def test_shard_map_is_the_single_device_update(optimizer, alone, microbatches, check_vma):
    step = shard_map_step(make_step(optimizer, axis_name="data", num_microbatches=microbatches), check_vma=check_vma)
    assert_same(train(step, optimizer), alone)


def test_two_mesh_axes_merge_over_both(optimizer, alone):
    axes = ("rows", "columns")
    assert_same(train(shard_map_step(make_step(optimizer, axis_name=axes), GRID, axes), optimizer), alone)


def test_pmap_is_the_single_device_update(optimizer, alone):
    step = jax.pmap(make_step(optimizer, axis_name="data"), axis_name="data", in_axes=(None, None, 0, 0, 0))

    def split_step(params, state, *batch):
        out = step(params, state, *(x.reshape(DEVICES, BATCH // DEVICES, *x.shape[1:]) for x in batch))
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape)), out)  # replicated
        return jax.tree.map(lambda x: x[0], out)

    assert_same(train(split_step, optimizer), alone)


def test_sharded_arrays_need_nothing(optimizer, alone):
    step, rows = jax.jit(make_step(optimizer)), NamedSharding(MESH, P("data"))
    sharded = lambda params, state, *batch: step(params, state, *jax.device_put(batch, rows))  # noqa: E731
    assert_same(train(sharded, optimizer), alone)


@pytest.mark.parametrize("microbatches", [2, 64])
def test_every_split_into_micro_batches_is_the_full_batch(optimizer, alone, microbatches):
    assert_same(train(jax.jit(make_step(optimizer, num_microbatches=microbatches)), optimizer), alone)


def test_micro_batches_of_a_sharded_batch(optimizer, alone):
    step = jax.jit(make_step(optimizer, num_microbatches=4))
    rows = NamedSharding(MESH, P("data"))
    sharded = lambda params, state, *batch: step(params, state, *jax.device_put(batch, rows))  # noqa: E731
    assert_same(train(sharded, optimizer), alone)


def test_slices_that_explicit_sharding_cannot_spread_are_refused():
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    x, y = jax.device_put((X[0], Y[0]), NamedSharding(mesh, P("data")))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    risk = absgd_jax.value_and_grad(per_example_loss)(PARAMS, X[0], Y[0], temperature=1.5)[0]
    with jax.set_mesh(mesh):
        f = absgd_jax.value_and_grad(per_example_loss, num_microbatches=BATCH // DEVICES)
        np.testing.assert_allclose(jax.jit(f)(params, x, y, temperature=1.5)[0], risk, rtol=1e-5)
        f = absgd_jax.value_and_grad(per_example_loss, num_microbatches=2 * BATCH // DEVICES)
        with pytest.raises(
            ValueError, match=f"slices of {DEVICES // 2} examples, which {DEVICES} devices do not divide"
        ):
            f(params, x, y, temperature=1.5)


def test_merge_risks_over_an_axis_is_the_merge_of_the_array():
    risks, weights = np.float32(rng.exponential(size=DEVICES)), np.float32(rng.exponential(size=DEVICES))
    weights[2] = 0

    def merge(risk, weight):
        risk, share = absgd_jax.merge_risks(risk[0], 0.5, weights=weight[0], axis_name="data")
        return risk, share[None]

    mapped = jax.shard_map(merge, mesh=MESH, in_specs=P("data"), out_specs=(P(), P("data")))
    assert_same(jax.jit(mapped)(risks, weights), absgd_jax.merge_risks(risks, 0.5, weights=weights))


@pytest.mark.parametrize("temperature", [0.7, float("inf"), absgd_jax.kl_radius(0.7)])
def test_the_loss_level_weights_over_an_axis(temperature):
    weighting = absgd_jax.weight_by_absgd(temperature)
    losses, state = np.float32(rng.exponential(size=BATCH)), weighting.init()
    update = lambda x, s, w: weighting.update(x, s, where=w, axis_name="data")  # noqa: E731
    specs = {"in_specs": (P("data"), P(), P("data")), "out_specs": (P("data"), P())}
    mapped = jax.jit(jax.shard_map(update, mesh=MESH, **specs))
    assert_same(mapped(losses, state, WHERE[0]), weighting.update(losses, state, where=WHERE[0]))


def test_the_loss_level_objective_over_an_axis_has_the_gradient_of_one_device():
    weighting, x = absgd_jax.weight_by_absgd(0.7), np.float32(rng.exponential(size=BATCH))

    def objective(w, x, kept, axis=None):
        weights, _ = weighting.update(w * x, weighting.init(), where=kept, axis_name=axis)
        total, count = jnp.sum(weights * w * x), jnp.sum(kept)
        return total / count if axis is None else jax.lax.psum(total, axis) / jax.lax.psum(count, axis)

    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P()}
    mapped = jax.shard_map(jax.grad(lambda *args: objective(*args, "data")), mesh=MESH, **specs)
    expected = jax.grad(objective)(1.3, x, WHERE[0])
    np.testing.assert_allclose(jax.jit(mapped)(1.3, x, WHERE[0]), expected, rtol=1e-5)
    # The same by hand, in float64.
    p = np.exp(1.3 * np.float64(x) / 0.7) * WHERE[0]
    np.testing.assert_allclose(expected, np.sum(p / p.sum() * x) / 0.9, rtol=1e-5)


def test_the_loss_level_weights_counts_the_global_batch_against_the_radius():
    weighting = absgd_jax.weight_by_absgd(absgd_jax.kl_radius(3.0))
    update = lambda x, s: weighting.update(x, s, axis_name="data")[0]  # noqa: E731
    mapped = jax.shard_map(update, mesh=MESH, in_specs=(P("data"), P()), out_specs=P("data"))
    jax.eval_shape(mapped, jnp.ones(64), weighting.init())  # log 64 > 3
    with pytest.raises(ValueError, match=r"log\(16\)"):
        jax.eval_shape(mapped, jnp.ones(16), weighting.init())


@pytest.mark.parametrize("microbatches", [1, 4])
def test_devices_meet_once_a_micro_batch_and_once_for_the_gradients(microbatches):
    optimizer = OPTIMIZERS["absgd"]
    step = shard_map_step(make_step(optimizer, axis_name="data", num_microbatches=microbatches))
    compiled = step.lower(PARAMS, optimizer.init(PARAMS), X[0], Y[0], WHERE[0]).compile().as_text()
    assert collectives_in(compiled) == ["all-reduce"] * 2  # the first one in the loop over the micro-batches, if any
    lines = [line for line in compiled.splitlines() if " all-reduce" in line]
    assert sum(f"f32[{DEVICES},3]" in line for line in lines) == 1
    in_loop = [line for line in lines if "while" in line]
    assert len(in_loop) == (microbatches > 1)


def collectives_in(compiled):
    return re.findall(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(", compiled)


@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_sharded_batch_stays_where_it_is(microbatches):
    loss_and_grad = absgd_jax.value_and_grad(per_example_loss, num_microbatches=microbatches)
    x, y = jax.device_put((X[0], Y[0]), NamedSharding(MESH, P("data")))
    params = jax.device_put(PARAMS, NamedSharding(MESH, P()))
    compiled = jax.jit(loss_and_grad).lower(params, x, y, temperature=jnp.float32(1.0)).compile().as_text()
    assert set(collectives_in(compiled)) == {"all-reduce"}


def test_memory_falls_with_the_micro_batch():
    def wide(w, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ w) @ w.T) ** 2, axis=-1)

    w, x = jnp.ones((32, 512)), jnp.ones((1024, 32))
    sizes = []
    for k in (1, 4, 16):
        f = partial(absgd_jax.value_and_grad(wide, num_microbatches=k), temperature=1.0)
        sizes.append(jax.jit(f).lower(w, x).compile().memory_analysis().temp_size_in_bytes)
    assert sizes[0] > 2.5 * sizes[1] > 4 * sizes[2]


def test_sharded_parameters_stay_sharded():
    sharding = NamedSharding(MESH, P("data"))
    optimizer = OPTIMIZERS["absgd"]
    params = jax.device_put({"a": jnp.ones(16)}, sharding)
    state = jax.jit(optimizer.init)(params)
    updates, new = jax.jit(optimizer.update)(params, state, params, value=jnp.float32(1.0))
    assert updates["a"].sharding.is_equivalent_to(sharding, 1)
    assert all(leaf.sharding.is_fully_replicated for leaf in new[0])


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_whole_step_keeps_the_sharding_of_its_parameters(microbatches):
    def wide_loss(w, x, y):
        return (jnp.tanh(x @ w["a"]) @ w["b"] - y) ** 2

    optimizer = absgd_jax.absgd(0.01, 50.0)
    loss_and_grad = absgd_jax.value_and_grad(wide_loss, num_microbatches=microbatches)

    @jax.jit
    def step(params, state, x, y):
        risk, grads = loss_and_grad(params, x, y, state=state)
        updates, state = optimizer.update(grads, state, params, value=risk)
        return optax.apply_updates(params, updates), state

    params = {"a": jnp.linspace(-1, 1, 5 * 16).reshape(5, 16), "b": jnp.linspace(1, -1, 16)}
    alone = step(params, optimizer.init(params), X[0], Y[0])
    shardings = {"a": NamedSharding(MESH, P(None, "data")), "b": NamedSharding(MESH, P("data"))}
    params, batch = jax.device_put(params, shardings), jax.device_put((X[0], Y[0]), NamedSharding(MESH, P("data")))
    actual = step(params, optimizer.init(params), *batch)
    assert_same(actual, alone)
    for tree in (actual[0], optax.tree.get(actual[1], "trace")):
        assert all(leaf.sharding.is_equivalent_to(shardings[name], leaf.ndim) for name, leaf in tree.items())
    assert all(leaf.sharding.is_fully_replicated for leaf in actual[1][0])


@pytest.mark.parametrize("microbatches", [1, 2])
def test_shardings_in_types_are_understood(microbatches):
    mesh, optimizer = (
        jax.make_mesh((DEVICES,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,)),
        OPTIMIZERS["absgd"],
    )
    alone = jax.jit(make_step(optimizer))(PARAMS, optimizer.init(PARAMS), X[0], Y[0], WHERE[0])
    with jax.set_mesh(mesh):
        batch = jax.device_put((X[0], Y[0], WHERE[0]), NamedSharding(mesh, P("x")))
        params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
        state = optimizer.init(params)
        actual = jax.jit(make_step(optimizer, num_microbatches=microbatches))(params, state, *batch)
        assert jax.tree.map(jax.typeof, actual[:2]) == jax.tree.map(jax.typeof, (params, state))
    assert_same(actual, alone)


def test_two_losses_whose_type_is_sharded_are_a_batch():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        losses = jax.device_put(jnp.array([1.0, 2.0]), NamedSharding(mesh, P("x")))
        risk, shares = jax.jit(jax.value_and_grad(absgd_jax.entropic_risk))(losses, 1.0)
    np.testing.assert_allclose(risk, np.log((np.e + np.e**2) / 2), rtol=1e-6)
    np.testing.assert_allclose(shares, [1 / (1 + np.e), np.e / (1 + np.e)], rtol=1e-6)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_batch_masked_on_every_device_changes_nothing(microbatches):
    optimizer = absgd_jax.scale_by_absgd(absgd_jax.kl_radius(0.7))
    step = shard_map_step(make_step(optimizer, axis_name="data", num_microbatches=microbatches))
    _, before, _ = step(PARAMS, optimizer.init(PARAMS), X[0], Y[0], WHERE[0])
    params, after, _ = step(PARAMS, before, X[1], Y[1], np.zeros(BATCH, bool))
    jax.tree.map(np.testing.assert_array_equal, (params, after), (PARAMS, before._replace(count=2)))


def test_aux_of_the_devices_is_their_own_and_in_order():
    options = {"has_aux": True, "num_microbatches": 4, "aux_accumulator": AccumulationType.CONCAT}
    f = absgd_jax.value_and_grad(lambda w, x, y: (per_example_loss(w, x, y), x), axis_name="data", **options)
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P("data")}
    mapped = jax.shard_map(lambda w, x, y: f(w, x, y, temperature=1.0)[0][1], mesh=MESH, **specs)
    np.testing.assert_array_equal(jax.jit(mapped)(PARAMS, X[0], Y[0]), X[0])


def test_gradients_of_half_precision_parameters_are_accumulated_in_float32():
    x = np.repeat([1.0, 2.0], 128)  # in bfloat16 a running mean would stop short of 1.5: the last steps are too small
    f = absgd_jax.value_and_grad(lambda w, x: w * x, num_microbatches=256)
    _, grad = jax.jit(f)(jnp.bfloat16(1.0), jnp.bfloat16(x), temperature=float("inf"))
    assert grad.dtype == jnp.bfloat16
    assert grad == 1.5


@pytest.mark.parametrize(
    ("options", "call", "error", "message"),
    [
        (
            {"num_microbatches": 3},
            lambda f: f(PARAMS, X[0], Y[0], temperature=1.0),
            ValueError,
            "3 does not divide.* 64",
        ),
        (
            {"num_microbatches": 2},
            lambda f: f(PARAMS, X[0], Y[0][:32], temperature=1.0),
            ValueError,
            "first axes 32, 64",
        ),
        ({"num_microbatches": 2}, lambda f: f(PARAMS, X[0], 1.0, temperature=1.0), ValueError, "none"),
        ({}, lambda f: f(PARAMS, X[0], Y[0]), TypeError, "temperature=λ"),
        (
            {},
            lambda f: f(PARAMS, X[0], Y[0], state=optax.sgd(0.1).init(PARAMS)),
            ValueError,
            "Found 0 .* temperature=λ",
        ),
    ],
)
def test_bad_calls_are_refused(options, call, error, message):
    with pytest.raises(error, match=message):
        call(absgd_jax.value_and_grad(per_example_loss, **options))


@pytest.mark.parametrize("k", [1, 2])
def test_shard_map_over_some_axes_leaves_the_others_to_the_compiler(k):
    state = absgd_jax.absgd(0.01, 2.0).init(PARAMS)
    alone = absgd_jax.value_and_grad(per_example_loss)(PARAMS, X[0], Y[0], state=state)
    f = absgd_jax.value_and_grad(per_example_loss, axis_name="rows", num_microbatches=k)
    over = jax.shard_map(
        lambda w, x, y: f(w, x, y, state=state), mesh=GRID, in_specs=(P(), P("rows"), P("rows")), out_specs=P(),
        axis_names={"rows"},
    )  # fmt: skip
    assert_same(jax.jit(over)(PARAMS, X[0], Y[0]), alone)


def test_a_list_of_weights_and_of_axes_is_one():
    listed = {"weights": [1.0, 2.0] * (BATCH // 2), "where": [True] * BATCH}
    arrays = {name: np.array(values) for name, values in listed.items()}
    found = [
        absgd_jax.value_and_grad(per_example_loss, num_microbatches=k)(PARAMS, X[0], Y[0], temperature=1.0, **options)
        for k in (1, 2)
        for options in (listed, arrays)
    ]
    for other in found[1:]:
        assert_same(other, found[0])
    parts = X[0].reshape(DEVICES, -1, 5), Y[0].reshape(DEVICES, -1)
    for axes in ("d", ["d"]):
        f = absgd_jax.value_and_grad(per_example_loss, axis_name=axes)
        run = jax.vmap(lambda x, y, f=f: f(PARAMS, x, y, temperature=1.0), axis_name="d")
        risk, _ = run(*parts)
        np.testing.assert_allclose(risk, absgd_jax.entropic_risk(per_example_loss(PARAMS, X[0], Y[0]), 1.0), rtol=1e-6)
