"""Small-loss selection with a known rate of wrong labels: the single-network form of co-teaching."""

import dataclasses

import jax.numpy as jnp
from jax.tree_util import register_dataclass

from examples.lab.methods import gradient_of_mean


@register_dataclass
@dataclasses.dataclass(frozen=True)
class SmallLoss:
    """SGD on a fraction of each batch, those of the smallest losses; it falls linearly from 1 in the first steps.

    References:
      Han et al., `Co-teaching <https://arxiv.org/abs/1804.06872>`_, 2018, section 2.
    """

    fraction: float
    steps: float  # in which the fraction falls

    needs_held_out = False

    def init(self, params, size):
        del params, size
        return jnp.zeros((), jnp.int32)  # steps done

    def gradient(self, losses, params, state, batch, held_out):
        del held_out
        fraction = 1 - (1 - self.fraction) * jnp.minimum(state / self.steps, 1)

        def objective(values, aux):
            del aux
            kept = jnp.maximum(jnp.round(fraction * values.size), 1).astype(jnp.int32)
            small = values <= jnp.sort(values)[kept - 1]
            return small * values * (values.size / kept)

        grads, info = gradient_of_mean(objective, losses, params, batch)
        return grads, state + 1, info


BY_NAME = {"small-loss": lambda recipe: SmallLoss(recipe.fraction, recipe.parameter)}
