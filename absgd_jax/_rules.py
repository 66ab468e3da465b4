"""Rules that set λ or γ from the state of training, given in place of a number or a schedule."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from absgd_jax._state import ScaleByAbsgdState
from absgd_jax._tilt import is_infinite
from absgd_jax._validate import check_finite, check_positive, check_real, check_scalar, concrete


class Rule(NamedTuple):
    r"""A hyper-parameter that follows training, given as ``temperature=`` or ``gamma=``: a function of the state.

    Optax treats every callable as a schedule of the step count, so a rule is not callable itself: it holds a function.

    Attributes:
      at: ``at(state, kl)`` returns the value for the next batch. For λ, ``state`` is the
        :class:`absgd_jax.ScaleByAbsgdState` after a batch, whose ``temperature`` is the λ with which that batch was
        reduced, and ``kl`` is that batch's KL̂; ``kl`` is None when the state is created, and where ``radius`` is None
        and the update was not given ``kl``. That λ may be ±∞ (the largest number): in a state that is handed over, and
        after the first batch if weights are bounded. A rule that steps from it has to restart there. For γ, ``state``
        is that before the batch and ``kl`` is None; γ may be the pair (γ, 1 - γ), if the latter would be lost to
        rounding.
      radius: the KL distance ρ at which the rule aims, if it reads ``kl``; None if it does not.
      mean_weight: for λ, the mean weight of a batch that is as hard as the running risk. With a rule, g̃/s is capped at
        1, because R lags behind a λ that falls, and then multiplied by this number.

    The library's rules are pytrees: their numbers may be traced, and they may be passed through ``jit`` and ``vmap``.

    Example:
      >>> import absgd_jax, jax.numpy as jnp
      >>> def twice_the_risk(state, kl):  # λ follows the losses down; the first batch is taken by SGD
      ...   return jnp.where(state.count == 0, jnp.inf, 2 * state.risk)
      >>> optimizer = absgd_jax.absgd(0.1, temperature=absgd_jax.Rule(twice_the_risk))
    """

    at: Callable[[ScaleByAbsgdState, jax.Array | None], Any]
    radius: ArrayLike | None = None
    mean_weight: ArrayLike = 1.0


Temperature = ArrayLike | optax.Schedule | Rule
Gamma = ArrayLike | optax.Schedule | Rule


def evaluate(name: str, value: Temperature | Gamma, state: ScaleByAbsgdState, kl: jax.Array | None = None) -> Any:
    """A number, a schedule or a rule at ``state``."""
    if isinstance(value, Rule):
        value = value.at(state, kl)
    elif callable(value):
        value = value(state.count)
    for number in value if isinstance(value, tuple) and name == "gamma" else (value,):
        check_scalar(name, number, "Use jax.vmap for several values.")
    return value


def check_radius(radius: ArrayLike | None, batch_size: Any) -> None:
    """Raises ValueError if no weighting of ``batch_size`` examples lies ``radius`` from uniform; both must be known."""
    rho, size = concrete(radius), concrete(batch_size)
    if rho is not None and size is not None and rho >= (most := math.log(max(size, 1))):
        raise ValueError(
            f"A KL radius of rho={radius!r} (a fraction of {math.exp(-rho):.3g}) is at or above log(batch size) = "
            f"log({batch_size}) = {most:.4g}: no weighting of {batch_size} examples lies that "
            "far from uniform, so λ would shrink for ever. Use a smaller radius (a larger fraction) or a larger batch."
        )


def _check_batch_size(radius, batch_size):
    if batch_size is not None:
        check_finite("batch_size", batch_size, at_least=1)
        check_radius(radius, batch_size)


def adaptive_gamma(log_alpha: ArrayLike) -> Rule:
    r"""The state-dependent γ of SCENT, given as ``gamma=``: for λ > 0 it forgets fast while the risk is high.

    .. math:: \gamma_t = \frac{\alpha s_t}{1 + \alpha s_t} = \mathrm{sigmoid}(\log\alpha + R_t/\lambda)

    It is the mirror-descent step on the dual variable log s, with step size α. The first step has γ = 1. For λ < 0 the
    opposite holds: γ is small while the risk is high. A past with log α + R/λ above 87 (in float32) is forgotten at
    once.

    Args:
      log_alpha: log α, dimensionless. The larger it is, the closer γ is to 1. A good start is minus the expected final
        R/λ.

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
    return Rule(Partial(_scent, log_alpha))


def _scent(log_alpha, state, kl):
    del kl
    logit = jnp.asarray(log_alpha, state.risk.dtype) + state.risk / state.temperature
    # 1 - γ has a sigmoid of its own, because it matters most where γ rounds to 1.
    return jnp.where(state.mass == 0, 1, jax.nn.sigmoid(logit)), jax.nn.sigmoid(-logit)


