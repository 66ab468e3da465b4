"""The transform and the ready-made optimizers keep Optax's conventions, in every wrapper in which they may stand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import absgd_jax
from absgd_jax import abadam, absgd, adaptive_gamma, entropic_risk, kl_radius, scale_by_absgd, weight_by_absgd

INF = float("inf")
TRUTH = {"w": np.array([1.0, -2.0, 0.5], np.float32), "b": np.float32(0.5)}


def regression(seed=0, size=24, noise=0.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 3)).astype(np.float32)
    return x, losses_of.model(TRUTH, x) + noise * rng.normal(size=size).astype(np.float32)


def losses_of(params, x, y):
    return (losses_of.model(params, x) - y) ** 2


losses_of.model = lambda params, x: x @ params["w"] + params["b"]
risk_and_grad = jax.jit(absgd_jax.value_and_grad(losses_of, with_kl=True))


def zeros(dtype=np.float32):
    return {"w": jnp.zeros(3, dtype), "b": jnp.zeros((), dtype)}


def compiled(optimizer, risk_and_grad=risk_and_grad):
    """One training step under jit that counts its compilations and hands extra arguments to every transform."""

    def step(params, state, x, y, **kwargs):
        step.traces += 1
        (risk, kl), grads = risk_and_grad(params, x, y, state=state, **kwargs)
        updates, state = optimizer.update(grads, state, params, value=risk, kl=kl, extra="ignored")
        return optax.apply_updates(params, updates), state, risk

    step.traces = 0
    run = jax.jit(step)
    run.traces = lambda: step.traces
    return run


def train(optimizer, steps, *, noise=1.0, **kwargs):
    """Trains on a new batch each step; returns the parameters, the state and every step's risk."""
    params, step, risks = zeros(), compiled(optimizer, **kwargs), []
    state = optimizer.init(params)
    for t in range(steps):
        params, state, risk = step(params, state, *regression(t, noise=noise))
        risks.append(float(risk))
    return params, state, risks


def absgd_state(state):
    """The one ScaleByAbsgdState within an optimizer's state."""
    is_absgd = lambda node: isinstance(node, absgd_jax.ScaleByAbsgdState)  # noqa: E731
    (found,) = [leaf for leaf in jax.tree.leaves(state, is_leaf=is_absgd) if is_absgd(leaf)]
    return found


def assert_trees(compare, actual, desired, **kwargs):
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    jax.tree.map(lambda a, b: compare(np.asarray(a), np.asarray(b), **kwargs), actual, desired)


FACTORIES = {
    "scale_by_absgd": lambda *rules, **kwargs: optax.chain(scale_by_absgd(*rules, **kwargs), optax.sgd(0.03)),
    "absgd": lambda *rules, **kwargs: absgd(0.01, *rules, **kwargs),
    "abadam": lambda *rules, **kwargs: abadam(optax.linear_schedule(0.1, 0.0, 300), *rules, **kwargs),
}
TEMPERATURES = {
    "positive": 2.0,
    "negative": -4.0,
    "infinite": INF,
    "array": np.float32(1.0),
    "schedule": optax.linear_schedule(4.0, 1.0, 100),
    "two_stages": lambda count: jnp.where(count < 50, INF, 1.0),
    "kl_radius": kl_radius(0.5, batch_size=24),
    "negative_kl_radius": kl_radius(0.2, init=-8.0),
}
GAMMAS = {"constant": 0.5, "schedule": optax.linear_schedule(1.0, 0.5, 100), "adaptive": adaptive_gamma(-1.0)}
RULES = [pytest.param(rule, 0.9, id=name) for name, rule in TEMPERATURES.items()]
RULES += [pytest.param(2.0, rule, id=f"{name}_gamma") for name, rule in GAMMAS.items()]

every_factory = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)
every_rule = pytest.mark.parametrize(("temperature", "gamma"), RULES)
some_temperatures = pytest.mark.parametrize(
    "temperature", [2.0, -2.0, INF, kl_radius(0.5)], ids=["positive", "negative", "inf", "kl_radius"]
)


# --- a transform like any other ---------------------------------------------------------------------------------------


