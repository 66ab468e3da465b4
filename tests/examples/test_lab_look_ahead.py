"""Laboratory: weights from a look-ahead, against derivatives of the look-ahead itself."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from examples.cifar_lt import models
from examples.lab.methods import Batch
from examples.lab.methods.look_ahead import L2rw, Meta, example_gradient


class Problem(NamedTuple):
    """A small network in float64; the losses' auxiliary tree says on which batch they were taken."""

    losses: Callable
    params: dict
    batch: Batch
    held_out: Batch

    def losses_of(self, params):
        return self.losses(params, self.batch)[0]

    def held_out_loss(self, params):
        return jnp.mean(self.losses(params, self.held_out)[0])


@pytest.fixture
def mlp():
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(1), 6)
        params = {
            "in": jax.random.normal(keys[0], (5, 7), jnp.float64),
            "out": jax.random.normal(keys[1], (7, 3), jnp.float64),
        }
        images = jax.random.normal(keys[2], (2, 6, 5), jnp.float64)
        labels = jax.random.randint(keys[3], (2, 6), 0, 3)
        weights = jax.random.uniform(keys[4], (6,), jnp.float64)

        def losses(params, batch):
            logits = jnp.tanh(batch.inputs @ params["in"]) @ params["out"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels), batch.inputs

        yield Problem(losses, params, Batch(images[0], labels[0], weights), Batch(images[1], labels[1], jnp.ones(6)))


def look_ahead(losses_of, params, held_out_loss, weights, rate):
    grads = jax.grad(lambda p: jnp.mean(weights * losses_of(p)))(params)
    return held_out_loss(jax.tree.map(lambda p, g: p - rate * g, params, grads))


def test_gradient_is_that_of_the_look_ahead(mlp):
    losses_of, held_out_loss, weights = mlp.losses_of, mlp.held_out_loss, mlp.batch.weights
    ahead = jax.jit(lambda w: look_ahead(losses_of, mlp.params, held_out_loss, w, 0.3))
    ours = jax.jit(example_gradient, static_argnums=(0, 2))(losses_of, mlp.params, held_out_loss, weights, 0.3)
    assert ours.shape == (6,)
    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, jax.grad(ahead)(weights), rtol=1e-10, atol=1e-15)
    for i in range(6):
        nudge = 1e-5 * np.eye(6)[i]
        difference = (float(ahead(weights + nudge)) - float(ahead(weights - nudge))) / 2e-5
        assert float(ours[i]) == pytest.approx(difference, rel=1e-5, abs=1e-9)


def test_gradient_through_a_resnet():
    model = nnx.eval_shape(lambda: models.ResNet(8, 10, width=4, rngs=nnx.Rngs(0)))
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), params)
    stats = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), stats)
    images = rng.normal(size=(2, 2, 4, 16, 16, 3)).astype(np.float32)  # runs, batch and held out, examples
    weights, rate = jnp.array([[1.0, 2.0, 0.5, 0.0], [1.0, 1.0, 1.0, 1.0]]), jnp.array([0.1, 0.02])

    def losses_of(images, params):
        logits = nnx.merge(graphdef, params, stats, copy=True)(images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([0, 3, 3, 9]))

    def of_run(function, images, weights, rate):
        held_out_loss = lambda params: jnp.mean(losses_of(images[1], params))  # noqa: E731
        return function(partial(losses_of, images[0]), params, held_out_loss, weights, rate)

    ours = jax.jit(jax.vmap(partial(of_run, example_gradient)))(images, weights, rate)
    truth = jax.jit(jax.grad(partial(of_run, look_ahead), argnums=1))
    for i in range(2):
        np.testing.assert_allclose(ours[i], truth(images[i], weights[i], rate[i]), rtol=2e-3, atol=1e-5)


def per_example(problem, weights, rate):
    """All ∇l_i, shape (6, P), one by one, and in NumPy their products with the held-out gradient after a step."""
    jacobian = jax.jit(jax.jacrev(problem.losses_of))(problem.params)
    jacobian = np.concatenate([np.asarray(leaf).reshape(6, -1) for leaf in jax.tree.leaves(jacobian)], axis=1)
    flat, unravel = ravel_pytree(problem.params)
    ahead = np.asarray(flat) - rate * jacobian.T @ np.asarray(weights) / 6
    return jacobian, jacobian @ np.asarray(ravel_pytree(jax.grad(problem.held_out_loss)(unravel(ahead)))[0])


def assert_weighted(problem, method, jacobian, weights):
    """The method's gradient is that of the mean of the losses with these weights, and it says so."""
    assert method.needs_held_out
    gradient = jax.jit(method.gradient, static_argnums=0)
    grads, state, info = gradient(problem.losses, problem.params, method.init(problem.params, (0, 0)), *problem[2:])
    assert state == ()
    np.testing.assert_allclose(ravel_pytree(grads)[0], jacobian.T @ weights / 6, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(info.weights, weights, rtol=1e-9)
    weighted = weights * np.asarray(problem.losses_of(problem.params))
    np.testing.assert_allclose(info.losses, weighted, rtol=1e-9)
    assert float(info.risk) == pytest.approx(weighted.mean(), rel=1e-9)
    assert np.isposinf(info.temperature)
    np.testing.assert_array_equal(info.aux, problem.batch.inputs)


def test_meta(mlp):
    # The look-ahead is on the sum of the losses.
    jacobian, products = per_example(mlp, mlp.batch.weights, 6 * 0.05)
    weights = np.asarray(mlp.batch.weights) + 40 * 0.05 * products
    assert weights.min() < 0  # which is not clipped
    assert_weighted(mlp, Meta(step=40.0).at_rate(0.05), jacobian, weights)


def test_l2rw(mlp):
    jacobian, products = per_example(mlp, np.zeros(6), 1.0)
    assert products.min() < 0 < products.max()
    weights = np.maximum(products, 0)
    assert_weighted(mlp, L2rw().at_rate(0.05), jacobian, weights / weights.sum() * 6)
    # The definition: the look-ahead at weights 0.
    gradient = example_gradient(mlp.losses_of, mlp.params, mlp.held_out_loss, jnp.zeros(6), 0.3)
    np.testing.assert_allclose(gradient, -0.3 / 6 * products, rtol=1e-10)


def test_l2rw_without_a_useful_example(mlp):
    def losses(params, batch):
        loss = mlp.held_out_loss(params)
        return (loss * jnp.ones(6) if batch is mlp.held_out else -loss * jnp.arange(6.0)), None

    grads, _, info = L2rw().gradient(losses, mlp.params, (), mlp.batch, mlp.held_out)
    np.testing.assert_array_equal(info.weights, np.zeros(6))
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))
