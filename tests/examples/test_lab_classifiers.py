"""Laboratory: the second-stage classifiers against scikit-learn, SciPy and closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from examples.lab.classifiers import CLASSIFIERS, Linear, crt, lws, ncm, tau_normalised
from examples.lab.input_pipeline import class_balanced

COUNTS = (200, 60, 20)


def clusters(counts, seed=0, dimension=5, centre=2.0, spread=0.7):
    """Gaussians around as many unit vectors, moved by ``centre`` as ReLU features are."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    features = centre + np.eye(dimension)[labels] + spread * rng.normal(size=(len(labels), dimension))
    return features.astype(np.float32), labels.astype(np.int32)


@pytest.fixture
def linear():
    rng = np.random.default_rng(1)
    return Linear(jnp.asarray(rng.normal(size=(5, 3)), jnp.float32), jnp.asarray(rng.normal(size=3), jnp.float32))


def guesses(linear, features):
    return np.asarray(jnp.argmax(features @ linear.kernel + linear.bias, axis=-1))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_ncm_is_the_nearest_centroid_of_unit_features():
    features, labels = clusters(COUNTS)
    queries, truth = clusters((100, 100, 100), seed=1)
    centre = features.mean(0)
    means = NearestCentroid().fit(unit(features - centre), labels).centroids_
    nearest = KNeighborsClassifier(1).fit(unit(means), np.arange(3))
    linear = ncm(jnp.asarray(features), jnp.asarray(labels), 3)
    np.testing.assert_array_equal(guesses(linear, queries), nearest.predict(unit(queries - centre)))
    np.testing.assert_allclose(linear.kernel.T, unit(means), atol=1e-5)
    assert np.mean(guesses(linear, queries) == truth) > 0.7


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_tau_norm_evens_out_the_lengths(linear, tau):
    after = tau_normalised(linear, tau)
    lengths = np.linalg.norm(linear.kernel, axis=0)
    np.testing.assert_allclose(np.linalg.norm(after.kernel, axis=0), lengths ** (1 - tau), rtol=1e-5)
    np.testing.assert_allclose(unit(after.kernel.T), unit(linear.kernel.T), rtol=1e-5)
    assert not after.bias.any()
    features = clusters(COUNTS)[0]
    if tau == 0:
        np.testing.assert_array_equal(guesses(after, features), np.argmax(features @ linear.kernel, axis=-1))
    if tau == 1:  # the smallest angle
        np.testing.assert_array_equal(guesses(after, features), np.argmax(features @ (linear.kernel / lengths), -1))


def test_batches_are_balanced():
    labels = clusters(COUNTS)[1]
    size = 60_000
    drawn = np.asarray(class_balanced(jax.random.key(0), labels, steps=2, batch_size=size // 2, classes=3)).ravel()
    times = np.bincount(drawn, minlength=len(labels))
    expected = size / 3 / np.asarray(COUNTS)[labels]  # each class alike, and each example within its class
    assert np.all(np.abs(times - expected) < 5 * np.sqrt(expected))
    np.testing.assert_allclose(np.bincount(labels[drawn]), size / 3, rtol=0.03)


def test_a_class_that_does_not_occur_is_not_drawn():
    labels = np.array([0, 2, 2, 2, 0])
    drawn = np.asarray(class_balanced(jax.random.key(0), labels, steps=1, batch_size=6000, classes=4))[0]
    np.testing.assert_allclose(np.bincount(drawn) / 6000, [1 / 4, 1 / 6, 1 / 6, 1 / 6, 1 / 4], atol=0.03)


def test_crt_agrees_with_logistic_regression():
    features, labels = clusters((60, 60, 60), spread=0.1)
    truth = LogisticRegression().fit(features, labels)
    linear = jax.jit(partial(crt, classes=3, steps=300))(features, labels, key=jax.random.key(0))
    np.testing.assert_array_equal(guesses(linear, features), truth.predict(features))
    np.testing.assert_array_equal(guesses(linear, features), labels)


def test_crt_puts_the_boundary_midway_whatever_the_counts():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(2), [20_000, 200])
    features = (2 * labels - 1 + rng.normal(size=len(labels)))[:, None].astype(np.float32)

    def boundary(kernel, bias):
        return float((bias[0] - bias[1]) / (kernel[0, 1] - kernel[0, 0]))

    def of_scikit_learn(class_weight):
        model = LogisticRegression(class_weight=class_weight).fit(features, labels)
        return -model.intercept_[0] / model.coef_[0, 0]

    ours = boundary(*jax.jit(partial(crt, classes=2))(features, labels, key=jax.random.key(0)))
    assert ours == pytest.approx(0, abs=0.15)
    assert ours == pytest.approx(of_scikit_learn("balanced"), abs=0.1)
    assert of_scikit_learn(None) == pytest.approx(np.log(100) / 2, abs=0.3)  # the theory of equal variances


def test_lws_finds_the_best_factors_and_keeps_the_directions(linear):
    features, labels = clusters(COUNTS)
    after = jax.jit(partial(lws, steps=2000))(features, labels, linear, jax.random.key(0))
    factors = np.asarray(after.bias / linear.bias)
    np.testing.assert_allclose(after.kernel, linear.kernel * factors, rtol=1e-5)

    logits = np.asarray(features @ linear.kernel + linear.bias, np.float64)
    weights = 1 / (3 * np.asarray(COUNTS)[labels])

    def risk(factors):
        losses = -log_softmax(factors * logits, axis=-1)[np.arange(len(labels)), labels]
        return weights @ losses + 5e-4 / 2 * factors @ factors

    best = minimize(risk, np.ones(3))
    assert risk(np.ones(3)) > 1.5 * best.fun
    assert risk(factors) == pytest.approx(best.fun, rel=0.01)
    np.testing.assert_allclose(factors, best.x, atol=0.1)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_runs_can_be_vectorised(linear, name):
    runs = [clusters(COUNTS, seed) for seed in range(2)]
    features, labels = (jnp.stack(each) for each in zip(*runs, strict=True))
    linears = jax.tree.map(lambda x: jnp.stack([x, -x]), linear)
    keys = jax.random.split(jax.random.key(0))
    classifier = CLASSIFIERS[name]
    together = jax.jit(jax.vmap(classifier))(features, labels, linears, keys)
    assert together.kernel.shape == (2, 5, 3)
    assert together.bias.shape == (2, 3)
    alone = jax.jit(classifier)(features[1], labels[1], jax.tree.map(lambda x: x[1], linears), keys[1])
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-3, atol=1e-4)
