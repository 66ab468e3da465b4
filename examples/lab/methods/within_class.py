"""ABSGD within each class: an example is compared with the others of its class, and every class keeps its weight."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

import absgd_jax
from examples.lab.methods import Annealed, Info


@register_dataclass
@dataclasses.dataclass(frozen=True)
class WithinClass:
    """A running risk for each class, with which the losses of its examples are compared.

    A batch has few examples of a class, so γ has to be small for the risk to remember more of them.
    """

    temperature: float | Annealed  # λ, in units of loss
    gamma: float
    max_weight: float = math.inf

    needs_held_out = False

    def weighting(self, classes):
        weighting = absgd_jax.weight_by_absgd(
            self.temperature, self.gamma, max_weight=self.max_weight, bias_correction=True
        )
        return absgd_jax.within_groups(weighting, classes)

    def init(self, params, size):
        del params
        return self.weighting(size[1]).init()

    def gradient(self, losses, params, state, batch, held_out):
        del held_out

        def mean(params):
            values, aux = losses(params, batch)
            values = batch.weights * values
            weights, after = self.weighting(state.risk.size).update(values, state, batch.labels)
            return jnp.mean(weights * values), (values, weights, after, aux)

        (_, (values, weights, after, aux)), grads = jax.value_and_grad(mean, has_aux=True)(params)
        return grads, after, Info(values, weights, jnp.mean(after.risk), state.temperature[0], aux)


BY_NAME = {"within-class": lambda recipe: WithinClass(recipe.annealed_temperature, recipe.gamma, recipe.max_weight)}
