"""Algorithm 1: the running robust risk and the factor by which it scales a batch. Both APIs of the library use it."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from absgd_jax._rules import Gamma, Rule, Temperature, evaluate
from absgd_jax._state import ScaleByAbsgdState, keep_finite
from absgd_jax._tilt import is_infinite, tilt
from absgd_jax._validate import check_gamma, check_max_weight, check_positive, check_temperature


class Recursion(NamedTuple):
    """The moving average of Algorithm 1 as pure functions."""

    init: Callable[[DTypeLike], ScaleByAbsgdState]
    now: Callable[[ScaleByAbsgdState], ScaleByAbsgdState]  # the state with the λ and c of the next batch
    step: Callable[..., tuple[jax.Array, ScaleByAbsgdState]]  # (value, kl, state) -> (g̃/s, state)


def settle(state: ScaleByAbsgdState) -> ScaleByAbsgdState:
    """Takes the next batch at λ = ∞ if weights are bounded and there is no risk yet to which a loss could be compared.

    The mean loss of that batch is then what the next one is compared to.
    """
    unknown = ~is_infinite(state.max_weight) & (state.mass == 0) & (state.risk == 0)
    infinity = jnp.finfo(state.temperature.dtype).max
    return state._replace(temperature=jnp.where(unknown, infinity, state.temperature))


def _follows_training(value: Temperature | Gamma) -> bool:
    return isinstance(value, Rule) or callable(value)


def recursion(temperature: Temperature, gamma: Gamma, max_weight: ArrayLike, bias_correction: bool) -> Recursion:
    """The moving average s ← (1 - γ) s + γ g̃, which is a merge of the past with the batch.

    The past has risk R and weight (1 - γ) m, the batch has risk R̂ and weight γ. Merging them gives the new R, and the
    batch's share σ in it is γ g̃/s, from which the factor g̃/s follows without an exponential of its own.
    """
    if not _follows_training(temperature):
        check_temperature(temperature)
    elif isinstance(temperature, Rule):
        check_positive("mean_weight", temperature.mean_weight)
    if not _follows_training(gamma):
        check_gamma(gamma)
    elif isinstance(gamma, Rule) and gamma.radius is not None:
        raise TypeError("gamma is a rule that aims at a radius: give it as temperature=.")
    check_max_weight(max_weight)

    def with_temperature(state, lam):
        return settle(state._replace(temperature=keep_finite(lam, state.risk.dtype)))

    def now(state):
        if shape := jnp.shape(state.risk):
            raise ValueError(
                f"The state's risk has shape {shape}, a scalar is needed: make the state with the init() that belongs "
                "to this update. (A state of within_groups belongs to the update of within_groups.)"
            )
        # Numbers and schedules are read where they are given, so that one that is injected or changed holds at once.
        state = state._replace(max_weight=keep_finite(max_weight, state.risk.dtype))
        lam = state.temperature if isinstance(temperature, Rule) else evaluate("temperature", temperature, state)
        return with_temperature(state, lam)

    def init(dtype):
        def zero(dtype):  # each field is an array of its own: the state can be donated
            return jnp.zeros((), dtype)

        state = ScaleByAbsgdState(
            zero(jnp.int32), zero(dtype), zero(dtype), zero(dtype), keep_finite(max_weight, dtype)
        )
        return with_temperature(state, evaluate("temperature", temperature, state))

    def step(value, kl, state):
        dtype = state.risk.dtype
        value, state = jnp.asarray(value, dtype), now(state)
        lam, kl = state.temperature, None if kl is None else jnp.asarray(kl, dtype)
        new = evaluate("gamma", gamma, state)
        new, old = new if isinstance(new, tuple) else (new, 1 - jnp.asarray(new, dtype))
        new, old = jnp.asarray(new, dtype), jnp.asarray(old, dtype)

        # At λ = ∞ every weight is 1 and nothing is remembered; a batch that is empty (-0.) or broken is not counted.
        plain = is_infinite(lam)
        past = jnp.where(plain, 0, old * state.mass)
        weights = jnp.stack([past, jnp.where(plain, 1, new)])
        merged = tilt(jnp.stack([state.risk, value]), lam, weights, pair=True)
        seen = jnp.isfinite(value) & ~((value == 0) & jnp.signbit(value)) & (merged.weight > 0)
        seen &= ~jnp.isnan(merged.risk)  # as it is if λ is

        # g̃/s by the batch's share where γ can divide it, else (γ = 0 leaves the past as it is) by its definition.
        mass = jnp.where(merged.weight > 0, merged.weight, 1)
        divisible = new > 1e-6
        exponent = jnp.where(divisible, 0, value - merged.risk) / jnp.where((lam == 0) | divisible, 1, lam)
        factor = jnp.where(divisible, merged.shares[1] / jnp.where(divisible, new, 1), jnp.exp(exponent) / mass)
        factor = jnp.minimum(factor, jnp.finfo(dtype).max)
        if bias_correction:
            factor = factor * mass
        if isinstance(temperature, Rule):  # R lags behind a λ that falls
            factor = jnp.minimum(factor, 1) * jnp.asarray(temperature.mean_weight, dtype)
            seen &= True if kl is None else jnp.isfinite(kl)

        after = state._replace(
            count=jnp.asarray(optax.safe_increment(state.count)),
            risk=jnp.where(seen, merged.risk, state.risk),
            mass=jnp.where(seen, jnp.where(plain, 0, mass), state.mass),
        )
        following = evaluate("temperature", temperature, after, kl)
        if isinstance(temperature, Rule):
            following = jnp.where(seen & ~jnp.isnan(following), following, lam)
        return jnp.where(seen & ~plain, factor, 1), with_temperature(after, following)

    return Recursion(init, now, step)
