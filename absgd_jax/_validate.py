"""Checks of Python's and NumPy's numbers; JAX arrays pass unseen, so every check is safe under tracing."""

import math
from typing import Any

import numpy as np


def concrete(value: Any) -> float | None:
    """The value of a real number of Python's or NumPy's; None for all else: arrays, schedules, rules, tracers."""
    if isinstance(value, (bool, np.bool_)):
        return None
    if isinstance(value, (int, float, np.integer, np.floating)):
        return float(value)
    if isinstance(value, np.ndarray) and value.shape == () and value.dtype.kind in "iuf":
        return float(value)
    return None


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


def check_finite(name: str, value: Any) -> None:
    """Raises ValueError for a number that is not finite."""
    number = concrete(value)
    if number is not None and not math.isfinite(number):
        raise ValueError(f"{name}={value!r}: it must be finite.")


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError for a number that is not positive and finite."""
    number = concrete(value)
    if number is not None and not (number > 0 and math.isfinite(number)):
        raise ValueError(f"{name}={value!r}: it must be positive and finite.")


def check_scalar(name: str, value: Any, hint: str) -> None:
    """Raises ValueError for an array that is not a scalar (shapes are known under tracing)."""
    shape = getattr(value, "shape", ())
    if shape != ():
        raise ValueError(f"{name} has shape {tuple(shape)}, a scalar is needed. {hint}")
