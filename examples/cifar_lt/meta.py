r"""Weights of examples, learnt by looking one step ahead at the loss of a balanced held-out batch.

With weights w + ε a step leads to θ'(ε) = θ - η ∇ (1/B) Σ (w_i + ε_i) l_i(θ), and ε enters it linearly. So the gradient
of the held-out loss in ε is, exactly, a derivative of the losses along one direction:

.. math::
    g_i = \frac{\partial}{\partial ε_i} L_{held}(θ'(ε)) \Big|_{ε=0} = -\frac{η}{B} \langle \nabla l_i(θ), v \rangle,
    \qquad v = \nabla L_{held}(θ')

All functions are pure, and can be jitted and vmapped.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LossesOf = Callable[[Any], jax.Array]  # of the batch, shape (B,), as a function of the parameters
HeldOutLoss = Callable[[Any], jax.Array]  # a scalar
Number = jax.Array | float


def example_gradient(
    losses_of: LossesOf, params: Any, held_out_loss: HeldOutLoss, weights: jax.Array, rate: Number
) -> jax.Array:
    """The gradient g, shape (B,), of the held-out loss after a step in the weights with which that step is taken.

    Args:
      losses_of: the losses of the batch, as a function of the parameters.
      params: θ, any pytree.
      held_out_loss: the mean loss of a balanced batch, as a function of the parameters.
      weights: w, shape (B,), at which the gradient is taken.
      rate: η, the learning rate of the step on the *mean* of the weighted losses.
    """
    losses, pull = jax.vjp(losses_of, params)
    (grads,) = pull((weights / losses.size).astype(losses.dtype))
    ahead = jax.tree.map(lambda p, g: (p - rate * g).astype(p.dtype), params, grads)
    return -rate / losses.size * _along(losses, pull, jax.grad(held_out_loss)(ahead))


def l2rw(losses_of: LossesOf, params: Any, held_out_loss: HeldOutLoss) -> jax.Array:
    """Weights by Learning to Reweight: what lowers the held-out loss, w_i = max(-g_i, 0), scaled to a mean of 1.

    The look-ahead starts from weights of 0, where θ' = θ, and its rate cancels in the scale. If no example helps, all
    weights are 0.

    References:
      Ren et al., `Learning to Reweight Examples for Robust Deep Learning <https://arxiv.org/abs/1803.09050>`_, 2018.
    """
    losses, pull = jax.vjp(losses_of, params)
    useful = jnp.maximum(_along(losses, pull, jax.grad(held_out_loss)(params)), 0)
    total = jnp.sum(useful)
    return useful * (losses.size / jnp.where(total > 0, total, 1))


def jamal(
    losses_of: LossesOf,
    params: Any,
    held_out_loss: HeldOutLoss,
    class_weights: jax.Array,
    rate: Number,
    step: Number = 0.01,
) -> jax.Array:
    """Weights of two components: that of the example's class, and ε = -step · g, the example's own.

    As in the authors' code ε starts from 0 in each iteration, the look-ahead has the class weights, and the sum is
    neither clipped nor normalised. There the look-ahead is on the *sum* of B = 100 losses, so theirs is
    ``rate`` = 100 × their learning rate, with ``step`` = 0.01.

    Args:
      losses_of: the losses of the batch, as a function of the parameters.
      params: θ.
      held_out_loss: the mean loss of a balanced batch, as a function of the parameters.
      class_weights: the weight of each example's class, shape (B,).
      rate: η of the look-ahead.
      step: the step on ε.

    References:
      Jamal et al., `Rethinking Class-Balanced Methods for Long-Tailed Visual Recognition from a Domain Adaptation
      Perspective <https://arxiv.org/abs/2003.10780>`_, 2020.
    """
    return class_weights - step * example_gradient(losses_of, params, held_out_loss, class_weights, rate)


def _along(losses, pull, direction):
    # Forward mode, as the transpose of the backward pass: conv3x3 has none. That pass is linear, so nothing of it is
    # computed but its transpose, and the cost is that of jax.jvp.
    _, push = jax.vjp(lambda cotangent: pull(cotangent)[0], jnp.zeros_like(losses))
    return push(direction)[0]
