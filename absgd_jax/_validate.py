"""Checks of types and shapes, and of the values of Python's and NumPy's numbers: all are safe under tracing."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def concrete(value: Any) -> float | None:
    """The value of a real number of Python's or NumPy's; None for all else: arrays, schedules, rules, tracers."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, (np.ndarray, np.generic)) and value.shape == () and _is_real(value.dtype):
        return float(value)
    return None


def _is_real(dtype: Any) -> bool:
    """Whether it is a dtype of integers or floats, bfloat16 and its like included."""
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer))


def check_temperature(temperature: Any, *, zero_allowed: bool = False) -> None:
    """Raises ValueError for a number that cannot be a temperature."""
    check_scalar("temperature", temperature, "Use jax.vmap for several temperatures.")
    number = concrete(temperature)
    if number is None:
        return
    if math.isnan(number):
        raise ValueError(
            f"temperature={temperature!r}: it must be a number; positive emphasises hard examples, negative suppresses "
            "outliers, float('inf') is SGD."
        )
    if number == 0 and not zero_allowed:
        raise ValueError(
            f"temperature={temperature!r}: the running risk would be the largest loss ever seen and training would "
            "stop. Use a small value such as 0.1, or float('inf') for SGD."
        )


def check_gamma(gamma: Any) -> None:
    """Raises ValueError for a number outside (0, 1]."""
    check_scalar("gamma", gamma, "Use jax.vmap for several values.")
    number = concrete(gamma)
    if number is not None and not 0 < number <= 1:
        raise ValueError(
            f"gamma={gamma!r}: the moving average needs 0 < gamma <= 1; 1 uses the mini-batch alone, 0.9 is the usual "
            "choice."
        )


def check_max_weight(max_weight: Any) -> None:
    """Raises ValueError for a number that is not above 1."""
    check_scalar("max_weight", max_weight, "Use jax.vmap for several values.")
    number = concrete(max_weight)
    if number is not None and not number > 1:
        raise ValueError(
            f"max_weight={max_weight!r}: it must be above 1, the weight that SGD gives to every example; 3 is a "
            "cautious choice, float('inf') is no bound."
        )


def check_finite(name: str, value: Any, *, at_least: float = -math.inf) -> None:
    """Raises ValueError for a number that is not finite, or less than ``at_least``."""
    check_real(name, value)
    number = concrete(value)
    if number is not None and not (math.isfinite(number) and number >= at_least):
        raise ValueError(
            f"{name}={value!r}: it must be finite{f' and at least {at_least}' if at_least > -math.inf else ''}."
        )


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError for a number that is not positive and finite."""
    check_real(name, value)
    number = concrete(value)
    if number is not None and not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name}={value!r}: it must be positive and finite.")


def check_real(name: str, value: Any) -> None:
    """Raises TypeError for what is no real number, and no array of them: a text from a file, None, True."""
    dtype = getattr(value, "dtype", None)
    if isinstance(value, bool) or not (isinstance(value, (int, float)) or (dtype is not None and _is_real(dtype))):
        kind = type(value).__name__ if dtype is None else f"{type(value).__name__} of dtype {dtype}"
        raise TypeError(f"{name}={value!r} is a {kind}: give a real number, or an array of one.")


def check_scalar(name: str, value: Any, hint: str) -> None:
    """Raises TypeError for what is no real number, and ValueError for an array that is not a scalar."""
    check_real(name, value)
    if shape := getattr(value, "shape", ()):
        raise ValueError(f"{name} has shape {tuple(shape)}, a scalar is needed. {hint}")


def check_not_negative(name: str, values: Any) -> bool:
    """Raises ValueError if any of Python's or NumPy's numbers is negative, infinite or NaN; whether they are such."""
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(values)):
        return False
    numbers = np.asarray(values)
    if not (numbers.dtype == bool or _is_real(numbers.dtype)):
        raise TypeError(f"{name} has dtype {numbers.dtype}: give real numbers.")
    numbers = numbers.astype(float)
    bad = numbers[~((numbers >= 0) & (numbers < np.inf))]
    if bad.size:
        raise ValueError(f"{name} contains {bad[0]}: give finite numbers that are not negative.")
    return True
