"""The per-example losses by name."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from absgd_jax import losses

Objective = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def make_objective(name: str, class_counts: np.ndarray, second_stage: int) -> Objective:
    """Makes ``objective(logits, labels, epoch)``, one loss per example.

    Args:
      name: of the loss. With the prefix ``cb-`` it is multiplied by the weight of the class, from the second stage on.
      class_counts: training images of each class, shape (C,).
      second_stage: the epoch in which the second stage begins.
    """
    counts = jnp.asarray(class_counts, jnp.float32)
    base = {
        "ce": optax.softmax_cross_entropy_with_integer_labels,
        "focal": losses.focal,
        "ldam": lambda logits, labels: losses.ldam(logits, labels, counts),
        "balanced-softmax": lambda logits, labels: losses.balanced_softmax(logits, labels, counts),
        "logit-adjustment": lambda logits, labels: losses.logit_adjustment(logits, labels, counts),
    }[name.removeprefix("cb-")]
    if not name.startswith("cb-"):
        return lambda logits, labels, epoch: base(logits, labels)
    class_weights = losses.deferred_reweighting(losses.class_balanced_weights(counts), second_stage)
    return lambda logits, labels, epoch: class_weights(epoch)[labels] * base(logits, labels)


def needs_cosines(name: str) -> bool:
    """Whether the loss is made for a normalised classifier."""
    return name.removeprefix("cb-") == "ldam"
