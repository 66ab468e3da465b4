"""The per-example losses by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from absgd_jax import losses
from examples.cifar_lt.config import ALIASES

NAMES = ("ce", "focal", "ldam", "balanced-softmax")


def make_objective(class_counts: np.ndarray) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Makes ``objective(index, logits, labels)``: one loss per example, that of ``NAMES[index]``.

    The index may be traced, so that runs with different losses train together in one program: all losses of a batch
    cost nothing beside its logits.
    """
    counts = jnp.asarray(class_counts, jnp.float32)
    branches = (
        optax.softmax_cross_entropy_with_integer_labels,
        losses.focal,
        lambda logits, labels: losses.ldam(logits, labels, counts),
        lambda logits, labels: losses.balanced_softmax(logits, labels, counts),
    )
    return lambda index, logits, labels: jax.lax.switch(index, branches, logits, labels)


def index_of(loss: str) -> int:
    """The index of a loss; the prefix ``cb-`` says something about the class weights only."""
    return NAMES.index(ALIASES.get(loss, loss).removeprefix("cb-"))


def class_weights(loss: str, class_counts: np.ndarray) -> np.ndarray:
    """The weights of the classes, shape (C,), mean 1: by effective number with the prefix ``cb-``, else ones."""
    if not loss.startswith("cb-"):
        return np.ones(len(class_counts), np.float32)
    return np.asarray(losses.class_balanced_weights(jnp.asarray(class_counts, jnp.float32)))
