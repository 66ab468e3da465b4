"""Checks of Python numbers; traced values and arrays pass unseen, so every check is safe under jit."""

import math
from typing import Any


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_temperature(temperature: Any, *, zero_allowed: bool = False) -> None:
    """Raises ValueError for a Python number that cannot be a temperature."""
    if not _is_number(temperature):
        return
    if math.isnan(temperature):
        raise ValueError(
            f"temperature={temperature!r}: it must be a number; positive lifts hard examples, negative silences "
            "outliers, float('inf') is SGD."
        )
    if temperature == 0 and not zero_allowed:
        raise ValueError(
            f"temperature={temperature!r}: the running risk would be the largest loss ever seen and training would "
            "stop. Use a small value such as 0.1, or float('inf') for SGD."
        )


def check_gamma(gamma: Any) -> None:
    """Raises ValueError for a Python number outside (0, 1]."""
    if _is_number(gamma) and not 0 < gamma <= 1:
        raise ValueError(
            f"gamma={gamma!r}: the moving average needs 0 < gamma <= 1; 1 uses the mini-batch alone, 0.9 is the usual "
            "choice."
        )


def check_finite(name: str, value: Any) -> None:
    """Raises ValueError for a Python number that is not finite."""
    if _is_number(value) and not math.isfinite(value):
        raise ValueError(f"{name}={value!r}: it must be finite.")


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError for a Python number that is not positive and finite."""
    if _is_number(value) and not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}={value!r}: it must be positive and finite.")


def check_scalar(name: str, value: Any, hint: str) -> None:
    """Raises ValueError for an array that is not a scalar (shapes are known under tracing)."""
    shape = getattr(value, "shape", ())
    if shape != ():
        raise ValueError(f"{name} has shape {tuple(shape)}, a scalar is needed. {hint}")
