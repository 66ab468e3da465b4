"""Algorithm 1: the running robust risk and the factor by which it scales a batch. Both doors of the library use it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from absgd_jax._risk import tilt
from absgd_jax._rules import AdaptiveGamma, KlRadius
from absgd_jax._validate import check_gamma, check_temperature

Temperature = ArrayLike | optax.Schedule | KlRadius
Gamma = ArrayLike | optax.Schedule | AdaptiveGamma


class ScaleByAbsgdState(NamedTuple):
    """The running robust risk, kept in units of loss: the paper's s_t is ``mass * exp(risk / temperature)``.

    Attributes:
      count: number of updates so far.
      risk: R_t, the running value of the objective F_λ, worth logging. At λ = ±inf the last batch's mean loss.
      temperature: λ with which the next batch is to be reduced.
      mass: total weight 1 - (1 - γ)^t of the batches in ``risk``; 0 until λ is finite, so that leaving λ = ∞ restarts.
    """

    count: jax.Array  # shape=(), dtype=int32
    risk: jax.Array  # shape=(), dtype=float32 or float64
    temperature: jax.Array  # shape=(), dtype=float32 or float64
    mass: jax.Array  # shape=(), dtype=float32 or float64


class Recursion(NamedTuple):
    """The moving average of Algorithm 1 as a pair of pure functions."""

    init: Callable[[jax.typing.DTypeLike], ScaleByAbsgdState]
    step: Callable[..., tuple[jax.Array, ScaleByAbsgdState]]  # (value, kl, state) -> (g̃/s, state)
    temperature: Callable[[ScaleByAbsgdState], jax.Array]


def recursion(temperature: Temperature, gamma: Gamma, bias_correction: bool) -> Recursion:
    """The moving average s ← (1 - γ) s + γ g̃, which is a merge of the past with the batch.

    The past has risk R and weight (1 - γ) m, the batch has risk R̂ and weight γ. Merging them gives the new R, and the
    batch's share σ in it is γ g̃/s, from which the factor g̃/s follows without an exponential of its own.
    """
    check_temperature(temperature)
    check_gamma(gamma)

    def temperature_at(count):
        return temperature(count) if callable(temperature) else temperature

    def current_temperature(state):
        if isinstance(temperature, KlRadius):
            return state.temperature
        return jnp.array(temperature_at(state.count), state.risk.dtype)  # a copy: the caller may donate it

    def current_gamma(state, lam):
        """γ and 1 - γ."""
        if isinstance(gamma, AdaptiveGamma):
            new, old = gamma.gamma(state.risk, lam)
            return jnp.where(state.mass == 0, 1, new), old
        new = jnp.asarray(gamma(state.count) if callable(gamma) else gamma, state.risk.dtype)
        return new, 1 - new

    def init(dtype):
        lam = temperature.init if isinstance(temperature, KlRadius) else temperature_at(0)
        # Each field is an array of its own: the state can be donated.
        return ScaleByAbsgdState(
            count=jnp.zeros((), jnp.int32),
            risk=jnp.zeros((), dtype),
            temperature=jnp.array(lam, dtype),
            mass=jnp.zeros((), dtype),
        )

    def step(value, kl, state):
        dtype = state.risk.dtype
        value, lam = jnp.asarray(value, dtype), current_temperature(state)
        new, old = current_gamma(state, lam)

        # At λ = ∞ every weight is 1 and nothing is remembered; a batch that is empty (-0.) or broken is not counted.
        plain = jnp.isinf(lam)
        seen = jnp.isfinite(value) & ~((value == 0) & jnp.signbit(value))
        past = jnp.where(plain, 0, old * state.mass)
        merged = tilt(jnp.stack([state.risk, value]), lam, jnp.stack([past, new]))
        mass = past + new
        factor = merged.shares[1] / new
        if bias_correction:
            factor = factor * mass

        following = jnp.asarray(temperature_at(state.count + 1), dtype) if callable(temperature) else lam
        if isinstance(temperature, KlRadius):
            factor = jnp.minimum(factor, 1)  # R lags behind a λ that falls
            kl = jnp.asarray(kl, dtype)
            seen &= jnp.isfinite(kl)
            following = jnp.where(seen, temperature.next_temperature(lam, kl), lam)
        state = ScaleByAbsgdState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            risk=jnp.where(seen, merged.risk, state.risk),
            temperature=following,
            mass=jnp.where(seen, jnp.where(plain, 0, mass), state.mass),
        )
        return jnp.where(seen & ~plain, factor, 1), state

    return Recursion(init, step, current_temperature)
