"""Every row of the tables in docs/pitfalls.md: what works behind and around ABSGD in Optax, and what does not."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import linen as nn, nnx
from flax.training.train_state import TrainState
from numpy.testing import assert_allclose, assert_array_equal

import absgd_jax
from absgd_jax import absgd, entropic_risk, scale_by_absgd

PAGE = (Path(__file__).parents[1] / "docs" / "pitfalls.md").read_text()
LAM = 5.0
rng = np.random.default_rng(0)
X = np.float32(rng.normal(size=(6, 64, 3)))
Y = np.float32(X @ np.array([1.0, -2.0, 0.5]) + 0.5 + rng.normal(size=(6, 64)))
W = jnp.zeros(3)
ROWS = {}


def row(name, works):
    """Registers the test of a row of the tables."""

    def register(test):
        ROWS[name] = (works, test)
        return test

    return register


def losses_of(w, x, y):
    return (x @ w - y) ** 2


loss_and_grad = absgd_jax.value_and_grad(losses_of)
at_lambda = jax.jit(lambda w, x, y: loss_and_grad(w, x, y, temperature=LAM))


def path(update, init, steps=4, w=W):
    """The parameters after each step; ``update(grads, state, w, risk)`` returns updates and state."""
    state, out = init(w), []
    for x, y in zip(X[:steps], Y[:steps], strict=True):
        risk, grads = at_lambda(w, x, y)
        updates, state = update(grads, state, w, risk)
        w = optax.apply_updates(w, updates)
        out.append(w)
    return np.array(out)


def run(optimizer, **kwargs):
    update = jax.jit(lambda g, s, w, r: optimizer.update(g, s, w, value=r, kl=0.1))
    return path(update, optimizer.init, **kwargs)


def by_hand(optimizer, gamma=0.9, **kwargs):
    """The optimizer on gradients that are weighted outside of it, by a literal moving average."""
    s, inner = 0.0, jax.jit(optimizer.update)

    def update(grads, state, w, risk):
        nonlocal s
        s = (1 - gamma) * s + gamma * np.exp(np.float64(risk) / LAM)
        return inner(grads * np.float32(np.exp(np.float64(risk) / LAM) / s), state, w)

    return path(update, optimizer.init, **kwargs)


def bind(optimizer, **values):
    """As in docs/pitfalls.md."""
    return optax.GradientTransformation(optimizer.init, lambda g, s, p=None: optimizer.update(g, s, p, **values))


def same(actual, expected):
    assert_allclose(actual, expected, rtol=2e-4, atol=1e-5)


def differ(actual, expected):
    assert np.max(np.abs(np.asarray(actual) - expected)) > 1e-3 * np.max(np.abs(expected))


def risk_of(w):
    return entropic_risk(losses_of(w, X[0], Y[0]), LAM)


# --- behind -----------------------------------------------------------------------------------------------------------


@row("`sgd`, `adam`, `adamw`, `lion`, `muon`, `adafactor`, `prodigy` behind", "yes")
def _():
    for make in (
        lambda: optax.sgd(0.02, 0.9),
        lambda: optax.adam(0.02),
        lambda: optax.adamw(0.02),
        lambda: optax.lion(0.02),
        lambda: optax.contrib.muon(0.02),
        lambda: optax.adafactor(0.02),
        lambda: optax.contrib.prodigy(),
    ):
        same(run(optax.chain(scale_by_absgd(LAM, 0.5), make())), by_hand(make(), 0.5))


@row("`adam` behind, first step", "yes")
def _():
    firsts = [run(optax.chain(scale_by_absgd(LAM, gamma), optax.adam(0.02)), steps=2) for gamma in (0.1, 0.5)]
    same(firsts[0][0], firsts[1][0])
    differ(firsts[0][1], firsts[1][1])


@row("`sign_sgd`, `normalize_by_update_norm`, `contrib.normalize` behind", "partly")
def _():
    normalized = lambda f: optax.chain(f(), optax.sgd(0.02))  # noqa: E731
    for make in (
        lambda: optax.sign_sgd(0.02),
        lambda: normalized(optax.normalize_by_update_norm),
        lambda: normalized(optax.contrib.normalize),
    ):
        paths = [run(optax.chain(scale_by_absgd(LAM, gamma), make())) for gamma in (0.1, 0.9)]
        same(paths[0], paths[1])
        differ(run(optax.chain(make(), scale_by_absgd(LAM, 0.1))), paths[0])


@row("`clip_by_global_norm` behind", "yes")
def _():
    clip = optax.chain(scale_by_absgd(LAM, 0.1), optax.clip_by_global_norm(0.1))
    updates, _ = clip.update(10 * jnp.ones(3), clip.init(W), value=1.0)
    assert_allclose(optax.tree.norm(updates), 0.1, rtol=1e-5)


@row("`clip_by_global_norm` in front", "partly")
def _():
    clip = optax.chain(optax.clip_by_global_norm(0.1), scale_by_absgd(LAM, 0.1))
    updates, _ = clip.update(10 * jnp.ones(3), clip.init(W), value=1.0)
    assert_allclose(optax.tree.norm(updates), 1.0, rtol=1e-5)


@row("`add_decayed_weights` behind", "yes")
def _():
    chain = optax.chain(scale_by_absgd(LAM, 0.1), optax.add_decayed_weights(0.5))
    updates, _ = chain.update(jnp.zeros(3), chain.init(W), jnp.ones(3), value=1.0)
    assert_allclose(updates, 0.5)
    alias = absgd(1.0, LAM, 0.1, momentum=None, weight_decay=0.5)
    assert_allclose(alias.update(jnp.zeros(3), alias.init(W), jnp.ones(3), value=1.0)[0], -0.5)


@row("`add_decayed_weights` in front", "no")
def _():
    chain = optax.chain(optax.add_decayed_weights(0.5), scale_by_absgd(LAM, 0.1))
    updates, _ = chain.update(jnp.zeros(3), chain.init(W), jnp.ones(3), value=1.0)
    assert_allclose(updates, 5.0, rtol=1e-5)


# --- around -----------------------------------------------------------------------------------------------------------


@row("`chain`, `named_chain`, `flatten`, `conditionally_mask` around", "yes")
def _():
    inner = absgd(0.02, LAM)
    for outer in (
        optax.chain(inner),
        optax.named_chain(("absgd", inner)),
        optax.flatten(inner),
        optax.conditionally_mask(inner, lambda step: step >= 0),
    ):
        same(run(outer), run(inner))


@row("`apply_if_finite` around", "yes")
def _():
    safe = optax.apply_if_finite(absgd(0.02, LAM), 3)
    _, before = safe.update(jnp.ones(3), safe.init(W), value=1.0)
    updates, after = safe.update(jnp.full(3, jnp.nan), before, value=jnp.nan)
    assert_array_equal(updates, 0)
    assert after.inner_state[0] == before.inner_state[0]


@row("`masked` around", "partly")
def _():
    masked = optax.masked(scale_by_absgd(LAM, 0.5), {"in": True, "out": False})
    grads = {"in": jnp.ones(2), "out": jnp.ones(2)}
    updates, _ = masked.update(grads, masked.init(grads), value=1.0)
    assert_allclose(updates["in"], 2.0, rtol=1e-6)
    assert_array_equal(updates["out"], 1.0)


@row("`partition` around, one ABSGD", "partly")
def _():
    params = {"robust": W, "plain": jnp.zeros(())}
    split = optax.partition({"robust": absgd(0.02, LAM), "plain": optax.sgd(0.02)}, {k: k for k in params})
    f = absgd_jax.value_and_grad(lambda p, x, y: losses_of(p["robust"], x, y - p["plain"]))
    risk, grads = f(params, X[0], Y[0], state=split.init(params))
    assert_allclose(risk, risk_of(W), rtol=1e-6)
    updates, _ = split.update(grads, split.init(params), params, value=risk)
    assert_allclose(updates["plain"], -0.02 * grads["plain"], rtol=1e-6)


@row("`partition` around, several ABSGD", "no")
def _():
    params = {"a": W, "b": jnp.zeros(())}
    f = absgd_jax.value_and_grad(lambda p, x, y: losses_of(p["a"], x, y - p["b"]))
    split = optax.partition({"a": absgd(0.02, 1.0), "b": absgd(0.02, 3.0)}, {k: k for k in params})
    with pytest.raises(ValueError, match="Found 2 temperatures"):
        f(params, X[0], Y[0], state=split.init(params))
    risk, grads = f(params, X[0], Y[0], state=split.init(params), temperature=1.0)
    updates, _ = split.update(grads, split.init(params), params, value=risk)
    for name, lam in (("a", 1.0), ("b", 3.0)):
        part = absgd(0.02, lam)
        same(updates[name], part.update(grads[name], part.init(params[name]), params[name], value=risk)[0])
    rates = optax.partition({"a": optax.sgd(0.02), "b": optax.sgd(0.1)}, {k: k for k in params})
    one = optax.chain(scale_by_absgd(LAM), rates)
    risk, grads = f(params, X[0], Y[0], state=one.init(params))
    updates, _ = one.update(grads, one.init(params), params, value=risk)
    assert_allclose(updates["b"], -0.1 / 0.9 * grads["b"], rtol=1e-5)


@row("`inject_hyperparams` around", "yes")
def _():
    injected = optax.inject_hyperparams(absgd)(0.02, LAM)
    same(run(injected), run(absgd(0.02, LAM)))
    state = injected.init(W)
    state.hyperparams["temperature"] = jnp.float32(0.3)
    assert_allclose(loss_and_grad(W, X[0], Y[0], state=state)[0], entropic_risk(losses_of(W, X[0], Y[0]), 0.3))
    schedule = optax.linear_schedule(4.0, 1.0, 3)
    for optimizer, of_step in ((absgd(0.02, schedule), 1), (optax.inject_hyperparams(absgd)(0.02, schedule), 0)):
        _, state = optimizer.update(jnp.ones(3), optimizer.init(W), W, value=1.0)
        risk, _ = loss_and_grad(W, X[0], Y[0], state=state)  # of step 1
        assert_allclose(risk, entropic_risk(losses_of(W, X[0], Y[0]), schedule(of_step)), rtol=1e-6)


def test_inject_hyperparams_casts_to_a_dtype_of_the_parameters():
    half, make = jnp.zeros(3, jnp.bfloat16), optax.inject_hyperparams(absgd)
    hyperparams = make(0.02, temperature=0.3, gamma=0.999).init(half).hyperparams
    assert {value.dtype for value in hyperparams.values()} == {jnp.dtype(jnp.bfloat16)}
    assert_allclose(np.float64(hyperparams["temperature"]), 0.3008, atol=1e-4)
    assert hyperparams["gamma"] == 1
    mixed = make(0.02, 0.3).init({"a": half, "b": W}).hyperparams["temperature"].dtype
    newer = tuple(map(int, optax.__version__.split(".")[:3])) >= (0, 2, 8)
    assert mixed == (jnp.float32 if newer else jnp.bfloat16)


@row("`contrib.schedule_free`, `contrib.mechanize` around", "yes")
def _():
    inner = absgd(0.05, LAM, momentum=None)
    for optimizer in (optax.contrib.schedule_free(inner, 0.05), optax.contrib.mechanize(inner)):

        @jax.jit
        def step(carry, _):
            w, state = carry
            risk, grads = loss_and_grad(w, X[0], Y[0], state=state)
            updates, state = optimizer.update(grads, state, w, value=risk)  # noqa: B023
            return (optax.apply_updates(w, updates), state), None

        (w, _), _ = jax.lax.scan(step, (W, optimizer.init(W)), None, 100)
        assert risk_of(w) < 0.5 * risk_of(W)


@row("`MultiSteps` around", "no")
def _():
    f = absgd_jax.value_and_grad(losses_of, num_microbatches=4)
    optimizer = absgd(0.02, LAM)
    risk, grads = f(W, X[0], Y[0], state=optimizer.init(W))
    whole, _ = optimizer.update(grads, optimizer.init(W), W, value=risk)
    same(whole, run(optimizer, steps=1)[0])
    steps = optax.MultiSteps(optimizer, 4)
    state = steps.init(W)
    for x, y in zip(np.split(X[0], 4), np.split(Y[0], 4), strict=True):
        risk, grads = at_lambda(W, x, y)
        updates, state = steps.update(grads, state, W, value=risk)
    differ(updates, whole)
    assert_allclose(optax.tree.get(state, "risk"), risk, rtol=1e-6)  # the last micro-batch's


@row("`MultiSteps` around, inside a `chain`", "refused")
def _():
    chain = optax.chain(optax.MultiSteps(absgd(0.02, LAM), 4).gradient_transformation())
    with pytest.raises(TypeError, match="needs the batch's risk"):
        chain.update(W, chain.init(W), W, value=1.0)


@row("`MultiSteps`, `apply_every` behind", "partly")
def _():
    parts = list(zip(np.split(X[0], 4), np.split(Y[0], 4), strict=True))
    whole = -0.02 * at_lambda(W, X[0], Y[0])[1] / 0.9
    for behind, scale in (
        (optax.MultiSteps(optax.sgd(0.02), 4).gradient_transformation(), 1),
        (optax.chain(optax.apply_every(4), optax.sgd(0.02)), 4),
    ):
        chain = optax.chain(scale_by_absgd(LAM), behind)
        state, weighted, s = chain.init(W), 0, 0.0
        for x, y in parts:
            risk, grads = at_lambda(W, x, y)
            updates, state = chain.update(grads, state, W, value=risk)
            g = np.exp(np.float64(risk) / LAM)
            s = 0.1 * s + 0.9 * g
            weighted = weighted + grads * np.float32(g / s) / 4
        same(updates, -0.02 * scale * weighted)
        differ(updates / scale, whole)


@row("`contrib.sam` around", "refused")
def _():
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    inner = absgd(0.02, LAM)
    with pytest.raises(TypeError, match="unexpected keyword argument 'value'"):
        run(optax.contrib.sam(inner, ascent), steps=1)

    def update(grads, state, w, risk):
        return optax.contrib.sam(bind(inner, value=risk), ascent).update(grads, state, w)

    actual = path(update, optax.contrib.sam(inner, ascent).init)
    w, state = W, inner.init(W)
    for t in (0, 2):  # the path goes up in one step, and back and down in the next
        _, grads = at_lambda(w, X[t], Y[t])
        above = w + 0.05 * grads / jnp.linalg.norm(grads)
        same(actual[t], above)
        risk, grads = at_lambda(above, X[t + 1], Y[t + 1])
        updates, state = inner.update(grads, state, w, value=risk)
        w = w + updates
        same(actual[t + 1], w)


@row("`contrib.sam` behind", "refused")
def _():
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    with pytest.raises(TypeError, match="unexpected keyword argument 'value'"):
        run(optax.chain(scale_by_absgd(LAM), optax.contrib.sam(optax.sgd(0.02), ascent)), steps=1)


@row("`lookahead` around", "refused")
def _():
    inner, params = absgd(0.02, LAM), optax.LookaheadParams.init_synced(W)
    state = optax.lookahead(inner, 2, 0.5).init(params)
    with pytest.raises(TypeError, match="unexpected keyword argument 'value'"):
        optax.lookahead(inner, 2, 0.5).update(W, state, params, value=1.0)
    slow, fast, inner_state = W, W, inner.init(W)
    for t in range(4):
        risk, grads = loss_and_grad(params.fast, X[t], Y[t], state=state)
        updates, state = optax.lookahead(bind(inner, value=risk), 2, 0.5).update(grads, state, params)
        params = optax.apply_updates(params, updates)
        risk, grads = at_lambda(fast, X[t], Y[t])
        updates, inner_state = inner.update(grads, inner_state, fast, value=risk)
        fast = fast + updates
        if t % 2:
            slow = fast = slow + 0.5 * (fast - slow)
        same(params.fast, fast)
        same(params.slow, slow)


@row("`contrib.split_real_and_imaginary` around", "refused")
def _():
    split, z = optax.contrib.split_real_and_imaginary, jnp.array([1 + 2j, -1j], jnp.complex64)
    inner = absgd(0.02, LAM, 0.5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'value'"):
        split(inner).update(z, split(inner).init(z), z, value=1.0)
    expected = -0.04 * z  # momentum SGD's first step; the factor is 1/γ
    bound = split(bind(inner, value=1.0))
    assert_allclose(bound.update(z, split(inner).init(z), z)[0], expected, rtol=1e-5)
    chain = optax.chain(scale_by_absgd(LAM, 0.5), split(optax.sgd(0.02)))
    assert_allclose(chain.update(z, chain.init(z), z, value=1.0)[0], expected, rtol=1e-5)


# --- what reads the value ---------------------------------------------------------------------------------------------


@row("`contrib.reduce_on_plateau` behind", "yes")
def _():
    chain = optax.chain(absgd(0.02, LAM), optax.contrib.reduce_on_plateau(0.5, patience=2))
    state = chain.init(W)
    for value, scale in ((3.0, 1.0), (2.0, 1.0), (2.5, 1.0), (2.5, 0.5), (1.0, 0.5)):
        _, state = chain.update(W, state, W, value=jnp.float32(value), kl=0.1)
        assert_allclose(optax.tree.get(state, "scale"), scale)


def polyak_steps(chain):
    """Each step as a multiple of value/|g|² times the gradient, and the mean weight g̃/s at γ = 1/2."""
    state, s, out = chain.init(W), 0.0, []
    for t in range(4):
        risk, grads = at_lambda(W, X[t], Y[t])
        updates, state = chain.update(grads, state, W, value=risk)
        g = np.exp(np.float64(risk) / LAM)
        s = 0.5 * s + 0.5 * g
        step = -jnp.vdot(updates, grads) / risk  # 1 for the step of Polyak
        out.append((float(step), g / s))
    return np.array(out).T


@row("`polyak_sgd` behind", "no")
def _():
    polyak = lambda: optax.polyak_sgd(max_learning_rate=1e6)  # noqa: E731
    steps, weight = polyak_steps(optax.chain(scale_by_absgd(LAM, 0.5), polyak()))
    assert_allclose(steps, 1 / weight, rtol=1e-4)
    differ(steps, weight)
    steps, weight = polyak_steps(optax.chain(polyak(), scale_by_absgd(LAM, 0.5)))
    assert_allclose(steps, weight, rtol=1e-4)
    steps, _ = polyak_steps(optax.chain(scale_by_absgd(LAM, 1.0), polyak()))
    assert_allclose(steps, 1, rtol=1e-4)


@row("`contrib.momo`, `contrib.momo_adam` behind", "no")
def _():
    for make in (optax.contrib.momo, optax.contrib.momo_adam):
        alone = path(lambda g, s, w, r: make().update(g, s, w, value=r), make().init, steps=1)  # noqa: B023
        behind, front = (
            run(optax.chain(*links), steps=1)
            for links in ((scale_by_absgd(LAM, 0.1), make(1e3)), (make(1e3), scale_by_absgd(LAM, 0.1)))
        )
        unbounded = run(make(1e3), steps=1)
        same(front, 10 * unbounded)  # the mean weight of the first batch is 1/γ
        assert np.linalg.norm(behind) < 0.2 * np.linalg.norm(unbounded)  # instead of 10 times as long
        same(run(optax.chain(scale_by_absgd(LAM, 1.0), make()), steps=1), alone)


@row("`lbfgs`, `scale_by_backtracking_linesearch`, `scale_by_zoom_linesearch` behind", "no")
def _():
    def risks(make, gamma):
        chain = optax.chain(scale_by_absgd(2.0, gamma), make())

        def step(carry, _):
            w, state = carry
            risk, grads = jax.value_and_grad(of)(w)
            updates, state = chain.update(grads, state, w, value=risk, grad=grads, value_fn=of)
            return (optax.apply_updates(w, updates), state), risk

        return jax.jit(lambda carry: jax.lax.scan(step, carry, None, 15)[1])((W, chain.init(W)))

    of = lambda w: entropic_risk(losses_of(w, X[0], Y[0]), 2.0)  # noqa: E731
    search = lambda rule: lambda: optax.chain(optax.sgd(1.0), rule(15))  # noqa: E731
    for make in (
        optax.lbfgs,
        search(optax.scale_by_backtracking_linesearch),
        search(optax.scale_by_zoom_linesearch),
    ):
        right, wrong = risks(make, 1.0), risks(make, 0.1)
        assert right[-1] < 1.6 < right[0] / 5
        assert np.mean(wrong) > np.mean(right)
    assert risks(optax.lbfgs, 0.5)[-1] > 3  # stalls


@row("`contrib.differentially_private_aggregate` behind", "no")
def _():
    chain = optax.chain(scale_by_absgd(LAM), optax.contrib.differentially_private_aggregate(1.0, 0.0, 0))
    updates, _ = chain.update(jnp.ones((4, 2)), chain.init(jnp.ones((4, 2))), value=1.0)
    assert updates.shape == (2,)


# --- Flax -------------------------------------------------------------------------------------------------------------


@row("Flax `nnx.Optimizer`", "yes")
def _():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, absgd(0.02, absgd_jax.trust_fraction(0.6)), wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads, value=1.5, kl=0.1)
    assert_allclose(optimizer.opt_state[0].risk[...], 1.5, rtol=1e-6)
    nnx.split(model)


@row("Flax `TrainState.apply_gradients`", "refused")
def _():
    model = nn.Dense(1)
    state = TrainState.create(apply_fn=model.apply, params=model.init(jax.random.key(0), X[0]), tx=absgd(0.02, LAM))
    with pytest.raises(TypeError, match="needs the batch's risk"):
        state.apply_gradients(grads=state.params)


# --- the table and the tests ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_what_the_tables_say_happens(name):
    ROWS[name][1]()


def test_the_tables_have_these_rows_and_say_what_the_tests_do():
    tables = re.findall(r"^\| transform \|.*\n\|---.*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    cells = [re.split(r"\s*\|\s*", line)[1:5] for table in tables for line in table.splitlines()]
    assert {name: works for name, works, *_ in cells} == {name: works for name, (works, _) in ROWS.items()}
    for name, works, what, instead in cells:
        assert what, name
        assert instead or works == "yes" or "differentially" in name, name


# --- the rest of the page ---------------------------------------------------------------------------------------------


def test_a_penalty_inside_the_losses_is_weighted():
    optimizer, w = scale_by_absgd(LAM, 0.5), jnp.ones(3)
    _, state = optimizer.update(W, optimizer.init(W), value=8.0)

    def updates(penalty):
        f = absgd_jax.value_and_grad(lambda w, x, y: losses_of(w, x, y) + penalty * jnp.sum(w**2))
        risk, grads = f(w, X[0], Y[0], temperature=LAM)
        return optimizer.update(grads, state, value=risk)[0]

    counted = (updates(0.001) - updates(0.0)) / (0.001 * 2 * w)
    assert not np.allclose(counted, 1, atol=0.1)


def test_a_label_of_minus_one_is_taken_for_the_last_class():
    logits = jnp.arange(6.0).reshape(2, 3)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([-1, 255]))
    assert losses[0] == optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([2, 2]))[0]
    assert np.isnan(losses[1])
