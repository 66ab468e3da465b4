"""What a result depends on beside its settings: the hardware and the versions."""

import platform
from importlib.metadata import version
from pathlib import Path

import jax
import joblib

PACKAGES = ("absgd_jax", "jax", "flax", "optax", "numpy")


def hardware() -> str:
    """The device that JAX computes on."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    model = names[0].split(":", 1)[1].strip() if names else platform.machine()
    cores = joblib.cpu_count()  # that this process may use
    return f"{cores} CPU core{'s' * (cores != 1)} ({model})"


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
