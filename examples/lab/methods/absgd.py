"""ABSGD and its special cases: SGD (λ = ∞), TERM (γ = 1), an annealed λ, a KL radius, a fraction, SCENT's γ, bounds."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

import absgd_jax
from examples.lab.methods import Annealed, Info


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Absgd:
    """One of ``temperature``, ``kl_radius``, ``trusted`` and ``focus`` says how uneven the weights are."""

    temperature: float | Annealed = math.inf  # λ, in units of loss
    kl_radius: float | None = None  # ρ in nats; λ > 0 starts at 10 times the mean loss
    trusted: float | None = None  # the fraction to trust
    focus: float | None = None  # the fraction to focus on
    gamma: float = 0.9
    log_alpha: float | None = None  # of SCENT's rule, in place of γ
    max_weight: float = math.inf

    needs_held_out = False

    def transform(self):
        temperature: Any = self.temperature
        if self.kl_radius is not None:
            temperature = absgd_jax.focus_fraction(jnp.exp(-jnp.asarray(self.kl_radius)))
        if self.trusted is not None:
            temperature = absgd_jax.trust_fraction(self.trusted)
        if self.focus is not None:
            temperature = absgd_jax.focus_fraction(self.focus)
        gamma: Any = self.gamma if self.log_alpha is None else absgd_jax.adaptive_gamma(self.log_alpha)
        return absgd_jax.scale_by_absgd(temperature, gamma, max_weight=self.max_weight)

    def init(self, params, size):
        del size
        return self.transform().init(params)

    def gradient(self, losses, params, state, batch, held_out):
        del held_out

        def with_losses(params, batch):
            values, aux = losses(params, batch)
            values = batch.weights * values
            return values, (values, aux)

        risk_and_grad = absgd_jax.value_and_grad(with_losses, has_aux=True, with_kl=True)
        ((risk, kl), (values, aux)), grads = risk_and_grad(params, batch, state=state)
        after: Any
        grads, after = self.transform().update(grads, state, value=risk, kl=kl)
        lam, threshold = state.temperature, state.threshold
        clipped = jnp.where(lam < 0, jnp.maximum(values, threshold), jnp.minimum(values, threshold))
        weights = jax.nn.softmax(clipped / lam)
        return grads, after, Info(values, weights, after.risk, state.temperature, aux)


BY_NAME = {
    "sgd": lambda recipe: Absgd(),
    "absgd": lambda recipe: Absgd(recipe.annealed_temperature, gamma=recipe.gamma, max_weight=recipe.max_weight),
    "term": lambda recipe: Absgd(recipe.temperature, gamma=1.0, max_weight=recipe.max_weight),
    "adaptive-gamma": lambda recipe: Absgd(
        recipe.temperature, log_alpha=recipe.log_alpha, max_weight=recipe.max_weight
    ),
    "kl-radius": lambda recipe: Absgd(kl_radius=recipe.kl_radius, gamma=recipe.gamma, max_weight=recipe.max_weight),
    "trust": lambda recipe: Absgd(trusted=recipe.fraction, gamma=recipe.gamma, max_weight=recipe.max_weight),
    "focus": lambda recipe: Absgd(focus=recipe.fraction, gamma=recipe.gamma, max_weight=recipe.max_weight),
}