def assert_minimises_in_one_compilation(optimizer):
    params, batch = zeros(), regression()
    step, state = compiled(optimizer), optimizer.init(params)
    for _ in range(300):
        params, state, _ = step(params, state, *batch)
    assert_trees(assert_allclose, params, TRUTH, atol=2e-2)
    assert step.traces() == 1


@every_rule
def test_every_rule_minimises_a_convex_problem_in_one_compilation(temperature, gamma):
    assert_minimises_in_one_compilation(absgd(0.01, temperature, gamma))


@every_factory
@pytest.mark.parametrize("temperature", [2.0, kl_radius(0.5)], ids=["fixed", "kl_radius"])
def test_every_optimizer_minimises_a_convex_problem_in_one_compilation(factory, temperature):
    assert_minimises_in_one_compilation(factory(temperature))


@pytest.mark.parametrize("bias_correction", [False, True])
def test_the_first_batch_weighs_one_over_gamma_or_one(bias_correction):
    params, (x, y) = zeros(), regression()
    optimizer = absgd(0.01, 2.0, 0.1, momentum=None, bias_correction=bias_correction)
    risk, grads = absgd_jax.value_and_grad(losses_of)(params, x, y, state=optimizer.init(params))
    updates, _ = optimizer.update(grads, optimizer.init(params), params, value=risk)
    weight = 1 if bias_correction else 10
    assert_trees(assert_allclose, updates, jax.tree.map(lambda g: -0.01 * weight * g, grads), rtol=1e-5)
    same = abadam(0.01, 2.0, 0.1, bias_correction=bias_correction)
    _, state = same.update(grads, same.init(params), params, value=risk)
    assert_trees(assert_allclose, state[1].mu, jax.tree.map(lambda g: 0.1 * weight * g, grads), rtol=1e-5)


@every_rule
def test_state_keeps_its_types(temperature, gamma):
    optimizer = absgd(0.01, temperature, gamma)
    state = jax.eval_shape(optimizer.init, zeros())
    shape = jax.eval_shape(compiled(optimizer), zeros(), state, *regression())[1]
    assert jax.tree.map(jax.typeof, shape) == jax.tree.map(jax.typeof, state)


def test_state_goes_through_scan_and_cond():
    optimizer, batch = absgd(0.01, kl_radius(0.5)), regression()
    step = compiled(optimizer)

    def every_other(carry, i):
        return jax.lax.cond(i % 2 == 0, lambda c: step(*c, *batch)[:2], lambda c: c, carry), None

    start = (zeros(), optimizer.init(zeros()))
    scanned, _ = jax.jit(lambda c: jax.lax.scan(every_other, c, jnp.arange(4)))(start)
    assert_trees(assert_allclose, scanned, step(*step(*start, *batch)[:2], *batch)[:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, -1.0, absgd_jax.trust_fraction(0.6)])
def test_an_update_is_elementwise(temperature):
    """On an accelerator it fuses: a reduction, though of two numbers, would be a kernel of its own."""
    optimizer = scale_by_absgd(temperature)
    program = jax.make_jaxpr(lambda grads, state, risk: optimizer.update(grads, state, value=risk, kl=risk))
    text = str(program(jnp.ones(3), optimizer.init(jnp.ones(3)), 1.0))
    assert "exp" in text
    assert "reduce_" not in text


@pytest.mark.parametrize(
    "make",
    [
        lambda: absgd(0.01, 2.0),
        lambda: absgd(0.01, jnp.float32(2.0)),
        lambda: absgd(0.01, kl_radius(0.5)),
        lambda: optax.inject_hyperparams(absgd)(0.01, 2.0),
    ],
    ids=["number", "array", "kl_radius", "injected"],
)
def test_state_can_be_donated(make):
    optimizer = make()
    step = jax.jit(compiled(optimizer).__wrapped__, donate_argnums=(0, 1))
    for _ in range(2):  # a second run finds the temperature it was given undeleted
        params = zeros()
        state = optimizer.init(params)
        for t in range(3):
            before = (params["w"], absgd_state(state).risk, absgd_state(state).mass)
            params, state, _ = step(params, state, *regression(t))
            assert all(leaf.is_deleted() for leaf in before)
    assert np.isfinite(params["w"]).all()


