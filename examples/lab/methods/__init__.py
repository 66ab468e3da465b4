"""Methods: what makes a gradient of the losses of a batch.

A method is a frozen dataclass registered as a pytree (numbers are leaves) with two functions:

    init(params) -> state
    gradient(losses, params, state, batch, held_out) -> (gradient, state, Info)

``losses(params, batch)`` returns the losses of a :class:`Batch`, one an example and not yet weighted by class, and an
auxiliary tree. ``held_out`` is a balanced batch of examples that are not trained on; it is None unless
``needs_held_out``. A method that looks ahead also has ``at_rate(rate)``, itself at the optimizer's learning rate.
"""

from typing import Any, NamedTuple

import jax


class Batch(NamedTuple):
    """Examples as the network sees them."""

    inputs: Any
    labels: Any  # shape=(B,); of mixed examples the triple of labels, other labels and the share of the first
    weights: jax.Array  # of their classes, shape=(B,)


class Info(NamedTuple):
    """What is worth logging of a gradient."""

    losses: jax.Array  # of the examples, as they were weighted, shape (B,)
    weights: jax.Array  # that they were given, relative to each other, shape (B,)
    risk: jax.Array  # the running objective
    temperature: jax.Array  # λ
    aux: Any  # the losses' auxiliary tree
