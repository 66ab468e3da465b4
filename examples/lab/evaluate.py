"""Accuracy on a split, and what a classifier sees of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from examples.lab import processes
from examples.lab.config import each
from examples.lab.task import Split, Task, module_of
from examples.lab.train_step import State

BATCH = 500


@partial(jax.jit, static_argnums=(0, 1))
def _right(task: Task, loss: str, states: State, batch: Split) -> jax.Array:
    def one(state):
        logits = task.predict(module_of(task, loss, state.params, state.rest), task.prepare(batch.inputs))
        return jnp.argmax(logits, axis=-1) == batch.labels

    return each(one, states)


@partial(jax.jit, static_argnums=(0, 1))
def _features(task: Task, loss: str, states: State, batch: Split) -> jax.Array:
    def one(state):
        return module_of(task, loss, state.params, state.rest).features(task.prepare(batch.inputs), train=False)

    return each(one, states)


def _over(task: Task, split: Split, over: NamedSharding, function) -> np.ndarray:
    """A function of batches of one size, whatever the size of the split; the axis of examples comes second."""
    size, parts = len(split.labels), []
    devices = over.mesh.size
    batch = -(-min(BATCH, size) // devices) * devices
    mine = processes.rows(batch, over)
    for begin in range(0, size, batch):
        indices = (begin + np.arange(batch)) % size
        parts.append(function(processes.gathered(task.batch(split, indices, mine), over, batch)))
    return np.concatenate(processes.whole(parts), axis=1)[:, :size]


def right(task: Task, loss: str, states: State, split: Split, over: NamedSharding) -> np.ndarray:
    """Which examples each run classifies correctly, shape (runs, N); batches are spread as ``over`` says."""
    return _over(task, split, over, lambda batch: _right(task, loss, states, batch))


def features(task: Task, loss: str, states: State, split: Split, over: NamedSharding) -> np.ndarray:
    """What the classifier of each run sees, shape (runs, N, D)."""
    return _over(task, split, over, lambda batch: _features(task, loss, states, batch))


def by_class(right: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Accuracy of each class in %, NaN where the split has none of it."""
    counts = np.bincount(labels, minlength=classes)
    with np.errstate(invalid="ignore"):
        return 100 * np.bincount(labels, weights=right, minlength=classes) / counts