def test_init_takes_abstract_parameters_and_tree_map_params_spares_the_state():
    optimizer = absgd(0.1, temperature=2.0)
    abstract = jax.eval_shape(zeros)
    _, state, _ = train(optimizer, 2)
    assert jax.eval_shape(optimizer.init, abstract) == jax.eval_shape(lambda: state)
    assert absgd_state(optimizer.init(abstract)).risk.dtype == np.float32
    doubled = optax.tree.map_params(optimizer, lambda leaf: 2 * leaf, state)
    assert_trees(assert_array_equal, absgd_state(doubled), absgd_state(state))
    assert_trees(assert_array_equal, optax.tree.get(doubled, "trace")["w"], 2 * optax.tree.get(state, "trace")["w"])


def test_tree_get_and_set_reach_the_state():
    optimizer = absgd(0.01, kl_radius(0.5))
    params, state, _ = train(optimizer, 3)
    assert {name: optax.tree.get(state, name) for name in absgd_state(state)._fields} == absgd_state(state)._asdict()
    state = optax.tree.set(state, temperature=jnp.float32(0.25), risk=jnp.float32(1.5))
    (risk, _), _ = risk_and_grad(params, *regression(), state=state)
    assert_allclose(risk, entropic_risk(losses_of(params, *regression()), 0.25), rtol=1e-6)
    _, state = jax.jit(optimizer.update)(params, state, params, value=risk, kl=0.5)
    assert_allclose(optax.tree.get(state, "temperature"), 0.25, rtol=1e-6)  # a KL on target leaves λ


# --- what is asked of the caller --------------------------------------------------------------------------------------


@every_factory
@pytest.mark.parametrize(
    ("temperature", "kwargs", "error", "match"),
    [
        (1.0, {}, TypeError, r"update\(grads, state, params, value=risk\)"),
        (1.0, {"value": jnp.ones(4)}, ValueError, r"value has shape \(4,\).*not the losses"),
        (1.0, {"value": jnp.ones(1)}, ValueError, r"value has shape \(1,\)"),
        (kl_radius(0.5), {"value": 1.0}, TypeError, r"value=risk, kl=kl\)"),
        (kl_radius(0.5), {"value": 1.0, "kl": jnp.ones(2)}, ValueError, r"kl has shape \(2,\)"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_update_says_what_to_pass(factory, temperature, kwargs, error, match, wrap):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), factory(temperature))
    with pytest.raises(error, match=match):
        wrap(lambda p, s: optimizer.update(p, s, p, **kwargs))(zeros(), optimizer.init(zeros()))


# --- inject_hyperparams -----------------------------------------------------------------------------------------------

HYPERPARAMS = {
    absgd: {"temperature": (2.0, -0.5), "gamma": (0.9, 0.3), "learning_rate": (0.01, 0.05), "momentum": (0.9, 0.5)},
    abadam: {"temperature": (2.0, -0.5), "gamma": (0.9, 0.3), "learning_rate": (0.01, 0.05), "b1": (0.9, 0.5)},
}
for values in HYPERPARAMS.values():
    values["weight_decay"] = (0.01, 0.2)
CASES = [pytest.param(f, name, id=f"{f.__name__}-{name}") for f, values in HYPERPARAMS.items() for name in values]


@pytest.mark.parametrize(("factory", "name"), CASES)
def test_injected_hyperparameter_can_change_between_steps(factory, name):
    before = {key: pair[0] for key, pair in HYPERPARAMS[factory].items()}
    after = before | {name: HYPERPARAMS[factory][name][1]}
    optimizer, params = optax.inject_hyperparams(factory)(**before), zeros()
    step, state = compiled(optimizer), optimizer.init(params)
    for t in range(2):
        params, state, _ = step(params, state, *regression(t, noise=1.0))
    batch = regression(2, noise=1.0)

    def flat(params, state, risk):
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves((params, state, risk))])

    def injected():
        new, left, risk = step(params, state, *batch)
        return flat(new, left.inner_state, risk)

    unchanged = injected()
    state.hyperparams[name] = jnp.asarray(after[name], state.hyperparams[name].dtype)
    actual = injected()
    assert step.traces() == 1
    inner = optax.tree.set(state.inner_state, temperature=jnp.float32(after["temperature"]))
    assert_allclose(actual, flat(*compiled(factory(**after))(params, inner, *batch)), rtol=2e-5, atol=1e-6)
    assert not np.allclose(actual, unchanged, rtol=1e-3)


