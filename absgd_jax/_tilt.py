"""Exponential tilting: the one numerical kernel, which reduces a batch, merges its parts and averages over time."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from absgd_jax._validate import check_not_negative

Axis = int | Sequence[int] | None


class Tilt(NamedTuple):
    """What exponential tilting makes of a set of values: the risk, everyone's share in it, and how uneven they are."""

    risk: jax.Array  # λ log Σ ŵ_i exp(L_i/λ), with ŵ = w / Σ w
    shares: jax.Array  # p̂_i = w_i exp(L_i/λ) / Σ w_j exp(L_j/λ), which is ∂risk/∂L_i
    log_ratios: jax.Array  # log(p̂_i/ŵ_i) = (L_i - risk)/λ, 0 where w_i is
    kl: jax.Array  # KL(p̂ ‖ ŵ), which is -∂risk/∂λ
    weight: jax.Array  # Σ w


def is_infinite(temperature: jax.Array) -> jax.Array:
    """Whether λ is ±∞. States keep ±∞ as the largest finite number, so that checks for infinities pass."""
    return jnp.abs(temperature) >= jnp.finfo(temperature.dtype).max


def tilt(
    values: jax.Array, temperature: jax.Array, weights: jax.Array, axis: Axis = None, *, pair: bool = False
) -> Tilt:
    """Tilts ``values`` by exp(values/λ) under ``weights``; a value of weight 0 is left out, whatever it is.

    Exponents are taken relative to an anchor, which cancels: the largest one (so that nothing overflows) or, where λ
    exceeds the spread of the values, their mean (so that nothing cancels; at λ = ∞ the mean itself is the risk). The
    logarithm of the mean is then ``log`` far from 0 and ``log1p`` of a mean of ``expm1`` near it.

    A ``pair``, such as the past and a batch, is reduced by one operation on its two numbers: it fuses with what is
    around it, where each reduction is a kernel of its own.
    """
    present = weights > 0
    weights = jnp.where(weights == 0, 0, weights)  # what is left out has no derivative either
    values = jnp.where(present, values, 0)

    def reduce(operation, x, **options):
        return operation(*x) if pair else operation.reduce(x, axis=axis, keepdims=axis is not None, **options)

    def total(x):
        return reduce(jnp.add, x)

    def largest(x):
        return reduce(jnp.maximum, jnp.where(present, x, -jnp.inf), initial=-jnp.inf)

    empty = jnp.logical_not(reduce(jnp.logical_or, present))
    weight = jnp.where(empty, 1, total(weights))
    top, bottom = largest(values), -largest(-values)
    extreme = jnp.where(temperature < 0, bottom, top)
    at_zero, at_infinity = temperature == 0, is_infinite(temperature)
    wide = (top - bottom < jnp.abs(temperature)) | at_infinity
    anchor = jnp.where(wide, total(weights * values) / weight, extreme)
    # Where λ is 0 or ∞ the anchor is the risk; elsewhere it cancels and needs no derivative. A mean that was rounded to
    # a number outside the values would be many λ away from all of them where they are large.
    inside = jax.lax.stop_gradient(jnp.clip(anchor, bottom, top))
    anchor = jnp.where(empty, 0, jnp.where(at_infinity | at_zero, anchor, inside))

    gaps = jnp.where(present, values - anchor, 0)
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

    log_ratios = jnp.where(present, exponents - log_mean, 0)
    kl = total(shares * jnp.where(shares > 0, log_ratios, 0))
    return Tilt(
        risk=jnp.squeeze(risk, axis),
        shares=shares,
        log_ratios=log_ratios,
        kl=jnp.squeeze(kl, axis),
        weight=jnp.squeeze(total(weights), axis),
    )


def wide(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which numbers of ``dtype`` are reduced: float32 or wider."""
    narrow = not jnp.issubdtype(dtype, jnp.inexact) or jnp.finfo(dtype).bits < 32
    return jnp.dtype(jnp.float32 if narrow else dtype)


def align(name: str, value: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts ``value`` to ``shape`` from the first axis on: one weight an example is one for all of its losses."""
    value = jnp.asarray(value)
    given = value.shape
    if len(given) > len(shape) or any(size not in (1, whole) for size, whole in zip(given, shape, strict=False)):
        raise ValueError(
            f"{name} has shape {given}, the losses have {shape}. It is matched from the first axis (the examples) on, "
            "and may be shorter there; give any other axis a size of its own or of 1."
        )
    return jnp.broadcast_to(jnp.reshape(value, given + (1,) * (len(shape) - len(given))), shape)


def align_mask(where: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts a mask in the same way."""
    where = align("where", where, shape)
    if where.dtype != bool:
        raise TypeError(f"where has dtype {where.dtype}: give booleans, such as mask != 0; fractions are weights=.")
    return where


def reduction_inputs(
    losses: ArrayLike, temperature: ArrayLike, weights: ArrayLike | None, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Losses, temperature and weights as arrays of the dtype in which they are reduced: float32 or wider."""
    losses = jnp.asarray(losses)
    if jnp.issubdtype(losses.dtype, jnp.complexfloating):
        raise TypeError(f"The losses have dtype {losses.dtype}: give real numbers, such as jnp.abs(z) ** 2.")
    losses = losses.astype(wide(losses.dtype))
    if weights is None:
        weights = jnp.ones_like(losses)
    else:
        check_not_negative("weights", weights)
        weights = align("weights", weights, losses.shape).astype(losses.dtype)
    if where is not None:
        weights = jnp.where(align_mask(where, losses.shape), weights, 0)
    return losses, jnp.asarray(temperature, losses.dtype), weights


def clip_losses(losses: jax.Array, temperature: jax.Array, threshold: ArrayLike | None) -> jax.Array:
    """Losses beyond the threshold (above it for λ > 0, below it for λ < 0) weigh as much as one that lies on it.

    One that is infinite stays so: its batch is broken, and must not look like one that is not.
    """
    if threshold is None:
        return losses
    threshold = jax.lax.stop_gradient(jnp.asarray(threshold, losses.dtype))
    beyond = jnp.where(temperature < 0, losses < threshold, losses > threshold)
    return jnp.where(beyond & jnp.isfinite(losses), threshold, losses)
