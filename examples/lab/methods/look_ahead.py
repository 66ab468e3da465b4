r"""Weights of examples, learnt by looking one step ahead at the loss of a balanced held-out batch.

With weights w + ε a step leads to θ'(ε) = θ - η ∇ (1/B) Σ (w_i + ε_i) l_i(θ), and ε enters it linearly. So the gradient
of the held-out loss in ε is, exactly, a derivative of the losses along one direction:

.. math::
    g_i = \frac{\partial}{\partial ε_i} L_{held}(θ'(ε)) \Big|_{ε=0} = -\frac{η}{B} \langle \nabla l_i(θ), v \rangle,
    \qquad v = \nabla L_{held}(θ')
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from examples.lab.methods import gradient_of_mean


def example_gradient(losses_of, params, held_out_loss, weights, rate):
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


def l2rw(losses_of, params, held_out_loss):
    """Weights that lower the held-out loss, w_i = max(-g_i, 0), scaled to a mean of 1; all 0 if no example helps."""
    losses, pull = jax.vjp(losses_of, params)
    useful = jnp.maximum(_along(losses, pull, jax.grad(held_out_loss)(params)), 0)
    total = jnp.sum(useful)
    return useful * (losses.size / jnp.where(total > 0, total, 1))


def jamal(losses_of, params, held_out_loss, class_weights, rate, step=0.01):
    """Weights of two components: that of the example's class, and ε = -step · g, the example's own."""
    return class_weights - step * example_gradient(losses_of, params, held_out_loss, class_weights, rate)


def _along(losses, pull, direction):
    # Forward mode, as the transpose of the backward pass, which is linear.
    _, push = jax.vjp(lambda cotangent: pull(cotangent)[0], jnp.zeros_like(losses))
    return push(direction)[0]


def _weighted_gradient(losses, weights, params, batch):
    grads, info = gradient_of_mean(lambda values, _: values, losses, params, batch._replace(weights=weights))
    return grads, (), info


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Meta:
    """Jamal et al. 2020: weights of two components, that of the example's class and ε = -step · g, its own.

    As in the authors' code ε starts from 0 in each iteration, the look-ahead has the class weights, and the sum is
    neither clipped nor normalised. Their look-ahead is on the *sum* of the losses, so its rate is that of the optimizer
    times the batch.

    References:
      Jamal et al., `Rethinking Class-Balanced Methods for Long-Tailed Visual Recognition from a Domain Adaptation
      Perspective <https://arxiv.org/abs/2003.10780>`_, 2020.
    """

    step: float = 0.01
    rate: float = 0.0

    needs_held_out = True

    def at_rate(self, rate):
        """The method with the optimizer's learning rate."""
        return dataclasses.replace(self, rate=rate)

    def init(self, params, size):
        del params, size
        return ()

    def gradient(self, losses, params, state, batch, held_out):
        del state
        of = lambda params: losses(params, batch)[0]  # noqa: E731
        held_out_loss = lambda params: jnp.mean(losses(params, held_out)[0])  # noqa: E731
        weights = jamal(of, params, held_out_loss, batch.weights, batch.weights.size * self.rate, self.step)
        return _weighted_gradient(losses, weights, params, batch)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class L2rw:
    """Learning to Reweight. The look-ahead starts from weights of 0, where θ' = θ, and its rate cancels in the scale.

    References:
      Ren et al., `Learning to Reweight Examples for Robust Deep Learning <https://arxiv.org/abs/1803.09050>`_, 2018.
    """

    needs_held_out = True

    def at_rate(self, rate):
        del rate
        return self

    def init(self, params, size):
        del params, size
        return ()

    def gradient(self, losses, params, state, batch, held_out):
        del state
        of = lambda params: losses(params, batch)[0]  # noqa: E731
        held_out_loss = lambda params: jnp.mean(losses(params, held_out)[0])  # noqa: E731
        return _weighted_gradient(losses, l2rw(of, params, held_out_loss), params, batch)


BY_NAME = {"meta": lambda recipe: Meta(), "l2rw": lambda recipe: L2rw()}