@pytest.mark.parametrize(("factory", "name"), CASES)
def test_injected_schedule_gives_each_step_its_value(factory, name):
    values = {key: pair[0] for key, pair in HYPERPARAMS[factory].items()}
    schedule = optax.linear_schedule(*HYPERPARAMS[factory][name], 4)
    optimizer, params = optax.inject_hyperparams(factory)(**values | {name: schedule}), zeros()
    state, reference, ours, theirs = optimizer.init(params), factory(**values).init(params), params, params
    for t in range(5):
        (risk, kl), grads = risk_and_grad(theirs, *regression(t, noise=1.0), temperature=1.0)
        built = factory(**values | {name: float(schedule(t))})
        updates, reference = built.update(grads, reference, theirs, value=risk, kl=kl)
        theirs = optax.apply_updates(theirs, updates)
        updates, state = optimizer.update(grads, state, ours, value=risk, kl=kl)
        ours = optax.apply_updates(ours, updates)
    assert_trees(assert_allclose, ours, theirs, rtol=1e-5, atol=1e-6)


def merged_in_numpy(risk, mass, value, lam, gamma):
    """R ← λ log of the moving average, in float64, divided by its mass."""
    s = (1 - gamma) * mass * np.exp(risk / lam) + gamma * np.exp(value / lam)
    mass = (1 - gamma) * mass + gamma
    return lam * np.log(s / mass), mass


@pytest.mark.parametrize("inject", [False, True], ids=["schedule", "inject_hyperparams"])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_leaving_infinity_restarts_the_estimate_and_other_changes_carry_it_over(inject, bias_correction):
    path, values = [INF, INF, 2.0, 2.0, 1.0, -3.0, -INF, 2.0, 4.0], np.linspace(3.0, 1.0, 9)
    rules = {"gamma": 0.6, "bias_correction": bias_correction}
    schedule = lambda count: jnp.asarray(path, jnp.float32)[jnp.minimum(count, len(path) - 1)]  # noqa: E731
    built = optax.inject_hyperparams(scale_by_absgd)(1.0, **rules) if inject else scale_by_absgd(schedule, **rules)
    update, grads = jax.jit(built.update), zeros() | {"b": jnp.float32(1.0)}
    state, risk, mass = built.init(grads), 0.0, 0.0
    for t, (lam, value) in enumerate(zip(path, values, strict=True)):
        if inject:
            state.hyperparams["temperature"] = jnp.float32(lam)
        updates, state = update(grads, state, grads, value=jnp.float32(value))
        factor = 1.0
        if np.isinf(lam):
            risk, mass = value, 0.0
        else:
            risk, mass = merged_in_numpy(risk, mass, value, lam, 0.6)
            factor = np.exp((value - risk) / lam) / (1 if bias_correction else mass)
        seen = absgd_state(state)
        assert_allclose([seen.risk, seen.mass, updates["b"], seen.count], [risk, mass, factor, t + 1], rtol=1e-5)
        if not inject:
            following, largest = path[min(t + 1, len(path) - 1)], np.finfo(np.float32).max
            assert seen.temperature == np.clip(following, -largest, largest)  # ∞ is kept as the largest number


def test_risk_is_computed_with_the_scheduled_temperature_of_its_own_step():
    schedule = optax.linear_schedule(4.0, 0.5, 5)
    optimizer, params = absgd(0.01, schedule), zeros()
    state, step = optimizer.init(params), compiled(optimizer)
    for t in range(7):
        expected = entropic_risk(losses_of(params, *regression(t)), float(schedule(t)))
        params, state, risk = step(params, state, *regression(t))
        assert_allclose(risk, expected, rtol=1e-6)


