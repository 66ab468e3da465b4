"""Each loss against a case computed by hand from its paper's formula, and the conventions that all share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from absgd_jax import losses

COUNTS = jnp.array([100, 10, 1])
LOSSES = {
    "focal": losses.focal,
    "ldam": partial(losses.ldam, class_counts=COUNTS),
    "balanced_softmax": partial(losses.balanced_softmax, class_counts=COUNTS),
    "logit_adjustment": partial(losses.logit_adjustment, class_counts=COUNTS),
}
rng = np.random.default_rng(0)
LOGITS = np.float32(rng.normal(size=(4, 5, 3)))
LABELS = rng.integers(3, size=(4, 5))


def cross_entropy(logits, label):
    return np.log(np.sum(np.exp(logits))) - logits[label]


def test_focal_by_hand():
    # p = (3/4, 1/4): -(1/4)^2 log 3/4 and -(3/4)^3 log 1/4
    logits = jnp.log(jnp.array([3.0, 1.0]))
    np.testing.assert_allclose(losses.focal(logits, 0), -np.log(0.75) / 16, rtol=1e-5)
    np.testing.assert_allclose(losses.focal(logits, 1, focusing=3), -np.log(0.25) * 27 / 64, rtol=1e-5)


def test_focal_without_focusing_is_cross_entropy():
    expected = optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS)
    np.testing.assert_allclose(losses.focal(LOGITS, LABELS, focusing=0.0), expected, rtol=1e-6)


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
    z = np.array([81, 1]) * np.exp([0.3, -0.2])
    np.testing.assert_allclose(losses.logit_adjustment(logits, 1, counts, tau=2.0), -np.log(z[1] / z.sum()), rtol=1e-5)


def test_class_balanced_weights_by_hand():
    # β = 1/2: effective numbers of 1, 2, 3 examples are 1, 3/2, 7/4, up to a factor; inverses 1, 2/3, 4/7 sum to 47/21.
    weights = losses.class_balanced_weights(jnp.array([1, 2, 3]), beta=0.5)
    np.testing.assert_allclose(weights, np.array([1, 2 / 3, 4 / 7]) * 3 * 21 / 47, rtol=1e-6)
    np.testing.assert_array_equal(losses.class_balanced_weights(COUNTS, beta=0.0), 1)


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


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_per_example_and_keep_the_shape_of_the_labels(name):
    together = jax.jit(LOSSES[name])(LOGITS, LABELS)
    assert together.shape == LABELS.shape
    np.testing.assert_allclose(together[2, 3], LOSSES[name](LOGITS[2, 3], LABELS[2, 3]), rtol=1e-5)
    assert np.all(together >= 0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_losses_keep_the_dtype_of_the_logits(name, dtype):
    assert LOSSES[name](jnp.asarray(LOGITS, dtype), LABELS).dtype == dtype


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_finite_where_the_example_is_certain(name):
    for logits in ([200.0, -200.0, 0.0], [-200.0, 200.0, 0.0]):
        value, grads = jax.value_and_grad(LOSSES[name])(jnp.array(logits), 0)
        assert np.isfinite(value)
        assert np.all(np.isfinite(grads))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.focal(LOGITS, LABELS, focusing=-1.0), "focusing=-1.0"),
        (lambda: losses.ldam(LOGITS, LABELS, COUNTS, max_margin=0.0), "max_margin=0.0"),
        (lambda: losses.ldam(LOGITS, LABELS, COUNTS, exponent=-2.0), "exponent=-2.0"),
        (lambda: losses.ldam(LOGITS, LABELS, COUNTS, scale=float("inf")), "scale=inf"),
        (lambda: losses.logit_adjustment(LOGITS, LABELS, COUNTS, tau=float("nan")), "tau=nan"),
        (lambda: losses.class_balanced_weights(COUNTS, beta=1.0), "beta=1.0"),
        (lambda: losses.deferred_reweighting(jnp.ones(3), start=-1), "start=-1"),
    ],
)
def test_bad_numbers_are_quoted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
