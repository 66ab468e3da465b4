"""Methods: what makes a gradient of the losses of a batch.

A method is a frozen dataclass registered as a pytree (numbers are leaves) with two functions:

    init(params, size) -> state
    gradient(losses, params, state, batch, held_out) -> (gradient, state, Info)

``size`` is the number of training examples and of classes. ``losses(params, batch)`` returns the losses of a
:class:`Batch`, one an example and not yet weighted by class, and :class:`Outputs`. ``held_out`` is a balanced batch of
examples that are not trained on, where there are enough; it is None unless ``needs_held_out``. A method that looks
ahead also has ``at_rate(rate)``, itself at the optimizer's learning rate. A number may be :class:`Annealed`.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass


class Batch(NamedTuple):
    """Examples as the network sees them."""

    inputs: Any
    labels: jax.Array  # shape=(B,)
    weights: jax.Array  # of their classes, shape=(B,)
    indices: Any = None  # in the training set, shape=(B,)


class Outputs(NamedTuple):
    """What the network gave beside the losses."""

    logits: jax.Array  # shape=(B, C)
    rest: Any  # what else it keeps, such as new batch statistics


class Info(NamedTuple):
    """What is worth logging of a gradient."""

    losses: jax.Array  # of the examples, as they were weighted, shape (B,)
    weights: jax.Array  # that they were given, relative to each other, shape (B,)
    risk: jax.Array  # the objective: running, where the method keeps one, else the batch's
    temperature: jax.Array  # λ
    aux: Outputs


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Annealed:
    """A schedule: a number that goes from one value to another in the first third of all epochs."""

    begin: float
    end: float
    epochs: int
    steps: Any = 1  # in an epoch, which is known when training steps

    def __call__(self, step):
        return self.begin + (self.end - self.begin) * jnp.minimum(3 * step / (self.epochs * self.steps), 1)


def with_steps(method, steps):
    """A method whose schedules know how many steps an epoch has."""
    is_annealed = lambda x: isinstance(x, Annealed)  # noqa: E731
    known = lambda x: dataclasses.replace(x, steps=steps) if is_annealed(x) else x  # noqa: E731
    return jax.tree.map(known, method, is_leaf=is_annealed)


def gradient_of_mean(objective, losses, params, batch):
    """The gradient of the mean of a function of the losses, weighted by class, and what is worth logging of it.

    Args:
      objective: of the losses, shape (B,), and of :class:`Outputs`; one number an example, shape (B,).
      losses: as methods get them.
      params: the parameters.
      batch: a :class:`Batch`.
    """

    def mean(params):
        values, aux = losses(params, batch)
        return jnp.mean(batch.weights * objective(values, aux)), (values, aux)

    (risk, (values, aux)), grads = jax.value_and_grad(mean, has_aux=True)(params)
    # An example's weight is the derivative by its loss, its logits apart.
    weights = batch.weights * jax.grad(lambda values: jnp.sum(objective(values, aux)))(values)
    return grads, Info(batch.weights * values, weights, risk, jnp.float32(math.inf), aux)
