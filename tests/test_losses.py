"""Each loss against its paper's formula, by hand and in 30 digits, up to the edges of every dtype."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest

import absgd_jax
from absgd_jax import losses

COUNTS = np.array([100, 10, 1])
PAIRS = np.array([[90, 10], [50, 50], [1, 99]])  # negatives and positives of each label
FOCUSINGS = (0, 0.25, 0.5, 0.9, 1, 2, 5)
DTYPES = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 3e-5, "float64": 1e-12}  # and what gradients may be off by
rng = np.random.default_rng(0)
LOGITS = np.float32(rng.normal(size=(4, 5, 3)))
LABELS = rng.integers(3, size=(4, 5))
SOFT = rng.dirichlet(np.ones(3), size=(4, 5)).astype(np.float32)
# From chance to certainty, right and wrong, by a little and by far more than any dtype resolves.
EDGES = [[0, 0, 0], [0.25, -0.5, 1], [5, 0, 0], [0, 5, 5], [20, 0, 0], [0, 20, 0], [200, -200, 0], [-200, 200, 0]]
EDGES = np.array([*EDGES, [1e4, -1e4, 0], [-1e4, 1e4, 0], [1e4, 1e4, 0]])

SOFTMAX = {
    "focal": losses.focal,
    "balanced_softmax": partial(losses.balanced_softmax, class_counts=COUNTS),
    "logit_adjustment": partial(losses.logit_adjustment, class_counts=COUNTS, tau=2.0),
}
LOSSES = SOFTMAX | {"ldam": partial(losses.ldam, class_counts=COUNTS)}
SIGMOID = {
    "sigmoid_focal": losses.sigmoid_focal,
    "sigmoid_logit_adjustment": partial(losses.sigmoid_logit_adjustment, class_counts=PAIRS, tau=2.0),
}


@mpmath.workdps(30)
def formula(logits, probabilities, focusing=0):
    """Σ_j q_j (1 - p_j)^φ (-log p_j) and its gradient in the logits, in 30 digits and without a cancellation."""
    z, phi, loss = [mpmath.mpf(x if isinstance(x, mpmath.mpf) else float(x)) for x in logits], float(focusing), 0
    grads = [mpmath.mpf(0)] * len(z)
    for j, q in enumerate(map(float, probabilities)):
        odds = mpmath.fsum(mpmath.exp(x - z[j]) for i, x in enumerate(z) if i != j)  # (1 - p_j) / p_j
        miss, surprise = odds / (1 + odds), mpmath.log1p(odds)
        loss += q * miss**phi * surprise
        slope = q * miss**phi * (1 + phi * surprise / odds)  # of the loss in -log p_j
        for k, x in enumerate(z):
            grads[k] += slope * (-miss if k == j else mpmath.exp(x - z[j]) / (1 + odds))
    return float(loss), np.array([float(g) for g in grads])


@mpmath.workdps(30)
def truth(name, logits, probabilities):
    """The loss of the table above, and its gradient, of one example."""
    z = np.array([mpmath.mpf(float(x)) for x in logits])
    if name == "focal":
        return formula(z, probabilities, 2)
    if name == "ldam":
        loss, grads = formula(30 * (z - 0.5 * COUNTS**-0.25 * probabilities), probabilities)
        return loss, 30 * grads
    return formula(z + (2 if name == "logit_adjustment" else 1) * np.log(COUNTS / 111), probabilities)


def sigmoid_truth(name, logit, label, column):
    shift = 0 if name == "sigmoid_focal" else 2 * np.log(PAIRS[column, 1] / PAIRS[column, 0])
    loss, grads = formula([0, logit + shift], [1 - label, label], 2 if name == "sigmoid_focal" else 0)
    return loss, grads[1]


def cross_entropy(logits, label):
    return np.log(np.sum(np.exp(logits))) - logits[label]


def values_and_grads(loss, logits, labels):
    """The losses of a batch, and the gradient of each in its own logits."""
    values, pull = jax.vjp(lambda logits: loss(logits, labels), logits)
    return values, pull(jnp.ones_like(values))[0]


def widest(dtype):
    return "float64" if dtype == "float64" else "float32"


def assert_close(actual, expected, dtype, scale=0):
    """To the precision of the dtype, relative to each number or to ``scale``; below the smallest one 0 will do."""
    error = DTYPES[dtype] * np.maximum(np.abs(expected), scale) + float(jnp.finfo(dtype).tiny)
    assert np.all(np.abs(np.float64(actual) - expected) <= error), (actual, expected)  # so that NaN fails


def test_focal_by_hand():
    # p = (3/4, 1/4): -(1/4)^2 log 3/4 and -(3/4)^3 log 1/4
    logits = jnp.log(jnp.array([3.0, 1.0]))
    np.testing.assert_allclose(losses.focal(logits, 0), -np.log(0.75) / 16, rtol=1e-5)
    np.testing.assert_allclose(losses.focal(logits, 1, focusing=3), -np.log(0.25) * 27 / 64, rtol=1e-5)
    soft = -0.25 * np.log(0.75) / 16 - 0.75 * np.log(0.25) * 9 / 16
    np.testing.assert_allclose(losses.focal(logits, jnp.array([0.25, 0.75])), soft, rtol=1e-5)


def test_focal_without_focusing_is_cross_entropy():
    expected = optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS)
    np.testing.assert_allclose(losses.focal(LOGITS, LABELS, focusing=0.0), expected, rtol=1e-6)
    expected = optax.softmax_cross_entropy(LOGITS, SOFT)
    np.testing.assert_allclose(losses.focal(LOGITS, SOFT, focusing=0.0), expected, rtol=1e-5)
    expected = optax.sigmoid_binary_cross_entropy(LOGITS, SOFT)
    np.testing.assert_allclose(losses.sigmoid_focal(LOGITS, SOFT, focusing=0.0), expected, rtol=1e-5)


def test_ldam_by_hand():
    # n = (16, 1): n^(-1/4) = (1/2, 1), so the margins are 1/4 and 1/2.
    cosines, counts = jnp.array([0.6, 0.2]), jnp.array([16, 1])
    for label, shifted in ((0, [0.35, 0.2]), (1, [0.6, -0.3])):
        loss = losses.ldam(cosines, label, counts, scale=10.0)
        np.testing.assert_allclose(loss, cross_entropy(10 * np.array(shifted), label), rtol=1e-5)
    # n = (32, 1) with exponent 2/5: margins 0.8 / 4 and 0.8
    loss = losses.ldam(cosines, 0, jnp.array([32, 1]), max_margin=0.8, exponent=0.4, scale=1.0)
    np.testing.assert_allclose(loss, cross_entropy(np.array([0.4, 0.2]), 0), rtol=1e-5)


def test_balanced_softmax_and_logit_adjustment_by_hand():
    logits, counts = jnp.array([0.3, -0.2]), jnp.array([9, 1])
    z = np.array([9, 1]) * np.exp([0.3, -0.2])
    np.testing.assert_allclose(losses.balanced_softmax(logits, 1, counts), -np.log(z[1] / z.sum()), rtol=1e-5)
    soft = losses.balanced_softmax(logits, jnp.array([0.25, 0.75]), counts)
    np.testing.assert_allclose(soft, -np.dot([0.25, 0.75], np.log(z / z.sum())), rtol=1e-5)
    z = np.array([81, 1]) * np.exp([0.3, -0.2])
    np.testing.assert_allclose(losses.logit_adjustment(logits, 1, counts, tau=2.0), -np.log(z[1] / z.sum()), rtol=1e-5)


def test_sigmoid_losses_by_hand():
    # p = 3/4; with the odds of the counts, 1 : 9, squared, p = 3 / (3 + 81)
    logits, labels = np.float32(np.log([3.0, 3.0, 3.0])), np.array([0, 1, 0.25])
    focal = np.array([-np.log(0.25) * 9 / 16, -np.log(0.75) / 16])
    focal = [*focal, 0.75 * focal[0] + 0.25 * focal[1]]
    np.testing.assert_allclose(losses.sigmoid_focal(logits, labels), focal, rtol=1e-5)
    adjusted = np.array([-np.log(81 / 84), -np.log(3 / 84)])
    adjusted = [*adjusted, 0.75 * adjusted[0] + 0.25 * adjusted[1]]
    for counts in ([18, 2], [[9, 1], [18, 2], [90, 10]]):
        loss = losses.sigmoid_logit_adjustment(logits, labels, counts, tau=2.0)
        np.testing.assert_allclose(loss, adjusted, rtol=1e-5)


def test_class_balanced_weights_by_hand():
    # β = 1/2: effective numbers of 1, 2, 3 examples are 1, 3/2, 7/4, up to a factor; inverses 1, 2/3, 4/7 sum to 47/21.
    weights = losses.class_balanced_weights(jnp.array([1, 2, 3]), beta=0.5)
    np.testing.assert_allclose(weights, np.array([1, 2 / 3, 4 / 7]) * 3 * 21 / 47, rtol=1e-6)
    np.testing.assert_array_equal(losses.class_balanced_weights(COUNTS, beta=0.0), 1)
    # Of each label: inverses 1 and 2/3 sum to 5/3, equal counts weigh alike, a value that does not occur has no weight.
    weights = losses.class_balanced_weights([[1, 2], [3, 3], [0, 7]], beta=0.5)
    np.testing.assert_allclose(weights, [[1.2, 0.8], [1, 1], [0, 1]], rtol=1e-6)


def test_class_balanced_weights_as_published_for_cifar10_lt():
    counts = (5000 * 0.01 ** (np.arange(10) / 9)).astype(int)
    weights = (1 - 0.9999) / (1 - 0.9999 ** counts.astype(float))
    weights *= 10 / weights.sum()
    np.testing.assert_allclose(losses.class_balanced_weights(counts), weights, rtol=1e-5)
    assert losses.class_balanced_weights(counts).sum() == pytest.approx(10)


def test_deferred_reweighting_starts_at_its_step():
    schedule = jax.jit(losses.deferred_reweighting(jnp.array([0.5, 1.5]), start=3))
    np.testing.assert_array_equal([schedule(t) for t in (0, 2)], 1)
    np.testing.assert_array_equal([schedule(t) for t in (3, 9)], [[0.5, 1.5]] * 2)


@pytest.mark.parametrize("name", LOSSES | SIGMOID)
def test_losses_are_per_example_and_keep_the_shape_of_the_labels(name):
    loss, labels = (LOSSES | SIGMOID)[name], LABELS if name in LOSSES else LABELS[..., None] == np.arange(3)
    together = jax.jit(loss)(LOGITS, labels)
    assert together.shape == labels.shape
    np.testing.assert_allclose(together[2, 3], loss(LOGITS[2, 3], labels[2, 3]), rtol=1e-5)
    assert np.all(together >= 0)
    assert loss(LOGITS[:0], labels[:0]).shape == labels[:0].shape


@pytest.mark.parametrize("name", LOSSES | SIGMOID)
@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_have_float32_or_the_wider_dtype_of_the_logits(name, dtype):
    with jax.enable_x64(True):
        arguments = {
            "focal": {"focusing": np.float64(2)},
            "ldam": {"max_margin": np.float64(0.5), "exponent": np.float64(0.25), "scale": np.float64(30)},
            "logit_adjustment": {"tau": np.float64(1)},
        }.get(name.removeprefix("sigmoid_"), {})
        logits = jnp.asarray(LOGITS, dtype)
        expected = "float64" if dtype == "float64" else "float32"
        for labels in (LABELS, SOFT.astype(np.float64)) if name in SOFTMAX else (SOFT if name in SIGMOID else LABELS,):
            loss = partial((LOSSES | SIGMOID)[name], labels=labels, **arguments)
            value, grads = jax.eval_shape(lambda z, loss=loss: (loss(z), jax.grad(lambda z: loss(z).sum())(z)), logits)
            assert value.dtype == expected
            assert grads.dtype == dtype


@pytest.mark.parametrize("q", [0, [1.0, 0, 0], [0.75, 0.25, 0]], ids=["hard", "one_hot", "soft"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_focal_and_its_gradient_are_right_at_every_edge(dtype, q):
    with jax.enable_x64(dtype == "float64"):
        logits, labels = jnp.asarray(EDGES, dtype), jnp.broadcast_to(jnp.asarray(q), (len(EDGES), *np.shape(q)))
        of_focusing = jax.jit(lambda phi: values_and_grads(partial(losses.focal, focusing=phi), logits, labels))
        for phi in FOCUSINGS:
            values, grads = map(np.float64, of_focusing(phi))
            pairs = [formula(z, [1, 0, 0] if q == 0 else q, phi) for z in np.float64(logits)]
            expected, slopes = map(np.array, zip(*pairs, strict=True))
            assert_close(values, expected, widest(dtype))
            # The terms of soft labels cancel, those of a single one do not.
            assert_close(grads, slopes, dtype, scale=np.max(q) < 1 and np.abs(slopes).max(-1, keepdims=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigmoid_focal_and_its_gradient_are_right_at_every_edge(dtype):
    with jax.enable_x64(dtype == "float64"):
        logits = jnp.asarray(np.unique(EDGES), dtype)
        of_focusing = jax.jit(lambda phi, y: values_and_grads(partial(losses.sigmoid_focal, focusing=phi), logits, y))
        for label in (0, 1, 0.25):
            for phi in FOCUSINGS:
                values, grads = map(np.float64, of_focusing(phi, jnp.full(logits.shape, label, float)))
                pairs = [formula([0, z], [1 - label, label], phi) for z in np.float64(logits)]
                expected, slopes = np.array([(v, g[1]) for v, g in pairs]).T
                assert_close(values, expected, widest(dtype))
                assert_close(grads, slopes, dtype, scale=label == 0.25 and 1e-3)


@pytest.mark.parametrize(
    "focusing", [*FOCUSINGS, 0.0, np.float64(0), np.float32(0.5), np.int32(2), np.array(0.5)], ids=repr
)
def test_a_focusing_may_be_any_number(focusing):
    logits = np.float32(EDGES)
    values, grads = values_and_grads(partial(losses.focal, focusing=focusing), logits, np.zeros(len(EDGES), int))
    expected, slopes = map(np.array, zip(*[formula(z, [1, 0, 0], focusing) for z in logits], strict=True))
    assert_close(values, expected, "float32")
    assert_close(grads, slopes, "float32")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_loss_and_its_gradient_are_right_at_every_edge(dtype, name):
    with jax.enable_x64(dtype == "float64"):
        logits = jnp.asarray(EDGES, dtype)
        for label in range(3):
            values, grads = values_and_grads(LOSSES[name], logits, np.full(len(logits), label))
            pairs = [truth(name, z, np.eye(3)[label]) for z in np.float64(logits)]
            expected, slopes = map(np.array, zip(*pairs, strict=True))
            assert_close(values, expected, widest(dtype), scale=1)
            assert_close(grads, slopes, dtype, scale=1)


@pytest.mark.parametrize("name", SIGMOID)
def test_sigmoid_losses_and_their_gradients(name):
    logits, labels = LOGITS.reshape(-1, 3), np.stack([LABELS == 0, LABELS, SOFT[..., 0]], -1).reshape(-1, 3)
    labels = np.minimum(labels, 1)
    values, grads = values_and_grads(SIGMOID[name], logits, labels)
    for (i, j), value in np.ndenumerate(values):
        np.testing.assert_allclose((value, grads[i, j]), sigmoid_truth(name, logits[i, j], labels[i, j], j), rtol=1e-4)


@pytest.mark.parametrize("name", SOFTMAX)
def test_soft_labels_and_their_gradients(name):
    logits, q = LOGITS[0], SOFT[0].copy()
    q[0] = [1, 0, 0]
    values, grads = values_and_grads(SOFTMAX[name], logits, q)
    to_labels = jax.grad(lambda q: SOFTMAX[name](logits, q).sum())(q)
    for i, z in enumerate(logits):
        value, slopes = truth(name, z, q[i])
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        np.testing.assert_allclose(grads[i], slopes, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(to_labels[i], [truth(name, z, e)[0] for e in np.eye(3)], rtol=1e-5)


@pytest.mark.parametrize("name", SOFTMAX)
def test_soft_labels_cost_no_array_over_pairs_of_classes(name):
    batch, classes = 4, 64
    loss = partial(getattr(losses, name), **({} if name == "focal" else {"class_counts": np.ones(classes)}))
    q = np.full((batch, classes), 1 / classes, np.float32)
    program = str(jax.make_jaxpr(jax.grad(lambda z: loss(z, q).sum()))(q))
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"f32\[([\d,]+)\]", program)]
    assert max(sizes) == batch * classes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["ldam", "balanced_softmax", "logit_adjustment"])
def test_counts_keep_their_digits_whatever_the_dtype_of_the_logits(name, dtype):
    counts = np.array([5000, 2997, 499])
    margins = 0.5 * (counts / 499) ** -0.25
    adjusted = -30 * np.diag(margins) if name == "ldam" else [np.log(counts / 8496)] * 3
    expected = [cross_entropy(z, y) for y, z in enumerate(adjusted)]
    for given in (counts, counts.tolist(), jnp.asarray(counts), counts.astype(float)):
        loss = getattr(losses, name)(jnp.zeros((3, 3), dtype), jnp.arange(3), given)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_counts_beyond_32_bits():
    loss = losses.balanced_softmax(jnp.zeros(2), 1, [6_000_000_000, 2_000_000_000])
    np.testing.assert_allclose(loss, np.log(4), rtol=1e-6)
    weights = losses.class_balanced_weights(np.array([6_000_000_000, 1]), beta=0.5)
    np.testing.assert_allclose(weights, [2 / 3, 4 / 3], rtol=1e-6)


def ldam_of(logits, labels, counts):
    return values_and_grads(partial(losses.ldam, class_counts=counts), logits, labels)


def adjusted_by(logits, labels, counts, tau):
    return values_and_grads(partial(losses.logit_adjustment, class_counts=counts, tau=tau), logits, labels)


WITH_COUNTS = (losses.class_balanced_weights, ldam_of, adjusted_by)


@pytest.mark.parametrize("of", [WITH_COUNTS, tuple(map(jax.jit, WITH_COUNTS))], ids=["seen", "traced"])
@pytest.mark.parametrize("absent", [0, 1, 2])
def test_a_class_that_does_not_occur_is_left_out(absent, of):
    class_balanced_weights, ldam, adjusted = of
    counts = np.where(np.arange(3) == absent, 0, [100, 10, 40])
    labels = np.flatnonzero(counts)
    n, logits = counts[labels], LOGITS[0, :2]

    weights = class_balanced_weights(counts)
    present = 1 / (1 - 0.9999 ** n.astype(float))
    np.testing.assert_allclose(weights[labels], present / present.sum() * 2, rtol=1e-5)
    assert weights[absent] == 0

    margins = 0.5 * (n / n.min()) ** -0.25
    for i, (value, grads) in enumerate(zip(*ldam(logits, labels, counts), strict=True)):
        q = np.eye(3)[labels[i]]
        expected, slopes = formula(30 * (logits[i] - margins[i] * q), q)
        np.testing.assert_allclose(value, expected, rtol=1e-4)
        np.testing.assert_allclose(grads, 30 * slopes, rtol=1e-4, atol=1e-5)

    for y in (labels, np.eye(3)[labels]):
        for tau in (1.0, -2.0, 0.0):
            inside = labels if tau else np.arange(3)
            shift = tau * np.log(n / n.sum()) if tau else 0
            for i, (value, grads) in enumerate(zip(*adjusted(logits, y, counts, tau), strict=True)):
                expected, slopes = formula(logits[i, inside] + shift, inside == labels[i])
                np.testing.assert_allclose(value, expected, rtol=1e-5)
                np.testing.assert_allclose(grads[inside], slopes, rtol=1e-4, atol=1e-6)
                assert tau == 0 or grads[absent] == 0


@pytest.mark.parametrize("jit", [False, True])
def test_a_label_that_does_not_occur_is_no_surprise_and_its_opposite_an_infinite_one(jit):
    def loss(z, tau):
        return losses.sigmoid_logit_adjustment(z, np.array([0, 1, 1]), [[5, 0], [0, 5], [5, 0]], tau=tau)

    values, pull = jax.vjp(jax.jit(loss) if jit else loss, LOGITS[0, 0], 1.0)
    np.testing.assert_array_equal(values, [0, 0, np.inf])
    np.testing.assert_array_equal(pull(jnp.array([1.0, 1.0, 0.0]))[0], 0)
    expected = optax.sigmoid_binary_cross_entropy(LOGITS[0, 0], np.array([0.0, 1.0, 1.0]))
    np.testing.assert_allclose(loss(LOGITS[0, 0], 0.0), expected, rtol=1e-5)


def test_the_label_of_a_class_that_does_not_occur():
    counts = np.array([9, 1, 0])
    value, grads = jax.value_and_grad(losses.balanced_softmax)(jnp.zeros(3), 2, counts)
    assert value == np.inf
    assert np.all(np.isfinite(grads))
    # It has the margin of the rarest class that does.
    np.testing.assert_allclose(
        losses.ldam(jnp.zeros(3), 2, counts, scale=1.0), cross_entropy([0, 0, -0.5], 2), rtol=1e-5
    )


def check_ignored(loss, logits, labels, kept, truth_of):
    """Ignored labels have the loss NaN; masked, they leave the gradient of the kept ones, from the formula, alone."""
    values, pull = jax.vjp(jax.jit(lambda z: loss(z, labels)), logits)
    np.testing.assert_array_equal(np.isnan(values), ~kept)
    pairs = [truth_of(*i) for i in np.argwhere(kept)]
    expected = np.array([v for v, _ in pairs])
    shares_of = jax.jit(jax.grad(lambda values, t: absgd_jax.entropic_risk(values, t, where=kept)))
    for temperature in (1.0, -1.0, float("inf")):
        shares = np.exp((expected - expected.max()) / temperature)
        (grads,) = pull(shares_of(values, temperature))
        np.testing.assert_array_equal(grads[~kept], 0)
        for found, share, (_, slopes) in zip(grads[kept], shares / shares.sum(), pairs, strict=True):
            np.testing.assert_allclose(found, share * slopes, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", ["int32", "uint8", "int8"])
def test_ignored_labels_are_nan_and_masked_leave_no_trace(name, dtype):
    ignored = {"int32": [255, -100, -1, 3, -(2**31)], "uint8": [255, 3, 4, 254, 7], "int8": [-1, -100, 3, 127, -128]}
    labels = np.array([0, 2, *ignored[dtype], 1], dtype)
    logits = np.float32(np.random.default_rng(1).normal(size=(8, 3)))
    logits[6] = [np.nan, np.inf, 1e4]
    kept = np.isin(labels, [0, 1, 2])
    check_ignored(LOSSES[name], logits, labels, kept, lambda i: truth(name, logits[i], np.eye(3)[labels[i]]))


@pytest.mark.parametrize("name", SOFTMAX)
def test_soft_labels_that_are_no_distribution_are_ignored(name):
    ignored = [[0, 0, 0], [np.nan] * 3, [-1, -1, -1], [255] * 3, [2, -1, 0], [1, np.nan, 0], [0.5, 0.4, 0]]
    labels = np.float32([*SOFT[0, :2], *ignored, SOFT[0, 2]])
    logits = np.float32(np.random.default_rng(1).normal(size=(10, 3)))
    logits[6] = [np.nan, np.inf, 1e4]
    kept = np.isin(np.arange(10), [0, 1, 9])
    check_ignored(SOFTMAX[name], logits, labels, kept, lambda i: truth(name, logits[i], labels[i]))


@pytest.mark.parametrize("name", SIGMOID)
def test_sigmoid_labels_outside_of_0_and_1_are_ignored(name):
    labels = np.float32([[0, -1, 1], [255, 0.5, 2], [-0.5, 1.5, np.nan], [np.inf, -np.inf, 1]])
    logits = np.float32(np.random.default_rng(1).normal(size=(4, 3)))
    logits[2] = np.nan
    kept = (labels >= 0) & (labels <= 1)
    check_ignored(SIGMOID[name], logits, labels, kept, lambda i, j: sigmoid_truth(name, logits[i, j], labels[i, j], j))
    whole = np.array([0, 1, -1, 255, -100, 2])
    np.testing.assert_array_equal(np.isnan(losses.sigmoid_focal(jnp.zeros(6), whole)), [0, 0, 1, 1, 1, 1])


def test_rounding_does_not_make_a_label_an_ignored_one():
    q = jnp.array([[1.004, 0.0, 0.0], [0.7, 0.2, 0.0956]])
    assert np.all(np.isfinite(losses.focal(jnp.zeros((2, 3)), q)))
    assert np.all(np.isfinite(losses.sigmoid_focal(jnp.zeros(2), jnp.array([1 + 2**-7, -1e-7]))))


def test_classes_that_the_user_masks_with_infinity():
    logits = jnp.array([[1.0, -jnp.inf, 0.0], [1.0, -jnp.inf, -jnp.inf]])
    for name, loss in SOFTMAX.items():
        for labels in (jnp.zeros(2, int), jnp.array([[1.0, 0.0, 0.0]] * 2)):
            values, grads = values_and_grads(loss, logits, labels)
            shift = np.log(COUNTS / 111) * {"focal": 0, "balanced_softmax": 1, "logit_adjustment": 2}[name]
            expected = formula(np.array([1.0, 0.0]) + shift[[0, 2]], [1, 0], 2 if name == "focal" else 0)
            np.testing.assert_allclose(values, [expected[0], 0], rtol=1e-5)
            np.testing.assert_allclose(grads, [np.insert(expected[1], 1, 0), [0, 0, 0]], rtol=1e-4)


@pytest.mark.parametrize("name", LOSSES)
def test_a_single_class_is_certain(name):
    loss = partial(getattr(losses, name), **({} if name == "focal" else {"class_counts": [7]}))
    for labels in (0, np.array([1.0])) if name in SOFTMAX else (0,):
        value, grads = jax.value_and_grad(loss)(jnp.array([3.0]), labels)
        assert (value, grads[0]) == (0, 0)


@pytest.mark.parametrize(
    "labels",
    [
        LABELS[..., None],
        LABELS[0],
        LABELS.T,
        LABELS.astype(float),
        LABELS == 1,
        np.eye(3, dtype=int)[LABELS],
        np.eye(3)[LABELS][..., None],
        np.eye(3)[LABELS][0],
        np.eye(4)[LABELS],
        1,
    ],
    ids=lambda labels: f"{getattr(labels, 'dtype', 'int')}{np.shape(labels)}",
)
@pytest.mark.parametrize("name", LOSSES)
def test_labels_that_do_not_fit_are_refused(name, labels):
    for loss in (LOSSES[name], jax.jit(LOSSES[name])):
        shapes = rf"have shape {re.escape(str(np.shape(labels)))}, logits have shape \(4, 5, 3\)"
        with pytest.raises(ValueError, match=rf"labels .* {shapes}: give integers of shape \(4, 5\)"):
            loss(LOGITS, labels)


@pytest.mark.parametrize("name", SIGMOID)
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (1, 5, 3), (3,), ()])
def test_sigmoid_labels_that_do_not_fit_are_refused(name, shape):
    with pytest.raises(ValueError, match=rf"labels have shape {re.escape(str(shape))}, logits have shape \(4, 5, 3\)"):
        SIGMOID[name](LOGITS, np.ones(shape))


def test_ldam_refuses_soft_labels():
    with pytest.raises(ValueError, match=r"float32.* have shape \(4, 5, 3\).*integers of shape \(4, 5\).*no margin"):
        losses.ldam(LOGITS, SOFT, COUNTS)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (4,), (3, 1), (1, 3), (4, 5, 3)])
@pytest.mark.parametrize("name", ["ldam", "balanced_softmax", "logit_adjustment", "sigmoid_logit_adjustment"])
def test_counts_that_do_not_fit_are_refused(name, shape):
    labels, fit = (SOFT, r"\(3, 2\) or \(2,\)") if name in SIGMOID else (LABELS, r"\(3,\)")
    if (name, shape) == ("sigmoid_logit_adjustment", (2,)):
        shape = (2, 3)
    message = rf"class_counts has shape {re.escape(str(shape))}, logits have shape \(4, 5, 3\).*shape {fit}"
    for counts in (np.ones(shape), jnp.ones(shape)):
        with pytest.raises(ValueError, match=message):
            getattr(losses, name)(LOGITS, labels, counts)


COUNTED = {
    "ldam": partial(losses.ldam, LOGITS, LABELS),
    "balanced_softmax": partial(losses.balanced_softmax, LOGITS, LABELS),
    "logit_adjustment": partial(losses.logit_adjustment, LOGITS, LABELS),
    "sigmoid_logit_adjustment": lambda counts: losses.sigmoid_logit_adjustment(LOGITS, SOFT, counts[:2]),
    "class_balanced_weights": losses.class_balanced_weights,
}


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("bad", [-5, -0.5, float("nan"), float("inf")])
def test_a_count_that_is_none_is_quoted(name, bad):
    for counts in ([7, bad, 1], (7, bad, 1), np.array([7, bad, 1]), np.array([7, bad, 1], np.float32)):
        with pytest.raises(ValueError, match=f"class_counts contains {bad}"):
            COUNTED[name](counts)


@pytest.mark.parametrize("name", COUNTED)
def test_no_class_at_all_is_refused(name):
    for counts in ([0, 0, 0], np.zeros(3), np.zeros(3, int)):
        with pytest.raises(ValueError, match=r"class_counts=.*0.*no class occurs"):
            COUNTED[name](counts)
    # Unseen under tracing: nothing is weighed, and nothing is NaN.
    np.testing.assert_array_equal(jax.jit(losses.class_balanced_weights)(jnp.zeros(3)), 0)


def test_a_label_that_neither_occurs_nor_is_absent_is_refused():
    with pytest.raises(ValueError, match=r"class_counts=.*0.*no class occurs"):
        losses.sigmoid_logit_adjustment(jnp.zeros((4, 2)), jnp.zeros((4, 2)), [[3, 2], [0, 0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.focal(LOGITS, LABELS, focusing=-1.0), "focusing=-1.0"),
        (lambda: losses.focal(LOGITS, LABELS, focusing=np.float32(-1.0)), "focusing=.*-1.0"),
        (lambda: losses.focal(LOGITS, LABELS, focusing=float("nan")), "focusing=nan"),
        (lambda: losses.sigmoid_focal(LOGITS, SOFT, focusing=float("inf")), "focusing=inf"),
        (lambda: losses.focal(LOGITS, LABELS, focusing=np.ones((4, 1))), r"focusing has shape \(4, 1\)"),
        (lambda: losses.ldam(LOGITS, LABELS, COUNTS, max_margin=0.0), "max_margin=0.0"),
        (lambda: losses.ldam(LOGITS, LABELS, COUNTS, exponent=-2.0), "exponent=-2.0"),
        (lambda: losses.ldam(LOGITS, LABELS, COUNTS, scale=float("inf")), "scale=inf"),
        (lambda: losses.ldam(LOGITS, LABELS, COUNTS, scale=jnp.ones(3)), r"scale has shape \(3,\)"),
        (lambda: losses.logit_adjustment(LOGITS, LABELS, COUNTS, tau=float("nan")), "tau=nan"),
        (lambda: losses.logit_adjustment(LOGITS, LABELS, COUNTS, tau=jnp.ones(3)), r"tau has shape \(3,\)"),
        (lambda: losses.sigmoid_logit_adjustment(LOGITS, SOFT, PAIRS, tau=float("inf")), "tau=inf"),
        (lambda: losses.class_balanced_weights(COUNTS, beta=1.0), "beta=1.0"),
        (lambda: losses.class_balanced_weights(COUNTS, beta=np.float32(-0.5)), "beta=.*-0.5"),
        (lambda: losses.class_balanced_weights(7), r"class_counts has shape \(\)"),
        (lambda: losses.deferred_reweighting(jnp.ones(3), start=-1), "start=-1"),
        (lambda: losses.deferred_reweighting(jnp.ones(3), start=np.int64(-1)), "start=.*-1"),
    ],
)
def test_bad_numbers_are_quoted(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint32])
@pytest.mark.parametrize("name", LOSSES)
def test_labels_of_any_integers_without_implicit_promotion(name, dtype):
    expected = [truth(name, z, np.eye(3)[label])[0] for z, label in zip(LOGITS[0], LABELS[0], strict=True)]
    logits, labels = jnp.asarray(LOGITS[0]), jnp.asarray(LABELS[0], dtype)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        np.testing.assert_allclose(LOSSES[name](logits, labels), expected, rtol=1e-5)


def test_soft_and_sigmoid_losses_without_implicit_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for loss in SOFTMAX.values():
            loss(jnp.asarray(LOGITS), jnp.asarray(SOFT))
        for loss in SIGMOID.values():
            loss(jnp.asarray(LOGITS), jnp.asarray(SOFT > 0.5))


def test_a_class_beyond_the_labels_dtype_is_not_taken_for_another():
    logits = jnp.zeros(300).at[44].set(5.0).at[43].set(4.0)
    found = losses.focal(logits, jnp.uint8(44), focusing=0.0)
    np.testing.assert_allclose(found, optax.softmax_cross_entropy_with_integer_labels(logits, 44), rtol=1e-5)
