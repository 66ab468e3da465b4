"""A linear model or a multi-layer perceptron, in plain JAX."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

Params = list[tuple[jax.Array, jax.Array]]


def init(key: jax.Array, sizes: Sequence[int]) -> Params:
    """He-initialised weights and zero biases for layers of these sizes."""
    keys = jax.random.split(key, len(sizes) - 1)
    layers = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [(jax.random.normal(k, (m, n)) * jnp.sqrt(2 / m), jnp.zeros(n)) for k, m, n in layers]


def logits(params: Params, x: jax.Array) -> jax.Array:
    """Class scores, shape (B, C), of examples x, shape (B, D)."""
    *hidden, (weights, bias) = params
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b)
    return x @ weights + bias
