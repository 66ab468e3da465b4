"""What a run leaves behind: a line of metrics an epoch, and the result."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from examples.cifar_lt.config import Config, jsonable
from examples.cifar_lt.imbalance import groups

Line = dict[str, Any]
PACKAGES = ("absgd_jax", "jax", "flax", "optax", "numpy")


class MetricsLog:
    """The file ``metrics.jsonl``: one JSON object a line, one line an epoch.

    Args:
      path: of the file.
      epochs: how many were done by the checkpoint from which the run goes on; what a kill left after them (a whole line
        or a torn one) is dropped.
    """

    def __init__(self, path: Path, epochs: int):
        self._path = path
        kept = path.read_text().splitlines()[:epochs] if path.exists() else []
        self.lines: list[Line] = [json.loads(line) for line in kept]
        write_whole(path, "".join(f"{line}\n" for line in kept))

    def append(self, line: Line) -> None:
        """Writes a line down for good. Done before the epoch's checkpoint, so that no checkpoint lacks a line."""
        self.lines.append(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that it is there as a whole or as it was before."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def accuracies(correct: np.ndarray, labels: np.ndarray) -> tuple[float, list[float]]:
    """The accuracy over all classes' mean, and that of each class, in percent.

    On the test set, where all classes have as many images, the first is top-1.
    """
    per_class = 100 * correct / np.bincount(labels, minlength=len(correct))
    return float(np.mean(per_class)), [float(accuracy) for accuracy in per_class]


def make_result(config: Config, counts: np.ndarray, lines: list[Line], command: str) -> dict[str, Any]:
    """The result of a run: that of its last epoch, never of its best one."""
    last = lines[-1]
    per_class = np.array(last["per_class"])
    means = {name: float(per_class[of].mean()) if of.any() else None for name, of in groups(counts).items()}
    named = ("dataset", "imbalance", "ratio", "preset", "method", "loss", "kl_radius", "seed", "epochs")
    return {
        **{name: getattr(config, name) for name in named},
        "temperature": None if config.method == "kl-radius" else jsonable(config.temperature),
        "top1": last["top1"],
        **means,
        "val_top1": last["val_top1"],
        "per_class": last["per_class"],
        "class_counts": counts.tolist(),
        "final": {name: last[name] for name in ("loss", "risk", "ess", "temperature")},
        "seconds": sum(line["seconds"] for line in lines),
        "compile_seconds": sum(line["compile_seconds"] for line in lines),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "config": config.identity(),
        "command": command,
    }


def hardware() -> str:
    """The device that JAX computes on."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    names = [line for line in _cpu_info() if line.startswith("model name")]
    name = names[0].split(":", 1)[1].strip() if names else platform.machine()
    return f"{os.cpu_count()} cores of {name}"


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
