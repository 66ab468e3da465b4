"""Early-learning regularisation: the network is held to what it predicted for an example before."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from examples.lab.methods import gradient_of_mean


@register_dataclass
@dataclasses.dataclass(frozen=True)
class EarlyLearning:
    r"""Cross entropy and a term that grows as the prediction p leaves t, the moving average of the example's.

    .. math:: L + λ \log(1 - \langle p, t \rangle), \qquad t \leftarrow β t + (1 - β) p

    References:
      Liu et al., `Early-Learning Regularization Prevents Memorization of Noisy Labels
      <https://arxiv.org/abs/2007.00151>`_, 2020.
    """

    strength: float  # λ; the paper has 3 for CIFAR-10 and 7 for CIFAR-100
    beta: float = 0.7

    needs_held_out = False

    def init(self, params, size):
        del params
        return jnp.zeros(size)  # t of every training example

    def gradient(self, losses, params, state, batch, held_out):
        del held_out
        before = state[batch.indices]

        def objective(values, aux):
            p = jnp.clip(jax.nn.softmax(aux.logits), 1e-4, 1 - 1e-4)
            average = self.beta * before + (1 - self.beta) * _normalised(jax.lax.stop_gradient(p))
            return values + self.strength * jnp.log(1 - jnp.sum(p * average, axis=-1))

        grads, info = gradient_of_mean(objective, losses, params, batch)
        p = _normalised(jnp.clip(jax.nn.softmax(info.aux.logits), 1e-4, 1 - 1e-4))
        return grads, state.at[batch.indices].set(self.beta * before + (1 - self.beta) * p), info


def _normalised(p):
    return p / jnp.sum(p, axis=-1, keepdims=True)


BY_NAME = {"elr": lambda recipe: EarlyLearning(recipe.parameter)}
