"""The entropic risk: one operation that reduces a batch, merges its parts and averages over time."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from absgd_jax._validate import check_scalar, check_temperature

Axis = int | Sequence[int] | None


class Tilt(NamedTuple):
    """What exponential tilting makes of a set of values: the risk, everyone's share in it, and how uneven they are."""

    risk: jax.Array  # λ log Σ ŵ_i exp(L_i/λ), with ŵ = w / Σ w
    shares: jax.Array  # p̂_i = w_i exp(L_i/λ) / Σ w_j exp(L_j/λ), which is ∂risk/∂L_i
    kl: jax.Array  # KL(p̂ ‖ ŵ), which is -∂risk/∂λ
    slopes: jax.Array  # λ (p̂_i/ŵ_i - 1) / Σ w, which is ∂risk/∂w_i


def tilt(values: jax.Array, temperature: jax.Array, weights: jax.Array, axis: Axis = None) -> Tilt:
    """Tilts ``values`` by exp(values/λ) under ``weights``; a value of weight 0 is left out, whatever it is.

    Exponents are taken relative to an anchor, which cancels: the largest one (so that nothing overflows) or, where λ
    exceeds the spread of the values, their mean (so that nothing cancels; at λ = ∞ the mean itself is the risk). The
    logarithm of the mean is then ``log`` far from 0 and ``log1p`` of a mean of ``expm1`` near it.
    """
    present = weights > 0
    values = jnp.where(present, values, 0)

    def total(x):
        return jnp.sum(x, axis, keepdims=True)

    def largest(x):
        return jnp.max(jnp.where(present, x, -jnp.inf), axis, keepdims=True)

    empty = jnp.logical_not(jnp.any(present, axis, keepdims=True))
    weight = jnp.where(empty, 1, total(weights))
    top, bottom = largest(values), -largest(-values)
    extreme = jnp.where(temperature < 0, bottom, top)
    wide = (top - bottom < jnp.abs(temperature)) | jnp.isinf(temperature)
    anchor = jnp.where(wide, total(weights * values) / weight, extreme)
    # The shares do not depend on the anchor, so it needs no derivative.
    anchor = jax.lax.stop_gradient(jnp.where(empty, 0, anchor))

    gaps = jnp.where(present, values - anchor, 0)
    at_zero, at_infinity = temperature == 0, jnp.isinf(temperature)
    scale = jnp.where(at_infinity, 1, temperature)
    exponents = jnp.where(at_infinity, 0, gaps / jnp.where(at_zero, 1, scale))
    exponents = jnp.where(at_zero, jnp.where(gaps == 0, 0, -jnp.inf), exponents)

    tilted = weights * jnp.exp(exponents)
    normalizer = jnp.where(empty, 1, total(tilted))
    shares = tilted / normalizer

    mean = normalizer / weight
    far = mean < 0.5
    mean_less_one = jnp.where(far, 0, total(weights * jnp.expm1(exponents)) / weight)
    log_mean = jnp.where(far, jnp.log(jnp.where(far, mean, 1)), jnp.log1p(mean_less_one))
    risk = jnp.where(jnp.isfinite(anchor), anchor + scale * log_mean, anchor)
    # The sign of a zero tells an empty set (-0., nothing was seen) from a set whose risk is zero (0.).
    risk = jnp.where(empty, jnp.asarray(-0.0, values.dtype), jnp.where(risk == 0, 0, risk))

    surprise = jnp.where(shares > 0, exponents - log_mean, 0)  # log(p̂/ŵ)
    kl = total(shares * surprise)
    slopes = jnp.where(at_infinity, gaps, scale * jnp.expm1(exponents - log_mean)) / weight
    return Tilt(
        risk=jnp.squeeze(risk, axis),
        shares=shares,
        kl=jnp.squeeze(kl, axis),
        slopes=jnp.where(present, slopes, 0),
    )


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _risk(losses: jax.Array, temperature: jax.Array, weights: jax.Array, axis: Axis) -> jax.Array:
    return tilt(losses, temperature, weights, axis).risk