# --- dtypes and trees -------------------------------------------------------------------------------------------------


@every_factory
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("temperature", [2.0, INF, kl_radius(0.5), optax.linear_schedule(2.0, 1.0, 3)])
def test_gradients_keep_their_dtype_and_the_state_is_at_least_float32(factory, dtype, temperature):
    with jax.enable_x64(dtype == "float64"):
        optimizer, batch = factory(temperature), jax.tree.map(lambda a: jnp.asarray(a, dtype), regression())

        def step(params):
            state = optimizer.init(params)
            (risk, kl), grads = risk_and_grad(params, *batch, state=state)
            updates, new = optimizer.update(grads, state, params, value=risk, kl=kl)
            return (grads, updates, optax.apply_updates(params, updates)), (state, new), (risk, kl)

        like_params, states, values = jax.eval_shape(step, zeros(dtype))
        wide = np.dtype(np.float64 if dtype == "float64" else np.float32)
        assert {leaf.dtype for leaf in jax.tree.leaves(like_params)} == {jnp.dtype(dtype)}
        assert {leaf.dtype for leaf in absgd_state(states[1])} == {wide, np.dtype(np.int32)}
        assert {leaf.dtype for leaf in values} == {wide}
        assert states[0] == states[1]


def test_x64_computes_the_factor_in_float64_and_leaves_float32_training_alone():
    with jax.enable_x64(True):
        for dtype, rtol in ((np.float64, 1e-14), (np.float32, 1e-6)):
            optimizer, grads = scale_by_absgd(0.7, 0.6), {"w": jnp.ones(2, dtype)}
            update, state = jax.jit(optimizer.update), optimizer.init(grads)
            assert state.risk.dtype == dtype
            risk, mass = 0.0, 0.0
            for value in (2.0, 1.1, 1.7):
                updates, state = update(grads, state, value=jnp.asarray(value, dtype))
                risk, mass = merged_in_numpy(risk, mass, value, 0.7, 0.6)
            assert_allclose(updates["w"], np.exp((1.7 - risk) / 0.7) / mass, rtol=rtol)
            assert updates["w"].dtype == state.risk.dtype == dtype


@pytest.mark.parametrize(
    "grads",
    [
        {},
        None,
        (),
        {"frozen": None, "w": np.ones(2, np.float32)},
        [np.ones((2, 3), np.float32), (np.float32(3.0), np.zeros((0, 4), np.float32))],
        {"z": np.array([1 + 2j, -1j], np.complex64), "w": np.ones(2, np.float16)},
    ],
    ids=["empty", "none", "tuple", "none_leaf", "nested", "complex"],
)
def test_every_tree_is_scaled_leaf_by_leaf(grads):
    grads = jax.tree.map(jnp.asarray, grads)
    optimizer = scale_by_absgd(2.0, 0.5)
    state = optimizer.init(grads)
    assert {leaf.dtype for leaf in state} == {np.dtype(np.float32), np.dtype(np.int32)}
    for _ in range(2):
        updates, state = jax.jit(optimizer.update)(grads, state, value=1.5)
    # s = 1/2 e + 1/2 · 1/2 e, so that the factor is 1 / (3/4)
    assert_trees(
        assert_allclose, updates, jax.tree.map(lambda g: (g * np.float32(4 / 3)).astype(g.dtype), grads), rtol=1e-3
    )
    assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, grads)
    assert_allclose(state.risk, 1.5, rtol=1e-6)


def test_complex_parameters_have_the_softmax_weighted_gradient():
    z, c = jnp.array([0.3 + 0.1j, -1j]), np.arange(6).reshape(3, 2) * (1 + 0.5j)

    def losses(z, c):
        return jnp.sum(jnp.abs(z - c) ** 2, axis=1)

    for k in (1, 3):
        f = jax.jit(absgd_jax.value_and_grad(losses, num_microbatches=k))
        risk, grads = f(z, jnp.asarray(c, jnp.complex64), temperature=5.0)
        shares = np.exp(np.asarray(losses(z, c)) / 5.0)
        expected = np.sum((shares / shares.sum())[:, None] * 2 * np.conj(np.asarray(z) - c), axis=0)
        assert grads.dtype == np.complex64
        assert_allclose(grads, expected, rtol=1e-5)
        assert_allclose(risk, 5 * np.log(shares.mean()), rtol=1e-5)


