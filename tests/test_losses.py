"""Each loss against its paper's formula, by hand and in 30 digits, up to the edges of every dtype; and what all share."""

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
FOCUSINGS = (0, 0.25, 0.5, 0.9, 1, 2.0, 5, np.float64(0), np.float32(0.5), np.int32(2))
DTYPES = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 3e-5, "float64": 1e-12}  # and what gradients may be off by
IGNORED = (255, -100, -1, 3)
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


def formula(logits, probabilities, focusing=0.0):
    """Σ_j q_j (1 - p_j)^φ (-log p_j) and its gradient in the logits, in 30 digits and without a cancellation."""
    with mpmath.workdps(30):
        z, phi = [mpmath.mpf(float(x)) for x in logits], mpmath.mpf(float(focusing))
        loss, grads = mpmath.mpf(0), [mpmath.mpf(0)] * len(z)
        for j, q in enumerate(probabilities):
            odds = mpmath.fsum(mpmath.exp(x - z[j]) for i, x in enumerate(z) if i != j)  # (1 - p_j) / p_j
            miss, surprise = odds / (1 + odds), mpmath.log1p(odds)
            loss += float(q) * miss**phi * surprise
            slope = float(q) * miss**phi * (1 + phi * surprise / odds)  # of the loss in -log p_j
            for k, x in enumerate(z):
                grads[k] += slope * (-miss if k == j else mpmath.exp(x - z[j]) / (1 + odds))
        return float(loss), np.array([float(g) for g in grads])


def truth(name, logits, probabilities):
    """The loss of the table above, and its gradient, of one example in float64."""
    if name == "focal":
        return formula(logits, probabilities, 2)
    if name == "ldam":
        loss, grads = formula(30 * (logits - 0.5 * COUNTS**-0.25 * probabilities), probabilities)
        return loss, 30 * grads
    return formula(logits + (2 if name == "logit_adjustment" else 1) * np.log(COUNTS / 111), probabilities)


def sigmoid_truth(name, logit, label, column):
    shift = 0 if name == "sigmoid_focal" else 2 * np.log(PAIRS[column, 1] / PAIRS[column, 0])
    loss, grads = formula([0, logit + shift], [1 - label, label], 2 if name == "sigmoid_focal" else 0)
    return loss, grads[1]


def cross_entropy(logits, label):
    return np.log(np.sum(np.exp(logits))) - logits[label]


def values_and_grads(loss, logits, labels):
    """The losses of a batch, and the gradient of each in its own logits."""
    values, pull = jax.vjp(lambda logits: loss(logits, labels), logits)
    return np.asarray(values, np.float64), np.asarray(pull(jnp.ones_like(values))[0], np.float64)


def assert_close(actual, expected, dtype):
    """To the precision of the dtype, relative to each number; what lies below the dtype's smallest may be 0."""
    rtol = DTYPES[dtype]
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=float(jnp.finfo(dtype).tiny))


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
    np.testing.assert_allclose(soft, -[0.25, 0.75] @ np.log(z / z.sum()), rtol=1e-5)
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
            value, pull = jax.vjp(lambda z, labels=labels: (LOSSES | SIGMOID)[name](z, labels, **arguments), logits)
            assert value.dtype == expected
            assert pull(value)[0].dtype == dtype


@pytest.mark.parametrize("focusing", FOCUSINGS, ids=repr)
@pytest.mark.parametrize("dtype", DTYPES)
def test_focal_and_its_gradient_are_right_at_every_edge(dtype, focusing):
    with jax.enable_x64(dtype == "float64"):
        logits = jnp.asarray(EDGES, dtype)
        one_hot = np.eye(3)[np.zeros(len(EDGES), int)]
        smooth = one_hot * 0.75 + 0.125  # exact in every dtype, sums to 1.125 - 0.125 at the label below
        smooth[:, 0] -= 0.125
        for labels, q in ((np.zeros(len(EDGES), int), one_hot), (one_hot, one_hot), (smooth, smooth)):
            expected = [formula(z, row, focusing) for z, row in zip(np.asarray(logits, float), q, strict=True)]
            loss = jax.jit(lambda z, phi, labels=labels: losses.focal(z, labels, focusing=phi))
            for phi in (focusing, jnp.asarray(focusing)):
                call = loss if phi is not focusing else lambda z, phi, y=labels: losses.focal(z, y, focusing=phi)
                values, grads = values_and_grads(lambda z, _, call=call, phi=phi: call(z, phi), logits, None)
                assert_close(values, [v for v, _ in expected], max("float32", dtype))
                assert_close(grads, [g for _, g in expected], dtype)