@_risk.defjvp
def _risk_jvp(axis, primals, tangents):
    losses, temperature, weights = primals
    d_losses, d_temperature, d_weights = tangents
    risk, shares, kl, slopes = tilt(losses, temperature, weights, axis)
    d_losses = jnp.where(weights > 0, d_losses, 0)  # a padded example may carry any tangent, NaN included
    return risk, jnp.sum(shares * d_losses + slopes * d_weights, axis) - kl * d_temperature


def reduction_inputs(
    losses: ArrayLike, temperature: ArrayLike, weights: ArrayLike | None, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses, temperature and weights as arrays of the dtype in which they are reduced: float32 or wider."""
    check_scalar("temperature", temperature, "Use jax.vmap for several temperatures.")
    losses = jnp.asarray(losses)
    dtype = jnp.promote_types(losses.dtype, jnp.float32)
    losses = losses.astype(dtype)
    weights = jnp.ones(losses.shape, dtype) if weights is None else jnp.broadcast_to(weights, losses.shape)
    weights = weights.astype(dtype)
    if where is not None:
        weights = jnp.where(where, weights, 0)
    return losses, jnp.asarray(temperature, dtype), weights


def entropic_risk(
    losses: ArrayLike,
    temperature: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
    axis: Axis = None,
) -> jax.Array:
    r"""The KL-regularised robust loss of a batch, whose gradient is the softmax-weighted gradient.

    .. math::
        \hat R = \lambda \log \sum_i w_i e^{L_i/\lambda}, \qquad
        \nabla \hat R = \sum_i \hat p_i \nabla L_i, \qquad
        \hat p_i = \frac{w_i e^{L_i/\lambda}}{\sum_j w_j e^{L_j/\lambda}}, \qquad
        \frac{\partial \hat R}{\partial \lambda} = -\mathrm{KL}(\hat p \,\|\, w)

    It never overflows, and is exact to rounding from λ = 0 (the largest loss) to λ = ±inf (the mean). For λ < 0 it is a
    soft minimum: outliers lose their weight.

    Args:
      losses: per-example losses, any shape. Half precision is reduced in float32; float64 stays float64.
      temperature: λ, a scalar in units of loss: positive, negative, ±inf or 0; a Python number or a traced value.
      weights: non-negative weights of the examples, broadcast to ``losses``; they are normalised to sum to 1, and an
        example of weight 0 is left out. Default: all equal.
      where: boolean mask, broadcast to ``losses``; False leaves a (padded) example out, whatever its loss is, NaN
        included. With nothing left the risk is -0. and its gradient 0; the sign of the zero tells
        :func:`absgd_jax.scale_by_absgd` that nothing was seen.
      axis: the axes to reduce, as in :func:`jax.numpy.mean`. Default: all.

    Returns:
      R̂ in units of loss, float32 or wider, of the shape that remains when ``axis`` is reduced.

    Raises:
      ValueError: if ``temperature`` is NaN or not a scalar.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from absgd_jax import entropic_risk
      >>> losses = jnp.array([0., 1., 4.])
      >>> print(entropic_risk(losses, 1.0))
      2.967
      >>> print(jax.grad(entropic_risk)(losses, 1.0).tolist())  # the weights
      [0.017, 0.047, 0.936]
      >>> print(entropic_risk(losses, float("inf")))  # the mean
      1.667

    References:
      Qi et al., `Attentional-Biased Stochastic Gradient Descent <https://arxiv.org/abs/2012.06951>`_, eq. (2).
      Li et al., `Tilted Empirical Risk Minimization <https://arxiv.org/abs/2007.01162>`_, 2021.
    """
    check_temperature(temperature, zero_allowed=True)
    return _risk(*reduction_inputs(losses, temperature, weights, where), axis)
