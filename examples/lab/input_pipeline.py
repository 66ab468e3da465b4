"""Batches of data in memory: which examples each step of an epoch sees."""

from functools import partial

import jax
import jax.numpy as jnp

from examples.lab.errors import UsageError
from examples.lab.task import Split

STEPS, HELD_OUT = 0, 1  # what an epoch draws from its key


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Whole batches; what is left over, other examples every time, is dropped."""
    if batch_size > examples:
        raise UsageError(f"A batch of {batch_size} is more than the {examples} training examples.")
    return examples // batch_size


def epoch_key(key: jax.Array, step: jax.Array, purpose: int) -> jax.Array:
    """Of an epoch that begins at a step: the same however a run was cut."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(key), step), 2**31 - 1 - purpose)


@partial(jax.jit, static_argnames=("steps", "batch_size"))
def shuffled(key: jax.Array, labels: jax.Array, *, steps: int, batch_size: int) -> jax.Array:
    """Indices of the batches of an epoch, shape (steps, B), without replacement."""
    return jax.random.permutation(key, labels.size)[: steps * batch_size].reshape(steps, batch_size)


@partial(jax.jit, static_argnames=("steps", "batch_size", "classes"))
def class_balanced(key: jax.Array, labels: jax.Array, *, steps: int, batch_size: int, classes: int) -> jax.Array:
    """Indices of batches, shape (steps, B), drawn with replacement: first a class, then one of its examples."""
    order, counts = jnp.argsort(labels), jnp.bincount(labels, length=classes)
    starts = jnp.cumsum(counts) - counts
    class_key, example_key = jax.random.split(key)
    chosen = jax.random.randint(class_key, (steps, batch_size), 0, classes)
    return order[starts[chosen] + jax.random.randint(example_key, (steps, batch_size), 0, counts[chosen])]


def take(split: Split, indices: jax.Array) -> Split:
    return jax.tree.map(lambda x: x[indices], split)
