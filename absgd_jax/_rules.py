"""Rules that set a hyper-parameter from the state of training, given in place of a number or a schedule.

They are not callables, because Optax takes every callable for a schedule of the step count.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from absgd_jax._validate import check_finite, check_positive


class AdaptiveGamma(NamedTuple):
    """Made by :func:`adaptive_gamma`."""

    log_alpha: float

    def gamma(self, risk: jax.Array, temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
        """γ and 1 - γ; the latter has its own sigmoid because it matters most where γ rounds to 1."""
        logit = self.log_alpha + risk / temperature
        return jax.nn.sigmoid(logit), jax.nn.sigmoid(-logit)


def adaptive_gamma(log_alpha: float) -> AdaptiveGamma:
    r"""The state-dependent γ of SCENT, given as ``gamma=``: forget fast while the risk is high.

    .. math:: \gamma_t = \frac{\alpha s_t}{1 + \alpha s_t} = \mathrm{sigmoid}(\log\alpha + R_t/\lambda)

    It is the mirror-descent step on the dual variable log s, with step size α. The first step has γ = 1.

    Args:
      log_alpha: log α, dimensionless. The larger, the closer is γ to 1. A good start is minus the expected final R/λ.

    Returns:
      A rule for the ``gamma`` of :func:`absgd_jax.scale_by_absgd` and of all that is built on it.

    Raises:
      ValueError: if ``log_alpha`` is not finite.

    Example:
      >>> import absgd_jax
      >>> optimizer = absgd_jax.absgd(0.1, temperature=1.0, gamma=absgd_jax.adaptive_gamma(log_alpha=-1.0))

    References:
      `SCENT <https://arxiv.org/abs/2602.02877>`_, 2026.
    """
    check_finite("log_alpha", log_alpha)
    return AdaptiveGamma(log_alpha)


class KlRadius(NamedTuple):
    """Made by :func:`kl_radius`."""

    rho: float
    init: float
    step_size: float

    def check_batch_size(self, batch_size: int) -> None:
        if self.rho >= math.log(batch_size):
            raise ValueError(
                f"kl_radius(rho={self.rho!r}) is at or above log(batch size) = log({batch_size}) = "
                f"{math.log(batch_size):.4g}: no weighting of {batch_size} examples lies that far from uniform, so λ "
                "would shrink for ever. Use a smaller rho or a larger batch."
            )

    def next_temperature(self, temperature: jax.Array, kl: jax.Array) -> jax.Array:
        """The next temperature: one mirror step on |λ|, kept away from 0 and ∞ so that it can always come back."""
        size = jnp.abs(temperature) * jnp.exp(self.step_size * (kl - self.rho))
        bound = math.sqrt(jnp.finfo(temperature.dtype).max)
        size = jnp.clip(size, 1 / bound, bound)
        return jnp.where(jnp.isinf(temperature), self.init, jnp.copysign(size, temperature))


def kl_radius(rho: float, *, init: float = 1.0, step_size: float = 0.1, batch_size: int | None = None) -> KlRadius:
    r"""A temperature that keeps the weights a KL distance ρ from uniform, given as ``temperature=``.

    Robust optimisation over a KL ball instead of a KL penalty,
    :math:`\min_{w,\,\lambda \ge 0} F_\lambda(w) + \lambda\rho`. As
    :math:`\partial \hat R/\partial\lambda = -\widehat{\mathrm{KL}}`, the mirror step on λ is

    .. math:: \log|\lambda| \leftarrow \log|\lambda| + \eta\,(\widehat{\mathrm{KL}} - \rho)

    λ follows the losses down, so the weights stay uneven when a network has fitted its training set, where any fixed λ
    turns into SGD. exp(-ρ) is about the fraction of a batch that counts. λ lives in the state; pass KL̂ to the update:
    ``update(grads, state, params, value=risk, kl=kl)``, both from ``value_and_grad(..., with_kl=True)``. A state
    that is handed over at λ = ∞ (the first of two stages) starts at ``init``.

    s_t lags behind while λ falls, the more so the smaller γ is, and batches would weigh up to 1/γ. So the mean weight
    g̃/s of a batch is held at 1 where it is greater: a batch harder than the running risk is a softmax, an easier one
    counts less.

    Args:
      rho: ρ, the radius in nats, between 0 and log(batch size). 0.3 is mild, 2 is strong.
      init: the first λ, in units of loss; negative for the mirrored form, which keeps a tilt of radius ρ away from
        outliers.
      step_size: η, the relative change of λ for each nat and step.
      batch_size: the number of examples over which R̂ is taken, if ``rho`` is to be checked against it here.
        :func:`absgd_jax.weight_by_absgd` sees the batch and checks by itself.

    Returns:
      A rule for the ``temperature`` of :func:`absgd_jax.scale_by_absgd` and of all that is built on it.

    Raises:
      ValueError: if ``rho`` or ``step_size`` is not positive and finite, ``init`` is 0 or not finite, or ``rho`` is at
        or above log(``batch_size``).

    Example:
      >>> import absgd_jax
      >>> optimizer = absgd_jax.absgd(0.1, temperature=absgd_jax.kl_radius(1.0, batch_size=128))

    References:
      Qi et al., `Stochastic Constrained DRO with a Complexity Independent of Sample Size
      <https://arxiv.org/abs/2210.05740>`_, 2022.
    """
    check_positive("rho", rho)
    check_finite("init", init)
    if init == 0:
        raise ValueError(f"init={init!r}: λ must start away from 0; use 1.0, or -1.0 for the mirrored form.")
    check_positive("step_size", step_size)
    rule = KlRadius(rho, init, step_size)
    if batch_size is not None:
        rule.check_batch_size(batch_size)
    return rule