# --- in Optax's wrappers ----------------------------------------------------------------------------------------------


def test_conditionally_skipped_steps_leave_the_state():
    optimizer = optax.conditionally_mask(absgd(0.01, 2.0), lambda step: step % 2 == 0)
    params, state, _ = train(optimizer, 2)
    once, inner, _ = train(absgd(0.01, 2.0), 1)
    assert_trees(assert_allclose, (params, state.inner_state), (once, inner), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@some_temperatures
def test_apply_if_finite_makes_a_broken_batch_unhappen(bad, temperature):
    optimizer = optax.apply_if_finite(absgd(0.01, temperature), max_consecutive_errors=3)
    step, batches = compiled(optimizer), [regression(t, noise=1.0) for t in range(6)]
    broken = batches[3][0], np.where(np.arange(24) == 5, np.float32(bad), batches[3][1])
    trajectories = []
    for stream in ([*batches[:3], broken, *batches[3:]], batches):
        params = zeros()
        state = optimizer.init(params)
        for batch in stream:
            params, state, _ = step(params, state, *batch)
        trajectories.append((params, state.inner_state, state.total_notfinite))
    assert [int(notfinite) for *_, notfinite in trajectories] == [1, 0]
    assert_trees(assert_array_equal, trajectories[0][:2], trajectories[1][:2])


@some_temperatures
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -0.0])
def test_a_broken_or_empty_value_leaves_the_running_risk_and_lets_gradients_pass(temperature, value):
    optimizer = scale_by_absgd(temperature, 0.5)
    grads = zeros() | {"b": jnp.float32(3.0)}
    _, before = optimizer.update(grads, optimizer.init(grads), value=1.5, kl=0.7)
    updates, after = jax.jit(optimizer.update)(grads, before, value=jnp.float32(value), kl=jnp.float32(0.9))
    assert_trees(assert_array_equal, updates, grads)
    assert after == before._replace(count=2)


def test_a_broken_kl_divergence_moves_no_rule():
    optimizer = scale_by_absgd(kl_radius(0.5), 0.5)
    grads = zeros() | {"b": jnp.float32(3.0)}
    _, before = optimizer.update(grads, optimizer.init(grads), value=1.5, kl=0.7)
    for kl in (np.nan, np.inf):
        updates, after = jax.jit(optimizer.update)(grads, before, value=jnp.float32(1.0), kl=jnp.float32(kl))
        assert_trees(assert_array_equal, updates, grads)
        assert after == before._replace(count=2)


@pytest.mark.parametrize("num_microbatches", [1, 4])
@pytest.mark.parametrize("temperature", [2.0, INF, kl_radius(0.5)], ids=["positive", "inf", "kl_radius"])
def test_a_wholly_masked_batch_changes_nothing(temperature, num_microbatches):
    optimizer, params = scale_by_absgd(temperature), zeros()
    f = absgd_jax.value_and_grad(losses_of, with_kl=True, num_microbatches=num_microbatches)
    step, before = compiled(optimizer, f), optimizer.init(params)
    for where in (np.ones(24, bool), np.zeros(24, bool)):
        previous, before = before, before
        updated, state, _ = step(params, before, *regression(), where=where)
        if where.any():
            before = state
    assert_trees(assert_array_equal, updated, params)
    assert state == previous._replace(count=2)


# --- λ = ∞ is momentum SGD --------------------------------------------------------------------------------------------


