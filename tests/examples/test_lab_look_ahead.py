"""Laboratory: weights from a look-ahead, against derivatives of the look-ahead itself."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from examples.cifar_lt import models
from examples.lab.methods.look_ahead import example_gradient, jamal, l2rw


@pytest.fixture
def mlp():
    """A small network in float64, as losses_of, params, held_out_loss and weights."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(1), 6)
        params = {
            "in": jax.random.normal(keys[0], (5, 7), jnp.float64),
            "out": jax.random.normal(keys[1], (7, 3), jnp.float64),
        }
        images = jax.random.normal(keys[2], (2, 6, 5), jnp.float64)
        labels = jax.random.randint(keys[3], (2, 6), 0, 3)

        def losses_of(params, i=0):
            logits = jnp.tanh(images[i] @ params["in"]) @ params["out"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[i])

        weights = jax.random.uniform(keys[4], (6,), jnp.float64)
        yield losses_of, params, lambda params: jnp.mean(losses_of(params, 1)), weights


def look_ahead(losses_of, params, held_out_loss, weights, rate):
    grads = jax.grad(lambda p: jnp.mean(weights * losses_of(p)))(params)
    return held_out_loss(jax.tree.map(lambda p, g: p - rate * g, params, grads))


def test_gradient_is_that_of_the_look_ahead(mlp):
    losses_of, params, held_out_loss, weights = mlp
    ahead = jax.jit(lambda w: look_ahead(losses_of, params, held_out_loss, w, 0.3))
    ours = jax.jit(example_gradient, static_argnums=(0, 2))(losses_of, params, held_out_loss, weights, 0.3)
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


def per_example_products(losses_of, params, held_out_loss, weights, rate):
    """<∇l_i, v> in NumPy from all gradients one by one."""
    jacobian = jax.jit(jax.jacrev(losses_of))(params)
    jacobian = np.concatenate([np.asarray(leaf).reshape(6, -1) for leaf in jax.tree.leaves(jacobian)], axis=1)
    flat, unravel = ravel_pytree(params)
    ahead = np.asarray(flat) - rate * jacobian.T @ np.asarray(weights) / 6
    return jacobian @ np.asarray(ravel_pytree(jax.grad(held_out_loss)(unravel(ahead)))[0])


def test_l2rw_weights(mlp):
    losses_of, params, held_out_loss, weights = mlp
    products = per_example_products(losses_of, params, held_out_loss, 0 * weights, 1.0)
    assert products.min() < 0 < products.max()
    expected = np.maximum(products, 0)
    ours = jax.jit(l2rw, static_argnums=(0, 2))(losses_of, params, held_out_loss)
    np.testing.assert_allclose(ours, expected / expected.sum() * 6, rtol=1e-10)
    # The definition: the look-ahead at weights 0.
    gradient = jax.jit(example_gradient, static_argnums=(0, 2))(losses_of, params, held_out_loss, 0 * weights, 0.3)
    np.testing.assert_allclose(gradient, -0.3 / 6 * products, rtol=1e-10)


def test_l2rw_without_a_useful_example(mlp):
    _, params, held_out_loss, _ = mlp
    weights = l2rw(lambda p: -held_out_loss(p) * jnp.arange(6.0), params, held_out_loss)
    np.testing.assert_array_equal(weights, np.zeros(6))


def test_jamal_weights(mlp):
    losses_of, params, held_out_loss, class_weights = mlp
    products = per_example_products(losses_of, params, held_out_loss, class_weights, 0.3)
    ours = jax.jit(jamal, static_argnums=(0, 2))(losses_of, params, held_out_loss, class_weights, 0.3, 40.0)
    expected = np.asarray(class_weights) + 40 * 0.3 / 6 * products
    assert expected.min() < 0  # which is not clipped
    np.testing.assert_allclose(ours, expected, rtol=1e-9)
