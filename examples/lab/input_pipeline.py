"""Which examples each step of an epoch sees, and batches that are made on the host."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import joblib
import numpy as np

from examples.lab.errors import UsageError
from examples.lab.task import Split, Task

STEPS, HELD_OUT = 0, 1  # what an epoch draws from its key
POOL = 32  # batches among which examples are sorted by length


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
    """Indices of batches, shape (steps, B), drawn with replacement: first a class that occurs, then an example."""
    order, counts = jnp.argsort(labels), jnp.bincount(labels, length=classes)
    starts, there = jnp.cumsum(counts) - counts, jnp.argsort(counts == 0, stable=True)
    class_key, example_key = jax.random.split(key)
    chosen = there[jax.random.randint(class_key, (steps, batch_size), 0, jnp.sum(counts > 0))]
    return order[starts[chosen] + jax.random.randint(example_key, (steps, batch_size), 0, counts[chosen])]


@partial(jax.jit, static_argnames=("steps", "batch_size"))
def by_length(key: jax.Array, lengths: jax.Array, *, steps: int, batch_size: int) -> jax.Array:
    """As :func:`shuffled`, but the examples of a batch have about one length: pools of batches are sorted by it."""
    order = shuffled(key, lengths, steps=steps, batch_size=batch_size).reshape(-1)
    pool = jnp.arange(order.size) // (POOL * batch_size)
    order = order[jnp.lexsort((lengths[order], pool))].reshape(steps, batch_size)
    return jax.random.permutation(jax.random.fold_in(key, 1), order)


def stream(task: Task, split: Split, order: np.ndarray, mine: Any = slice(None)) -> Iterator[Split]:
    """The batches of an epoch in the order of its steps, or this process's part, made ahead by other threads."""
    import grain  # not by those who do not stream: it warns about older versions of JAX

    threads = joblib.cpu_count()  # that this process may use
    batches = grain.MapDataset.source(range(len(order))).map(lambda step: task.batch(split, order[step], mine))
    return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)))


def take(split: Split, indices: jax.Array) -> Split:
    return jax.tree.map(lambda x: x[indices], split)