decayed = optax.add_decayed_weights(0.01)
PLAIN = {  # ours at λ = ±∞, and Optax's
    "decay": (absgd(0.02, INF, weight_decay=0.01), optax.chain(decayed, optax.sgd(0.02, 0.9))),
    "nesterov": (absgd(0.02, -INF, nesterov=True), optax.sgd(0.02, 0.9, nesterov=True)),
    "no_momentum": (absgd(0.02, INF, momentum=None, weight_decay=0.01), optax.chain(decayed, optax.sgd(0.02))),
    "adam": (
        abadam(0.02, INF, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.1),
        optax.adamw(0.02, 0.8, 0.95, 1e-3, weight_decay=0.1),
    ),
}


def both_trajectories(ours, theirs, size, steps, wrap):
    """Risks and parameters of our optimizer at λ = ±∞ and of Optax's on the mean, from zero."""

    def step_of_ours(params, state, x, y):
        risk, grads = absgd_jax.value_and_grad(losses_of)(params, x, y, state=state)
        updates, state = ours.update(grads, state, params, value=risk)
        return optax.apply_updates(params, updates), state, risk

    def step_of_theirs(params, state, x, y):
        mean, grads = jax.value_and_grad(lambda p: jnp.mean(losses_of(p, x, y)))(params)
        updates, state = theirs.update(grads, state, params)
        return optax.apply_updates(params, updates), state, mean

    for optimizer, step in ((ours, step_of_ours), (theirs, step_of_theirs)):
        params, step, path = zeros(), wrap(step), []
        state = optimizer.init(params)
        for t in range(steps):
            params, state, risk = step(params, state, *regression(t, size, noise=1.0))
            path.append((risk, params))
        yield path


@pytest.mark.parametrize(("size", "name"), [(7, "decay"), (1, "nesterov"), (100, "no_momentum"), (7, "adam")])
def test_infinite_temperature_is_optax_s_optimizer_bit_for_bit(size, name):
    # Operation by operation: which products a compiled program fuses into sums is the compiler's choice.
    ours, theirs = both_trajectories(*PLAIN[name], size, 4, lambda step: step)
    assert_trees(assert_array_equal, [params for _, params in ours], [params for _, params in theirs])
    assert_allclose([risk for risk, _ in ours], [mean for mean, _ in theirs], rtol=2e-7)


@pytest.mark.parametrize("size", [3, 24])
@pytest.mark.parametrize("pair", PLAIN.values(), ids=PLAIN)
def test_infinite_temperature_is_optax_s_optimizer_when_compiled(pair, size):
    assert_trees(assert_allclose, *both_trajectories(*pair, size, 10, jax.jit), rtol=2e-6, atol=1e-6)


# --- both APIs ------------------------------------------------------------------------------------------------------

SETTINGS = {
    "positive": (2.0, 0.9, False),
    "positive_corrected": (2.0, 0.3, True),
    "negative": (-2.0, 0.5, False),
    "infinite": (INF, 0.9, False),
    # In numbers without rounding, because optax computes schedules in float32 whatever the rest is computed in.
    "schedules": (optax.linear_schedule(4.0, 1.0, 32), optax.linear_schedule(1.0, 0.25, 32), False),
    "two_stages_corrected": (lambda count: jnp.where(count < 20, INF, 1.0), 0.5, True),
    "kl_radius": (kl_radius(0.5), 0.9, False),
    "adaptive_gamma": (2.0, adaptive_gamma(-1.0), False),
    "both_corrected": (kl_radius(0.3, init=-5.0), adaptive_gamma(1.0), True),
}


