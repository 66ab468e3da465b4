"""The state of the method: four numbers of the recursion, and the bound on the weights."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from absgd_jax._tilt import is_infinite
from absgd_jax._validate import concrete


class ScaleByAbsgdState(NamedTuple):
    """The running robust risk, kept in units of loss: the paper's s_t is ``mass * exp(risk / temperature)``.

    An infinite λ or bound is kept as the largest finite number of the dtype.

    Attributes:
      count: number of updates so far.
      risk: R_t, the running robust risk, worth logging: an example whose loss equals it has weight 1. Unless the
        weights are bounded, it is the running value of the objective F_λ. At λ = ±inf it is the last batch's mean loss.
      temperature: λ with which to reduce the next batch.
      mass: total weight 1 - (1 - γ)^t of the batches in ``risk``; 0 until λ is finite, so that leaving λ = ∞ restarts
        the average.
      max_weight: c, the largest weight exp((L - risk)/λ) of an example.
    """

    count: jax.Array  # shape=(), dtype=int32
    risk: jax.Array  # shape=(), dtype=float32 or float64
    temperature: jax.Array  # shape=(), dtype=float32 or float64
    mass: jax.Array  # shape=(), dtype=float32 or float64
    max_weight: jax.Array  # shape=(), dtype=float32 or float64

    @property
    def threshold(self) -> jax.Array:
        """The loss of weight ``max_weight``, risk + λ log(max_weight), for :func:`absgd_jax.entropic_risk`.

        Without a bound it is the largest number or, for λ < 0, the smallest.
        """
        largest = jnp.copysign(jnp.finfo(self.risk.dtype).max, self.temperature)
        unbounded = is_infinite(self.max_weight) | is_infinite(self.temperature)
        lam = jnp.where(unbounded, 0, self.temperature)
        return jnp.where(unbounded, largest, self.risk + lam * jnp.log(self.max_weight))


def keep_finite(value, dtype) -> jax.Array:
    """``value`` as an array of its own (the caller may donate the other) in which ±∞ is the largest finite number."""
    largest = jnp.finfo(dtype).max
    if (number := concrete(value)) is not None and abs(number) > largest:
        value = math.copysign(float(largest), number)  # before it is an array, so that none is ever infinite
    return jnp.clip(jnp.array(value, dtype), -largest, largest)
