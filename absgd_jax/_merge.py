"""Merging the risks of parts: micro-batches of a step, devices of a mesh, the past and the present."""

from collections.abc import Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from absgd_jax._tilt import Tilt, reduction_inputs, tilt
from absgd_jax._validate import check_temperature

AxisName = Hashable | tuple[Hashable, ...]


class Part(NamedTuple):
    """What has to be known of a set of examples to merge it with another; stacked, of several sets."""

    risk: jax.Array  # R̂ of the set
    weight: jax.Array  # total weight of its examples, 0 if it is empty
    kl: jax.Array  # KL(p̂ ‖ ŵ) within the set


def merge_parts(parts: Part, temperature: jax.Array) -> tuple[Part, Tilt]:
    """Merges parts stacked along the first axis; also returns the tilt between them.

    By the chain rule of the KL divergence that of the whole is that between the parts plus the mean within them.
    """
    merged = tilt(parts.risk, temperature, parts.weight, axis=0)
    kl = merged.kl + jnp.sum(merged.shares * parts.kl, axis=0)
    return Part(merged.risk, merged.weight, kl), merged


def merge_devices(part: Part, temperature: jax.Array, axis_name: AxisName) -> tuple[Part, jax.Array, jax.Array]:
    """Merges the parts of all devices; also returns this device's share σ and log-ratio in it.

    Every device lays its three numbers into a row of its own and the rows are summed: a psum rather than an all_gather,
    because its result is known to be the same on all devices, which shard_map asks of an output that is not sharded.
    """
    numbers, me = jnp.stack(part), jax.lax.axis_index(axis_name)
    rows = jnp.zeros((jax.lax.psum(1, axis_name), *numbers.shape), numbers.dtype).at[me].set(numbers)
    rows = jnp.moveaxis(jax.lax.psum(rows, axis_name), 1, 0)
    whole, between = merge_parts(Part(*rows), temperature)
    return whole, between.shares[me], between.log_ratios[me]


def merge_risks(
    risks: ArrayLike,
    temperature: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""The risk of a union from the risks of its parts, and every part's share in its gradient.

    .. math::
        \hat R = \lambda \log \sum_k w_k e^{\hat R_k/\lambda}, \qquad
        \nabla \hat R = \sum_k \sigma_k \nabla \hat R_k, \qquad
        \sigma_k = \frac{w_k e^{\hat R_k/\lambda}}{\sum_j w_j e^{\hat R_j/\lambda}}

    This is the entropic risk of the parts' risks, so it is exact and associative: the parts may be examples,
    micro-batches or devices, merged in any order. To differentiate over devices, use
    ``entropic_risk(..., axis_name=)``.

    Args:
      risks: the parts' risks R̂_k, shape (K,), in units of loss; with ``axis_name`` this device's own, a scalar.
      temperature: λ, the scalar with which the parts were reduced.
      weights: the parts' total weights (their numbers of examples), of the shape of ``risks``; a part of weight 0 is
        empty and left out. Default: all equal.
      axis_name: the name of the ``shard_map``, ``pmap`` or ``vmap`` axis over which to merge: one collective of a few
        numbers.

    Returns:
      The pair (R̂, σ): the merged risk, a scalar, and the shares, of the shape of ``risks``.

    Raises:
      ValueError: if ``temperature`` is NaN or not a scalar, or one of the ``weights`` is a negative or infinite number.

    Example:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import entropic_risk, merge_risks
      >>> losses = jnp.array([0., 1., 4., 2., 3., 8.])
      >>> parts = jnp.stack([entropic_risk(losses[:4], 2.0), entropic_risk(losses[4:], 2.0)])
      >>> risk, shares = merge_risks(parts, 2.0, weights=jnp.array([4, 2]))
      >>> print(risk, entropic_risk(losses, 2.0), shares.tolist())
      4.9653 4.9653 [0.1776, 0.8224]
    """
    check_temperature(temperature, zero_allowed=True)
    risks, temperature, weights = reduction_inputs(risks, temperature, weights, None)
    parts = Part(risks, weights, jnp.zeros_like(risks))
    if axis_name is None:
        if risks.ndim == 0:
            raise ValueError("risks has shape (): give the parts' risks, shape (K,), or the axis_name of the devices.")
        whole, between = merge_parts(parts, temperature)
        return whole.risk, between.shares
    whole, share, _ = merge_devices(parts, temperature, axis_name)
    return whole.risk, share