def kl_radius(
    rho: ArrayLike, *, init: ArrayLike = 1.0, step_size: ArrayLike = 0.1, batch_size: int | None = None
) -> Rule:
    r"""A temperature that keeps the weights a KL distance ρ from uniform, given as ``temperature=``.

    This is robust optimisation over a KL ball, not with a KL penalty:
    :math:`\min_{w,\,\lambda \ge 0} F_\lambda(w) + \lambda\rho`. As
    :math:`\partial \hat R/\partial\lambda = -\widehat{\mathrm{KL}}`, the mirror step on λ is

    .. math:: \log|\lambda| \leftarrow \log|\lambda| + \eta\,(\widehat{\mathrm{KL}} - \rho)

    λ follows the losses down, so the weights stay uneven when a network has fitted its training set, where any fixed λ
    turns into SGD. λ is kept in the state; pass risk and KL̂ from ``value_and_grad(..., with_kl=True)`` to the update:
    ``update(grads, state, params, value=risk, kl=kl)``. A state that is handed over at λ = ∞ (the first of two stages),
    or at a λ of the other sign, starts at ``init``.

    s_t lags behind while λ falls, more so for a smaller γ, and batches would weigh up to 1/γ. So the mean weight g̃/s
    of a batch is capped at 1: a batch harder than the running risk is weighted by a softmax, an easier one counts less.

    A small λ at a high rate destroys a trained network: a few losses far above the running risk take all the weight.
    Where this can happen, start from a large ``init`` and bound the weights with ``max_weight=``.
    :func:`absgd_jax.trust_fraction` and :func:`absgd_jax.focus_fraction` start from a large λ and take fractions.

    Args:
      rho: ρ, the radius in nats, between 0 and log(batch size). 0.3 is mild, 2 is strong.
      init: the first λ, in units of loss. A negative value gives the mirrored form, which shifts weight away from
        outliers, also by a KL divergence of ρ.
      step_size: η, the relative change of λ per nat and step.
      batch_size: the smallest number of examples over which R̂ is taken (masked ones do not count), if ``rho`` is to be
        checked against it here. :func:`absgd_jax.weight_by_absgd` checks it by itself.

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
    if concrete(init) == 0:
        raise ValueError(f"init={init!r}: λ must start away from 0; use 1.0, or -1.0 for the mirrored form.")
    check_positive("step_size", step_size)
    _check_batch_size(rho, batch_size)
    return Rule(Partial(_within_radius, rho, init, step_size), rho)


def _within_radius(rho, init, step_size, state, kl):
    return init if kl is None else _mirror_step(rho, step_size, init, state.temperature, kl)


def _mirror_step(rho, step_size, start, temperature, kl):
    """One step on log|λ|, kept away from 0 and ∞ so that it can always come back; at ∞ or the other sign the start."""
    bound = math.sqrt(jnp.finfo(jnp.float32).max)  # batches may be reduced in float32 where the state is float64
    rho, step_size, start = (jnp.asarray(x, temperature.dtype) for x in (rho, step_size, start))
    size = jnp.abs(temperature) * jnp.exp(step_size * (kl - rho))
    step = jnp.copysign(jnp.clip(size, 1 / bound, bound), temperature)
    return jnp.where(is_infinite(temperature) | (jnp.sign(temperature) != jnp.sign(start)), start, step)


def _fraction_rule(fraction, sign, step_size, batch_size):
    check_real("fraction", fraction)
    number = concrete(fraction)
    if number is not None and not 0 < number < 1:
        raise ValueError(f"fraction={fraction!r}: it must lie between 0 and 1, both excluded; 1 would be SGD.")
    rho = -math.log(number) if number is not None else -jnp.log(fraction)
    if step_size is None:
        slow = 0.015 / rho  # a λ that comes down in fewer than 150 steps can give up classes
        step_size = min(0.03, slow) if number is not None else jnp.minimum(0.03, slow)
    check_positive("step_size", step_size)
    _check_batch_size(rho, batch_size)
    return Rule(Partial(_within_fraction, rho, sign, step_size), rho, fraction if sign < 0 else 1.0)


def _within_fraction(rho, sign, step_size, state, kl):
    if kl is None:
        return sign * jnp.inf
    start = 10 * jnp.abs(state.risk)  # many times the spread of losses that are at least 0, in whatever unit they are
    start = sign * jnp.where(start == 0, jnp.inf, start)
    lam = _mirror_step(rho, step_size, start, state.temperature, kl)
    limit = -2 / 3 * state.risk / jnp.maximum(jnp.asarray(rho, lam.dtype), 0.5)
    return jnp.where(sign < 0, jnp.minimum(lam, limit), lam)


def trust_fraction(fraction: ArrayLike, *, step_size: ArrayLike | None = None, batch_size: int | None = None) -> Rule:
    r"""A temperature λ < 0 that trusts a fraction of the data, given as ``temperature=``, for wrong labels.

    Weights that are uniform on a fraction φ of a batch and 0 elsewhere lie a KL divergence of
    :math:`\sum_{i \le \varphi B} \frac{1}{\varphi B} \log\frac{1}{\varphi} = -\log\varphi` from uniform. So where a
    fraction ε of the labels is wrong, the weights that leave out exactly these have a radius of

    .. math:: \rho = -\log(1 - \varepsilon) = -\log(\mathrm{fraction})

    The noise rate, which a user knows or can estimate on a sample, takes the place of λ. The weights are smooth (those
    of :func:`kl_radius`), so the fraction is an effective one: exp(-KL). They are multiplied by φ,

    .. math:: \tilde p_i = \varphi\, e^{(L_i - R)/\lambda}

    so that trusted examples keep SGD's weight of 1, where Algorithm 1 would give them 1/φ and lengthen the steps. The
    learning rate stays that of SGD. (With Adam, a constant factor has no effect.)

    A λ < 0 near 0 would silence whole classes for good before the network has learned them, because their losses are as
    high as those of wrong labels. So λ starts mild and moves slowly: the first batch is taken by SGD, then λ is -10
    times its mean loss, and from there it follows :func:`kl_radius`. It also waits for the network:

    .. math:: |\lambda| \ge \tfrac23\, R/\max(\rho, \tfrac12)

    An example with no loss has the weight φ exp(-R/λ), which is 1 if exactly the wrong labels are left out. The limit
    lets it be 1/√φ, or 2.1 φ for fractions above 0.61, and no more. So λ comes down as R does, and the fraction is
    reached when the trusted losses have become small. Losses have to be at least 0, as cross entropy is, and 0 has to
    be reachable; for others use :func:`kl_radius` with your own ``init``.

    Args:
      fraction: φ = 1 - ε, the fraction to trust, between 0 and 1. Err on the large side: trusting too few can give up
        whole classes.
      step_size: η, the relative change of λ per nat and step. λ needs at least about log(10)/(η ρ) steps to come down.
        Default: 0.03, less for fractions below 0.6, so that it never takes fewer than 150.
      batch_size: the number of examples over which R̂ is taken, if the fraction is to be checked against it here.

    Returns:
      A rule for the ``temperature`` of :func:`absgd_jax.scale_by_absgd` and of all that is built on it. It needs KL̂:
      ``update(grads, state, params, value=risk, kl=kl)``, both from ``value_and_grad(..., with_kl=True)``.

    Raises:
      ValueError: if ``fraction`` is not between 0 and 1, ``step_size`` is not positive and finite, or a fraction of
        ``batch_size`` examples is not more than one example.

    Example:
      >>> import absgd_jax
      >>> optimizer = absgd_jax.absgd(0.1, temperature=absgd_jax.trust_fraction(0.6))  # 40 % of the labels are wrong

    References:
      Qi et al., `Stochastic Constrained DRO with a Complexity Independent of Sample Size
      <https://arxiv.org/abs/2210.05740>`_, 2022, for the KL ball.
    """
    return _fraction_rule(fraction, -1, step_size, batch_size)


def focus_fraction(fraction: ArrayLike, *, step_size: ArrayLike | None = None, batch_size: int | None = None) -> Rule:
    r"""A temperature λ > 0 that focuses on a fraction of the data, given as ``temperature=``, for hard examples.

    The conditional value at risk of level α is the mean loss of the hardest fraction α; its weights are uniform on that
    fraction, and their KL divergence from uniform weights on the whole batch is −log α. With the same radius,

    .. math:: \rho = -\log \alpha = -\log(\mathrm{fraction})

    the weights of this rule are as uneven, but smooth. The first batch is taken by SGD, then λ is 10 times its mean
    loss, and from there it follows :func:`kl_radius`. As for :func:`trust_fraction`, losses have to be at least 0.

    Args:
      fraction: α, the fraction of the batch that is to count, between 0 and 1. 0.7 is mild, 0.1 is strong: bound the
        weights with ``max_weight=`` as well, at a few times 1/α.
      step_size: η, the relative change of λ per nat and step. Default: as for :func:`trust_fraction`.
      batch_size: the number of examples over which R̂ is taken, if the fraction is to be checked against it here.

    Returns:
      A rule for the ``temperature`` of :func:`absgd_jax.scale_by_absgd` and of all that is built on it. It needs KL̂:
      ``update(grads, state, params, value=risk, kl=kl)``, both from ``value_and_grad(..., with_kl=True)``.

    Raises:
      ValueError: if ``fraction`` is not between 0 and 1, ``step_size`` is not positive and finite, or a fraction of
        ``batch_size`` examples is not more than one example.

    Example:
      >>> import absgd_jax
      >>> optimizer = absgd_jax.absgd(0.1, absgd_jax.focus_fraction(0.5), max_weight=5.0)

    References:
      Rockafellar & Uryasev, *Optimization of Conditional Value-at-Risk*, 2000.
    """
    return _fraction_rule(fraction, 1, step_size, batch_size)
