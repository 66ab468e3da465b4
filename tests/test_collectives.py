"""Losses that communicate, parameters that devices share or split: every way of running is one device in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import absgd_jax

DEVICES, BATCH = 8, 64
rng = np.random.default_rng(0)
X, Y = rng.normal(size=(BATCH, 6)), rng.normal(size=BATCH)
A, B, EXPERTS = rng.normal(size=(6, 8)) / 2, rng.normal(size=8), rng.normal(size=(DEVICES, 6)) / 2
WEIGHTS = rng.exponential(size=BATCH)
WEIGHTS[:9] = 0  # the first device has nothing
MESH = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
INF = float("inf")
WAYS = ("check_vma", "no check_vma", "pmap", "vmap")


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def plain(p, x, y, axis):
    return (jnp.tanh(x @ p["a"]) @ p["b"] - y) ** 2


def synchronised_batch_norm(p, x, y, axis):
    h = x @ p["a"]
    mean_of = (lambda v: jnp.mean(v, 0)) if axis is None else (lambda v: jax.lax.pmean(jnp.mean(v, 0), axis))
    mean = mean_of(h)
    return (jnp.tanh((h - mean) / jnp.sqrt(mean_of((h - mean) ** 2) + 1e-3)) @ p["b"] - y) ** 2


def gathered_negatives(p, x, y, axis):
    q, me = x @ p["a"], 0 if axis is None else jax.lax.axis_index(axis)
    keys = jnp.tanh(q + p["b"])
    keys = keys if axis is None else jax.lax.all_gather(keys, axis, tiled=True)
    own = jnp.arange(len(x)) + me * len(x)
    return -jnp.take_along_axis(jax.nn.log_softmax(q @ keys.T), own[:, None], 1)[:, 0]


def gathered_parameters(p, x, y, axis):
    if axis is not None:
        p = {
            "a": jax.lax.all_gather(p["a"], axis, axis=1, tiled=True),
            "b": jax.lax.all_gather(p["b"], axis, tiled=True),
        }
    return plain(p, x, y, None)


def experts(p, x, y, axis):
    """The examples of a device go to all experts in turn, one expert a device."""
    if axis is None:
        chosen = p["experts"][jnp.arange(len(x)) % (len(x) // DEVICES) // max(len(x) // DEVICES**2, 1)]
        return (jnp.tanh(jnp.sum(x * chosen, 1)) - y) ** 2
    parts = jax.lax.all_to_all(x.reshape(DEVICES, -1, x.shape[1]), axis, 0, 0)
    out = jax.lax.all_to_all(jnp.tanh(parts @ p["experts"][0]), axis, 0, 0)
    return (out.reshape(-1) - y) ** 2


SHARED, SPLIT = ({"a": A, "b": B}, P()), ({"a": A, "b": B}, {"a": P(None, "data"), "b": P("data")})
LOSSES = {
    "plain": (plain, *SHARED),
    "synchronised BatchNorm": (synchronised_batch_norm, *SHARED),
    "gathered negatives": (gathered_negatives, *SHARED),
    "FSDP": (gathered_parameters, *SPLIT),
    "experts": (experts, {"experts": EXPERTS}, P("data")),
}


def literal(losses, lam, weights):
    """λ log Σ w exp(L/λ), written down."""
    weights = weights / jnp.sum(weights)
    return jnp.sum(weights * losses) if lam is INF else lam * jnp.log(jnp.sum(weights * jnp.exp(losses / lam)))


def truth(loss, params, lam, weights, slices):
    """Risk and gradient on one device; a loss that sees its whole batch sees a slice of it instead."""

    def risk(params):
        losses = jnp.zeros(BATCH)
        for i in range(slices):
            losses = losses.at[i::slices].set(loss(params, X[i::slices], Y[i::slices], None))
        return literal(losses, lam, weights)

    return jax.jit(jax.value_and_grad(risk))(params)


def over_devices(how, f, spec, arrays):
    """``f(params, *batch)`` with a batch of so many arrays spread over the devices, of and to whole arrays."""
    if how in ("check_vma", "no check_vma"):
        specs = {"in_specs": (spec, *[P("data")] * arrays), "out_specs": (P(), spec)}
        return jax.jit(jax.shard_map(f, mesh=MESH, check_vma=how == "check_vma", **specs))
    split_axis = {"a": 1, "b": 0, "experts": 0}
    shared = spec == P()
    options = {"axis_name": "data", "in_axes": (None if shared else 0, *[0] * arrays)}
    each = jax.pmap(f, **options) if how == "pmap" else jax.jit(jax.vmap(f, **options))

    def call(params, *batch):
        if not shared:
            params = {k: np.stack(np.split(v, DEVICES, split_axis[k])) for k, v in params.items()}
        risk, grads = each(params, *[v.reshape(DEVICES, -1, *v.shape[1:]) for v in batch])
        np.testing.assert_allclose(risk, np.broadcast_to(risk[0], DEVICES), rtol=1e-12)
        if shared:
            jax.tree.map(lambda g: np.testing.assert_allclose(g, np.broadcast_to(g[0], g.shape), rtol=1e-9), grads)
            return risk[0], jax.tree.map(lambda g: g[0], grads)
        return risk[0], {k: np.concatenate(np.asarray(v), split_axis[k]) for k, v in grads.items()}

    return call


def close(actual, expected, rtol=1e-9):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-12), actual, expected)


def test_the_truth_is_one():
    for name, (loss, params, _) in LOSSES.items():
        _, grads = truth(loss, params, -1.5, WEIGHTS, 1)
        step = jax.tree.map(lambda v: 1e-5 * np.cos(np.arange(v.size)).reshape(v.shape), params)
        ends = [truth(loss, jax.tree.map(lambda v, d: v + s * d, params, step), -1.5, WEIGHTS, 1)[0] for s in (1, -1)]  # noqa: B023
        slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: jnp.sum(g * d), grads, step)))
        np.testing.assert_allclose((ends[0] - ends[1]) / 2, slope, rtol=1e-6, err_msg=name)


# Four examples a device do not go to eight experts; how devices are spread matters little to slices.
SLICED = [
    *((name, how, 2) for name in LOSSES if name != "experts" for how in ("check_vma", "pmap")),
    ("gathered negatives", "vmap", 2),
    ("FSDP", "no check_vma", 2),
]


@pytest.mark.parametrize(("name", "how", "slices"), [*((name, how, 1) for name in LOSSES for how in WAYS), *SLICED])
def test_value_and_grad_is_one_device(name, how, slices):
    loss, params, spec = LOSSES[name]
    options = {"num_microbatches": slices, "axis_name": "data", "sharded": spec != P()}
    f = absgd_jax.value_and_grad(lambda p, x, y: loss(p, x, y, "data"), **options)
    run = lambda p, x, y, w, lam: f(p, x, y, temperature=jax.lax.pmax(lam[0], "data"), weights=w)  # noqa: E731
    spread = over_devices(how, run, spec, 4)
    for lam in (1.0, -1.5, INF):
        actual = spread(params, X, Y, WEIGHTS, np.full(BATCH, lam))
        close(actual, truth(loss, params, lam, WEIGHTS, slices))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("slices", [1, 2])
def test_parameters_that_are_sharded_over_one_axis_and_copied_over_another(slices, check_vma):
    mesh = jax.make_mesh((DEVICES // 2, 2), ("data", "copy"), axis_types=(AxisType.Auto,) * 2)
    axes, (loss, params, spec) = ("data", "copy"), LOSSES["FSDP"]
    params, spec = params | {"c": np.array(0.3)}, spec | {"c": P()}
    shifted = lambda p, x, y, axis: loss(p, x, y + p["c"], axis)  # noqa: E731
    f = absgd_jax.value_and_grad(
        lambda p, x, y: shifted(p, x, y, "data"), axis_name=axes, num_microbatches=slices, sharded=spec
    )
    specs = {"in_specs": (spec, P(axes), P(axes)), "out_specs": (P(), spec)}
    run = jax.jit(jax.shard_map(partial(f, temperature=-1.5), mesh=mesh, check_vma=check_vma, **specs))
    close(run(params, X, Y), truth(shifted, params, -1.5, np.ones(BATCH), slices))


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", LOSSES)
def test_plain_grad_of_the_risk_over_an_axis_differentiates_as_a_mean_does(name, how):
    loss, params, spec = LOSSES[name]

    def run(p, x, y, w):
        risk = lambda p: absgd_jax.entropic_risk(loss(p, x, y, "data"), 1.3, weights=w, axis_name="data")  # noqa: E731
        value, grads = jax.value_and_grad(risk)(p)
        if how != "check_vma":  # the convention there: average over the devices what all of them hold
            mean = (lambda g: jax.lax.pmean(g, "data")) if spec == P() else (lambda g: g / DEVICES)
            grads = jax.tree.map(mean, grads)
        return value, grads

    close(over_devices(how, run, spec, 3)(params, X, Y, WEIGHTS), truth(loss, params, 1.3, WEIGHTS, 1))


@pytest.mark.parametrize("how", ["check_vma", "no check_vma"])
def test_the_slopes_in_temperature_and_weights_are_those_of_the_global_batch(how):
    def run(lam, losses, weights):
        risk = lambda lam, weights: absgd_jax.entropic_risk(losses, lam, weights=weights, axis_name="data")  # noqa: E731
        slopes = jax.grad(risk, argnums=(0, 1))(lam, weights)
        return slopes if how == "check_vma" else (jax.lax.pmean(slopes[0], "data"), slopes[1] / DEVICES)

    losses, weights = rng.normal(size=BATCH) ** 2, rng.exponential(size=BATCH)
    for lam in (0.7, -2.0):
        specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": (P(), P("data"))}
        mapped = jax.jit(jax.shard_map(run, mesh=MESH, check_vma=how == "check_vma", **specs))
        expected = jax.grad(lambda lam, w: literal(losses, lam, w), argnums=(0, 1))(lam, weights)
        close(mapped(lam, losses, weights), expected, rtol=1e-8)
    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": (P(), P("data"))}
    mapped = jax.jit(jax.shard_map(run, mesh=MESH, check_vma=how == "check_vma", **specs))
    slope, slopes = mapped(INF, losses, weights)
    close((slope, slopes), (0.0, jax.grad(lambda w: jnp.sum(w * losses) / jnp.sum(w))(weights)))


@pytest.mark.parametrize("how", WAYS)
def test_the_kl_divergence_and_the_axes_that_remain(how):
    losses = rng.normal(size=(BATCH, 3)) ** 2
    run = lambda _, x: (absgd_jax.entropic_risk(x, 0.8, axis=0, axis_name="data")[1], {})  # noqa: E731
    risk, _ = over_devices(how, run, P(), 1)({}, losses)
    np.testing.assert_allclose(risk, literal(losses[:, 1], 0.8, np.ones(BATCH)), rtol=1e-12)

    def with_kl(p, x, y):
        f = absgd_jax.value_and_grad(lambda p, x, y: plain(p, x, y, "data"), with_kl=True, axis_name="data")
        (_, kl), grads = f(p, x, y, temperature=0.8)
        return kl, grads

    params, spec = SHARED
    kl, _ = over_devices(how, with_kl, spec, 2)(params, X, Y)
    tilted = jnp.exp(plain(SHARED[0], X, Y, None) / 0.8)
    share = tilted / jnp.sum(tilted)
    np.testing.assert_allclose(kl, jnp.sum(share * jnp.log(share * BATCH)), rtol=1e-10)


@pytest.mark.parametrize("slices", [1, 4])
def test_parameters_that_the_caller_made_varying_have_gradients_of_their_own(slices):
    f = absgd_jax.value_and_grad(
        lambda p, x, y: synchronised_batch_norm(p, x, y, "data"), num_microbatches=slices, axis_name="data"
    )

    def run(p, x, y):
        own = jax.tree.map(lambda v: jax.lax.pcast(v, "data", to="varying"), p)
        risk, grads = f(own, x, y, temperature=1.3)
        return risk, jax.lax.psum(grads, "data")  # as with jax.grad, their sum is the gradient

    params, spec = SHARED
    actual = over_devices("check_vma", run, spec, 2)(params, X, Y)
    close(actual, truth(synchronised_batch_norm, SHARED[0], 1.3, np.ones(BATCH), slices))


@jax.custom_vjp
def copy_back(x):
    """A psum over the model axis for code whose types do not tell: its derivative is the identity."""
    return jax.lax.psum(x, "model")


copy_back.defvjp(lambda x: (jax.lax.psum(x, "model"), None), lambda _, g: (g,))


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("check_vma", [True, False])
def test_tensor_parallelism_over_another_axis(check_vma, slices):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    total = (lambda v: jax.lax.psum(v, "model")) if check_vma else copy_back
    loss = lambda p, x, y: (total(jnp.tanh(x @ p["a"]) @ p["b"]) - y) ** 2  # noqa: E731
    f = absgd_jax.value_and_grad(loss, num_microbatches=slices, axis_name="data")
    spec = {"a": P(None, "model"), "b": P("model")}
    specs = {"in_specs": (spec, P("data"), P("data")), "out_specs": (P(), spec)}
    run = jax.shard_map(partial(f, temperature=1.3), mesh=mesh, check_vma=check_vma, **specs)
    close(jax.jit(run)(SHARED[0], X, Y), truth(plain, SHARED[0], 1.3, np.ones(BATCH), 1))


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("form", ["tensor parallel", "FSDP"])
def test_shardings_in_types_carry_over_to_micro_batches(form, slices):
    names = {"tensor parallel": ("data", "model"), "FSDP": ("data",)}[form]
    mesh = jax.make_mesh((4, 2)[: len(names)], names, axis_types=(AxisType.Explicit,) * len(names))

    def loss(p, x, y):
        if form == "FSDP":
            return plain(jax.tree.map(lambda v: jax.sharding.reshard(v, P()), p), x, y, None)
        h = jnp.tanh(jnp.matmul(x, p["a"], out_sharding=P("data", "model")))
        return (jnp.matmul(h, p["b"], out_sharding=P("data")) - y) ** 2

    with jax.set_mesh(mesh):
        specs = {"a": P(None, names[-1]), "b": P(names[-1])}
        params = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in SHARED[0].items()}
        batch = jax.device_put((X, Y), NamedSharding(mesh, P("data")))
        f = jax.jit(partial(absgd_jax.value_and_grad(loss, num_microbatches=slices), temperature=1.3))
        risk, grads = f(params, *batch)
        assert jax.tree.map(jax.typeof, grads) == jax.tree.map(jax.typeof, params)
    close((risk, grads), truth(plain, SHARED[0], 1.3, np.ones(BATCH), 1))


@pytest.mark.parametrize("slices", [1, 2])
def test_a_model_a_device_and_weights_within_a_device(slices):
    f = absgd_jax.value_and_grad(lambda p, x, y: plain(p, x, y, None), num_microbatches=slices)
    run = lambda p, x, y: jax.tree.map(lambda v: v[None], f(jax.tree.map(lambda v: v[0], p), x, y, temperature=1.3))  # noqa: E731
    models = jax.tree.map(lambda v: np.stack([v * (1 + i / 10) for i in range(DEVICES)]), SHARED[0])
    specs = {"in_specs": (P("data"), P(), P()), "out_specs": P("data")}
    actual = jax.jit(jax.shard_map(run, mesh=MESH, **specs))(models, X, Y)
    for i in range(DEVICES):
        one = jax.tree.map(lambda v: v[i], models)  # noqa: B023
        close(jax.tree.map(lambda v: v[i], actual), truth(plain, one, 1.3, np.ones(BATCH), 1))  # noqa: B023

    # Without axis_name every device weights its own examples; gradients of what is replicated are summed by JAX.
    run = lambda p, x, y: (jax.lax.psum(f(p, x, y, temperature=1.3)[0], "data"), f(p, x, y, temperature=1.3)[1])  # noqa: E731

    def summed(p):
        parts = zip(np.split(X, DEVICES), np.split(Y, DEVICES), strict=True)
        return sum(literal(plain(p, x, y, None), 1.3, jnp.ones(len(y))) for x, y in parts)

    params, spec = SHARED
    close(over_devices("check_vma", run, spec, 2)(params, X, Y), jax.value_and_grad(summed)(SHARED[0]))
