"""What goes into value_and_grad and what comes out: keywords, aux and keys of micro-batches, models with state."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn, nnx
from optax.microbatching import AccumulationType

import absgd_jax

CONCAT, MEAN, SUM = AccumulationType.CONCAT, AccumulationType.MEAN, AccumulationType.SUM
B, LAM = 12, 0.8
rng = np.random.default_rng(0)
X, Y = np.float32(rng.normal(size=(B, 4))), np.float32(rng.normal(size=B))
W = np.float32(rng.normal(size=4))


def literal(losses, lam, weights=None):
    losses = np.float64(losses)
    weights = np.ones_like(losses) if weights is None else weights
    return lam * np.log(np.sum(weights * np.exp(losses / lam)) / np.sum(weights))


def square(w, x, y):
    return (x @ w - y) ** 2


@pytest.mark.parametrize("name", ["temperature", "state", "where", "weights"])
def test_keywords_that_the_loss_has_itself_are_the_loss_s(name):
    seen = []

    def loss(w, x, y, **kwargs):
        seen.append(kwargs[name])
        return square(w, x, y)

    exec(f"def own(w, x, y, *, {name}): return loss(w, x, y, {name}={name})", scope := {"loss": loss})
    optimizer = absgd_jax.absgd(0.1, LAM)
    lam = {"temperature": LAM} if name == "state" else {"state": optimizer.init(W)}
    for function in (scope["own"], jax.jit(scope["own"]), partial(scope["own"])):
        risk, _ = absgd_jax.value_and_grad(function)(W, X, Y, **lam, **{name: 0.07})
        np.testing.assert_allclose(risk, literal(square(W, X, Y), LAM), rtol=1e-5)
    assert seen[0] == pytest.approx(0.07)
    if name in ("temperature", "state"):
        other = {"temperature": "state", "state": "temperature"}[name]
        with pytest.raises(TypeError, match=f"has a parameter '{name}' of its own"):
            absgd_jax.value_and_grad(scope["own"])(W, X, Y, **{name: 1.0, other: None})


def test_a_loss_without_a_signature_and_one_that_takes_anything():
    risk, _ = absgd_jax.value_and_grad(lambda w, *x, **kwargs: square(w, *x) + len(kwargs))(
        W, X, Y, temperature=LAM, shift=1
    )
    np.testing.assert_allclose(risk, literal(square(W, X, Y) + 1, LAM), rtol=1e-5)

    class NoSignature:
        __signature__ = "none"

        def __call__(self, w, x, y):
            return square(w, x, y)

    risk, _ = absgd_jax.value_and_grad(NoSignature())(W, X, Y, temperature=LAM)
    np.testing.assert_allclose(risk, literal(square(W, X, Y), LAM), rtol=1e-5)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (lambda losses: {"a": losses}, TypeError, "returned a dict, one array of losses is needed: add several"),
        (lambda losses: [losses], TypeError, "returned a list"),
        (lambda losses: (losses, losses), TypeError, "returned a tuple.*has_aux=True"),
        (jnp.mean, ValueError, "returned a scalar.*leave out the mean"),
        (lambda losses: 1.0, ValueError, "returned a scalar"),
        (lambda losses: None, TypeError, "returned a NoneType"),
    ],
)
def test_what_is_no_array_of_losses_is_named(out, error, message):
    with pytest.raises(error, match=message):
        absgd_jax.value_and_grad(lambda w, x, y: out(square(w, x, y)))(W, X, Y, temperature=1.0)


@pytest.mark.parametrize("out", [lambda losses: losses, lambda losses: (losses, 1, 2), lambda losses: {"a": 1}])
def test_aux_that_is_missing_is_named(out):
    with pytest.raises(TypeError, match=r"returned a .*with has_aux=True return \(losses, aux\)"):
        absgd_jax.value_and_grad(lambda w, x, y: out(square(w, x, y)), has_aux=True)(W, X, Y, temperature=1.0)


def with_aux(w, x, y):
    losses = square(w, x, y)
    return losses, {"losses": losses, "statistics": {"mean": jnp.mean(x, 0)}, "count": jnp.float32(len(x))}


@pytest.mark.parametrize("mean", [MEAN, AccumulationType.RUNNING_MEAN])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_aux_leaves_micro_batches_as_it_is_told(k, mean):
    how = {"losses": CONCAT, "statistics": mean, "count": SUM}
    f = absgd_jax.value_and_grad(with_aux, has_aux=True, num_microbatches=k, aux_accumulator=how)
    (_, aux), _ = jax.jit(f)(W, X, Y, temperature=LAM)
    np.testing.assert_allclose(aux["losses"], square(W, X, Y), rtol=1e-6)
    np.testing.assert_allclose(aux["statistics"]["mean"], X.mean(0), rtol=1e-5, atol=1e-7)
    assert aux["count"] == B
    with pytest.raises(TypeError, match=r"aux_accumulator=.*CONCAT.*MEAN"):
        absgd_jax.value_and_grad(with_aux, has_aux=True, num_microbatches=2)


@pytest.mark.parametrize(
    ("aux", "how", "message"),
    [
        (lambda x: jnp.ones(3), CONCAT, r"shape \(3,\).*CONCAT needs the examples \(here 6"),
        (lambda x: jnp.float32(1), CONCAT, r"shape \(\).*CONCAT"),
        (lambda x: jnp.arange(3), MEAN, r"int32.*MEAN needs floating point"),
        (lambda x: x, "mean", "by mean"),
    ],
)
def test_aux_that_cannot_leave_is_refused(aux, how, message):
    f = absgd_jax.value_and_grad(
        lambda w, x, y: (square(w, x, y), aux(x)), has_aux=True, num_microbatches=2, aux_accumulator=how
    )
    with pytest.raises(ValueError, match=message):
        f(W, X, Y, temperature=1.0)


def masks_of(f, *args, **kwargs):
    (_, masks), _ = f(*args, temperature=1.0, **kwargs)
    return np.asarray(masks)


def test_no_two_micro_batches_share_a_key_and_a_slice_s_key_is_that_of_its_number():
    def noisy(w, x, *, key, rest):
        mask = jax.random.bernoulli(rest["key"], 0.5, (len(x), 64))
        return mask @ jnp.ones(64) * w, mask ^ jax.random.bernoulli(key, 0.5, (len(x), 64))

    f = absgd_jax.value_and_grad(noisy, has_aux=True, num_microbatches=4, aux_accumulator=CONCAT)
    key, other = jax.random.key(1), {"key": jax.random.key(2), "count": jnp.int32(3), "name": "any object"}
    masks = masks_of(f, 1.0, X, key=key, rest=other)
    for i in range(4):
        folded = (jax.random.fold_in(k, i) for k in (key, other["key"]))
        expected = np.logical_xor(*(jax.random.bernoulli(k, 0.5, (B // 4, 64)) for k in folded))
        np.testing.assert_array_equal(masks[i::4], expected)  # slices are strided
    assert len(np.unique(masks, axis=0)) == B
    alone = masks_of(absgd_jax.value_and_grad(noisy, has_aux=True), 1.0, X, key=key, rest=other)
    expected = np.logical_xor(*(jax.random.bernoulli(k, 0.5, (B, 64)) for k in (key, other["key"])))
    np.testing.assert_array_equal(alone, expected)  # one batch takes the keys as they are


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_no_two_micro_batches_share_an_array_of_keys(shape):
    def noisy(w, x, *, keys):
        mask = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (len(x), 16)))(keys.reshape(-1))
        return jnp.sum(mask, (0, 2)) * w, jnp.moveaxis(mask, 0, 1)

    keys = jax.random.split(jax.random.key(3), shape)
    f = absgd_jax.value_and_grad(noisy, has_aux=True, num_microbatches=4, aux_accumulator=CONCAT)
    masks = masks_of(f, 1.0, X, keys=keys)
    for i in range(4):
        for j, key in enumerate(keys.reshape(-1)):
            expected = jax.random.bernoulli(jax.random.fold_in(key, i), 0.5, (B // 4, 16))
            np.testing.assert_array_equal(masks[i::4, j], expected)


@pytest.mark.parametrize("name", ["temperature", "state", "where", "weights"])
def test_a_parameter_that_is_filled_by_position_leaves_its_name_to_the_method(name):
    exec(f"def first({name}, x, y): return (x @ {name} - y) ** 2", scope := {})
    exec(f"def second(w, {name}, x, y): return {name}[0] * (x @ w - y) ** 2", scope)
    exec(f"def rest(w, *{name}): return ({name}[0] @ w - {name}[1]) ** 2", scope)
    options = {"temperature": LAM, "state": absgd_jax.absgd(0.1, LAM).init(W), "where": np.arange(B) < 9}
    options["weights"] = np.float32(rng.uniform(size=B))
    given = {name: options[name]} | ({} if name in ("temperature", "state") else {"temperature": LAM})
    kept = {"where": options["where"], "weights": options["weights"]}.get(name, np.ones(B))
    expected = literal(square(W, X, Y), LAM, np.float64(kept))
    for loss, args in (
        (scope["first"], (X, Y)),
        (scope["second"], (np.ones(B, np.float32), X, Y)),
        (scope["rest"], (X, Y)),
    ):
        risk, _ = absgd_jax.value_and_grad(loss)(W, *args, **given)
        np.testing.assert_allclose(risk, expected, rtol=1e-5)


def test_keys_of_the_examples_are_sliced_with_them():
    def noisy(w, keys):
        return jax.vmap(lambda key: jax.random.normal(key))(keys) * w

    keys = jax.random.split(jax.random.key(0), B)
    whole = absgd_jax.value_and_grad(noisy)(1.0, keys, temperature=LAM)
    sliced = absgd_jax.value_and_grad(noisy, num_microbatches=4)(1.0, keys, temperature=LAM)
    np.testing.assert_allclose(sliced, whole, rtol=1e-5)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first, self.norm = nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout, self.last = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        h = self.dropout(nnx.tanh(self.norm(self.first(x))))
        return self.last(h)[:, 0], h


@pytest.mark.parametrize("k", [1, 4])
def test_an_nnx_model_with_batch_norm_and_dropout(k):
    graphdef, params, stats, rngs = nnx.split(Net(nnx.Rngs(0)), nnx.Param, nnx.BatchStat, nnx.RngState)

    def loss(params, x, y, *, stats, rngs):
        model = nnx.merge(graphdef, params, stats, rngs, copy=True)
        out, hidden = model(x)
        return (out - y) ** 2, (nnx.state(model, nnx.BatchStat), hidden)

    x, y = np.float32(rng.normal(size=(32, 4))), np.float32(rng.normal(size=32))
    f = absgd_jax.value_and_grad(loss, has_aux=True, num_microbatches=k, aux_accumulator=(MEAN, CONCAT))
    (_, (new, hidden)), grads = jax.jit(f)(params, x, y, stats=stats, rngs=rngs, temperature=1.0)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)
    assert jax.tree.structure(new) == jax.tree.structure(stats)

    pre = x @ np.asarray(params["first"]["kernel"][...]) + np.asarray(params["first"]["bias"][...])
    np.testing.assert_allclose(new["norm"]["mean"][...], 0.1 * pre.mean(0), rtol=1e-3, atol=1e-5)  # exact
    within = np.mean([pre[i::k].var(0) for i in range(k)], axis=0)  # lacks what the slices' means differ by
    np.testing.assert_allclose(new["norm"]["var"][...], 0.9 + 0.1 * within, rtol=1e-3)
    masks = [np.asarray(hidden)[i::k] == 0 for i in range(k)]
    assert all((masks[i] != masks[j]).any() for i in range(k) for j in range(i))


def test_a_linen_model_with_batch_norm():
    net = nn.Sequential([nn.Dense(8), nn.BatchNorm(use_running_average=False, momentum=0.0), nn.tanh, nn.Dense(1)])
    variables = net.init(jax.random.key(0), X)

    def loss(params, x, y):
        out, new = net.apply({"params": params, "batch_stats": variables["batch_stats"]}, x, mutable=["batch_stats"])
        return (out[:, 0] - y) ** 2, new["batch_stats"]

    f = absgd_jax.value_and_grad(loss, has_aux=True, num_microbatches=3, aux_accumulator=MEAN)
    (_, stats), _ = f(variables["params"], X, Y, temperature=1.0)
    dense = variables["params"]["layers_0"]
    np.testing.assert_allclose(stats["layers_1"]["mean"], (X @ dense["kernel"]).mean(0), rtol=1e-4, atol=1e-6)


TOKENS = np.float32(rng.normal(size=(B, 3, 4)))


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("shape", [(B,), (B, 1), (B, 3), (1, 3), (1, 1), ()])
def test_weights_and_masks_are_matched_from_the_first_axis_on(shape, k):
    weights = np.float32(rng.exponential(size=shape))
    mask = rng.random(shape) < 0.7
    whole = [np.broadcast_to(np.reshape(v, (*shape, *[1] * (2 - len(shape)))), (B, 3)) for v in (weights, mask)]
    losses = lambda w, x: (x @ w) ** 2  # noqa: E731
    f = absgd_jax.value_and_grad(losses, num_microbatches=k)
    risk, _ = f(W, TOKENS, temperature=LAM, weights=weights)
    np.testing.assert_allclose(risk, literal(losses(W, TOKENS), LAM, whole[0]), rtol=1e-5)
    if whole[1].any():
        risk, _ = f(W, TOKENS, temperature=LAM, where=mask)
        np.testing.assert_allclose(risk, literal(losses(W, TOKENS)[whole[1]], LAM), rtol=1e-5)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (2, 3), (B, 2), (B, 3, 1), (B + 1,)])
@pytest.mark.parametrize("name", ["weights", "where"])
def test_weights_that_do_not_fit_are_refused(name, shape):
    with pytest.raises(ValueError, match=rf"{name} has shape \({shape[0]},.*first axis \(the examples\)"):
        absgd_jax.entropic_risk(jnp.ones((B, 3)), 1.0, **{name: jnp.ones(shape, bool)})


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("bad", [-1.0, np.inf, np.nan])
def test_weights_that_are_negative_or_not_finite_are_refused(bad, k):
    f = absgd_jax.value_and_grad(lambda w, x: x @ w, num_microbatches=k)
    with pytest.raises(ValueError, match=f"weights contains {bad}"):
        f(W, X, temperature=1.0, weights=np.where(np.arange(B) == 1, bad, 1.0))


def test_a_batch_by_keyword_only_cannot_be_sliced():
    f = absgd_jax.value_and_grad(lambda w, *, x: x @ w, num_microbatches=2)
    with pytest.raises(ValueError, match="positional arguments after params, and there are none"):
        f(W, x=X, temperature=1.0)


def test_an_empty_batch_is_one_in_which_nothing_was_seen():
    optimizer = absgd_jax.absgd(0.1, 1.0)
    risk = absgd_jax.entropic_risk(jnp.zeros(0), 1.0)
    assert (risk == 0) & jnp.signbit(risk)
    np.testing.assert_array_equal(jax.grad(absgd_jax.entropic_risk)(jnp.zeros((0, 2)), 1.0), jnp.zeros((0, 2)))
    f = absgd_jax.value_and_grad(square)
    before = optimizer.init(W)
    risk, grads = f(W, X[:0], Y[:0], state=before)
    updates, after = optimizer.update(grads, before, W, value=risk)
    np.testing.assert_array_equal(updates, 0)
    assert after[0]._replace(count=0) == before[0]._replace(count=0)
    assert absgd_jax.effective_sample_size(jnp.zeros(0)) == 0


def test_a_term_of_the_batch_counts_once_at_the_level_of_the_loss():
    def penalty(w):
        return jnp.sum(jnp.abs(w) ** 3)

    weighting, gamma = absgd_jax.weight_by_absgd(1.0, 0.5), 0.5
    state, w, s = weighting.init(), jnp.asarray(W), 0.0
    for x, y in zip(np.split(X, 3), np.split(Y, 3), strict=True):

        def objective(w):
            losses = square(w, x, y)  # noqa: B023
            weights, new = weighting.update(losses, state)  # noqa: B023
            return jnp.mean(weights * losses) + 0.1 * penalty(w), new

        grads, state = jax.grad(objective, has_aux=True)(w)
        residual = np.float64(x @ w - y)
        s = (1 - gamma) * s + gamma * np.mean(np.exp(residual**2))
        p = np.exp(residual**2) / s
        expected = np.mean(p[:, None] * 2 * residual[:, None] * x, axis=0) + 0.3 * np.abs(w) * w
        np.testing.assert_allclose(grads, expected, rtol=1e-4)
        w = w - 0.02 * grads


def test_eight_bit_parameters_have_a_float32_state():
    params = {"w": jnp.ones(2, jnp.float8_e4m3fn)}
    optimizer = absgd_jax.scale_by_absgd(1.0)
    updates, state = optimizer.update(params, optimizer.init(params), value=jnp.float32(1.0))
    assert updates["w"].dtype == jnp.float8_e4m3fn
    np.testing.assert_allclose(np.float32(updates["w"]), 1 / 0.9, rtol=0.07)
    assert state.risk.dtype == jnp.float32
    assert absgd_jax.entropic_risk(jnp.ones(2, jnp.float8_e4m3fn), 1.0).dtype == jnp.float32


def test_a_symbolic_batch_is_exported_without_a_check_of_the_radius():
    weighting = absgd_jax.weight_by_absgd(absgd_jax.kl_radius(0.5))
    losses = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b"), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: weighting.update(x, weighting.init())[0]))(losses)
    np.testing.assert_allclose(exported.call(np.ones(5, np.float32)), 1, rtol=1e-6)


@pytest.mark.parametrize("lam", [float("inf"), -float("inf"), lambda count: jnp.where(count < 2, jnp.inf, 1.0)])
def test_no_infinity_is_left_in_what_is_compiled(lam):
    optimizer = absgd_jax.absgd(0.1, lam)
    f = absgd_jax.value_and_grad(square)
    with jax.debug_infs(True):
        state = jax.jit(optimizer.init)(W)
        for _ in range(3):
            risk, grads = jax.jit(lambda s: f(W, X, Y, state=s))(state)
            updates, state = jax.jit(optimizer.update)(grads, state, W, value=risk)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))
