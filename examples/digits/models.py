"""A multilayer perceptron as two functions; without hidden layers it is the linear model."""

import jax
import jax.numpy as jnp
import optax

Params = list[tuple[jax.Array, jax.Array]]


def init(key: jax.Array, sizes: tuple[int, ...]) -> Params:
    """Weights and biases for layers of the given sizes, input and output included."""
    keys = jax.random.split(key, len(sizes) - 1)
    he = jax.nn.initializers.he_normal()
    return [(he(k, (i, o)), jnp.zeros(o)) for k, i, o in zip(keys, sizes, sizes[1:], strict=False)]


def apply(params: Params, images: jax.Array) -> jax.Array:
    """Logits, shape (n, C)."""
    *hidden, (w, b) = params
    for v, c in hidden:
        images = jax.nn.relu(images @ v + c)
    return images @ w + b


def per_example_loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """One cross entropy an example, not reduced: ABSGD does the rest."""
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, images), labels)