@pytest.mark.parametrize(("temperature", "gamma", "bias_correction"), SETTINGS.values(), ids=SETTINGS)
def test_both_apis_take_the_same_path(temperature, gamma, bias_correction):
    weighting = weight_by_absgd(temperature, gamma, bias_correction=bias_correction)
    transform = scale_by_absgd(temperature, gamma, bias_correction=bias_correction)
    sgd = optax.sgd(0.01, momentum=0.9)

    def by_gradient(carry, batch):
        params, state, trace = carry
        (risk, kl), grads = risk_and_grad(params, *batch[:2], state=state, where=batch[2])
        grads, state = transform.update(grads, state, params, value=risk, kl=kl)
        updates, trace = sgd.update(grads, trace)
        params = optax.apply_updates(params, updates)
        return (params, state, trace), params

    def by_loss(carry, batch):
        params, state, trace = carry

        def objective(params):
            losses = losses_of(params, *batch[:2])
            p, new = weighting.update(losses, state, where=batch[2])
            return jnp.mean(p * losses, where=batch[2]), new

        grads, state = jax.grad(objective, has_aux=True)(params)
        updates, trace = sgd.update(grads, trace)
        params = optax.apply_updates(params, updates)
        return (params, state, trace), params

    x, y = (np.stack(a) for a in zip(*(regression(t, noise=1.0) for t in range(50)), strict=True))
    where = np.random.default_rng(1).random((50, 24)) < np.linspace(0.4, 1.6, 50)[:, None]
    where[3] = False
    with jax.enable_x64(True):  # so that rounding has no time to grow
        params, batches, ends = zeros(np.float64), (x.astype(np.float64), y.astype(np.float64), where), []
        for step, init in ((by_gradient, transform.init(params)), (by_loss, weighting.init())):
            (_, state, _), path = jax.jit(partial(jax.lax.scan, step))((params, init, sgd.init(params)), batches)
            ends.append((path, state))
    assert_trees(assert_allclose, *ends, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("temperature", "value"), [(-1.0, 200.0), (1000.0, 3000.0)])
def test_the_factor_of_a_far_risk_has_a_derivative(temperature, value):
    optimizer = scale_by_absgd(temperature)
    state = optimizer.init(zeros())._replace(risk=jnp.float32(10), mass=jnp.float32(1))
    slope = jax.grad(lambda v: optimizer.update(jnp.float32(1), state, value=v)[0])
    h = 1e-3 * value
    numeric = (optimizer.update(1.0, state, value=value + h)[0] - optimizer.update(1.0, state, value=value - h)[0]) / (
        2 * h
    )
    assert_allclose(slope(jnp.float32(value)), numeric, rtol=2e-2, atol=1e-7)


def test_a_bound_that_alone_is_injected_holds_at_once():
    optimizer = optax.inject_hyperparams(absgd)(0.01, temperature=kl_radius(0.3), max_weight=5.0)
    state = optimizer.init(zeros())
    for t in range(3):
        (risk, kl), grads = risk_and_grad(zeros(), *regression(t), state=state)
        _, state = optimizer.update(grads, state, zeros(), value=risk, kl=kl)
    state.hyperparams["max_weight"] = jnp.float32(1.2)
    inner = state.inner_state[0]._replace(max_weight=jnp.float32(1.2))
    batch = regression(9)
    expected = entropic_risk(losses_of(zeros(), *batch), inner.temperature, threshold=inner.threshold)
    assert_allclose(risk_and_grad(zeros(), *batch, state=state)[0][0], expected, rtol=1e-6)
    assert expected < 0.99 * entropic_risk(losses_of(zeros(), *batch), inner.temperature)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.complex64])
def test_updates_need_no_implicit_promotion(dtype):
    optimizer, grads = scale_by_absgd(1.0), {"w": jnp.ones(3, dtype)}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        updates, _ = optimizer.update(grads, optimizer.init(grads), value=1.0)
    assert updates["w"].dtype == dtype
    assert_allclose(updates["w"].real, 1 / 0.9, rtol=1e-2)


def test_float64_and_micro_batches_of_complex_numbers_need_no_implicit_promotion():
    f = absgd_jax.value_and_grad(lambda w, x: jnp.abs(w * x) ** 2, num_microbatches=2)
    w, x = jnp.complex64(1 + 2j), jnp.arange(4, dtype=jnp.complex64)
    expected = jax.grad(lambda w: 1.5 * jnp.log(jnp.mean(jnp.exp(jnp.abs(w * x) ** 2 / 1.5))))(w)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        assert scale_by_absgd(1.0).init({"a": np.ones(2), "b": np.float32(1)}).risk.dtype == np.float64
        assert_allclose(f(w, x, temperature=1.5)[1], expected, rtol=1e-6)


def test_a_state_is_made_without_an_infinity():
    with jax.debug_infs(True):
        for temperature in (1.0, INF, -INF):
            absgd(0.1, temperature).init(zeros())
