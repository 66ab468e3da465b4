"""The cells of the tables: which runs a column consists of."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from examples.cifar_lt.config import LOSSES, Config
from examples.cifar_lt.errors import UsageError

TEMPERATURES = (0.1, 1.0, 10.0)
RADII = (0.3, 1.0, 2.0)
NOISE_TEMPERATURES = (-1.0, -2.0, -5.0)
TUNING_SEED, TUNING_VALIDATION = 1000, 0.1

# Table 1: weights of examples, on the losses of the paper.
TABLE_1: list[dict[str, Any]] = [
    *({"loss": loss} for loss in LOSSES[:6]),
    *({"loss": loss, "temperature": t} for loss in LOSSES[:6] for t in TEMPERATURES),
    *({"loss": loss, "algorithm": "meta"} for loss in ("ce", "focal", "ldam")),
]
# Table 2: other routes to the same end, other rules for λ and γ, and the losses that came after the paper.
TABLE_2: list[dict[str, Any]] = [
    {},
    {"balanced_batches": True},
    {"algorithm": "l2rw"},
    {"algorithm": "recover", "temperature": 1.0},
    {"gamma": 1.0, "temperature": 1.0},
    {"log_alpha": -1.0, "temperature": 1.0},
    *({"kl_radius": r, "loss": loss} for loss in ("ce", "cb-ce") for r in RADII),
    *({"classifier": name} for name in ("ncm", "crt", "tau-norm", "lws")),
    {"momentum": 0.0},
    {"momentum": 0.0, "temperature": 1.0},
    {"start": 0, "temperature": 1.0},
    *({"loss": loss} for loss in LOSSES[6:]),
    *({"loss": loss, "temperature": t} for loss in LOSSES[6:] for t in TEMPERATURES),
]
# Wrong labels: λ < 0 once the network knows the classes, before it learns the wrong labels by heart.
NOISE: list[dict[str, Any]] = [{}, *({"temperature": t, "start": 0.25} for t in NOISE_TEMPERATURES)]
# A recipe that has robust weighting in it, and the same without.
PAIR: list[dict[str, Any]] = [{"temperature": math.inf, "kl_radius": None}, {}]
TABLES = {"1": TABLE_1, "2": TABLE_2, "noise": NOISE, "pair": PAIR}

COLUMN = re.compile(r"(cifar10|cifar100)-(lt|st)-([0-9.]+)(?:-sym([0-9.]+)|-(aggre|worse|random[123]|noisy))?")


def parse_column(column: str) -> dict[str, Any]:
    """The settings that a column such as ``cifar10-lt-100`` or ``cifar10-lt-1-sym0.4`` stands for."""
    found = COLUMN.fullmatch(column)
    if not found:
        raise UsageError(
            f"column {column!r}: it should be like cifar10-lt-100 or cifar100-st-10 (dataset, long tail or step, "
            "imbalance ratio), or with wrong labels like cifar10-lt-1-sym0.4 or cifar10-lt-1-worse."
        )
    dataset, imbalance, ratio, rate, human = found.groups()
    return {
        "dataset": dataset,
        "imbalance": "step" if imbalance == "st" else "lt",
        "ratio": float(ratio),
        "symmetric_noise": float(rate or 0),
        "human_labels": human,
    }


def cells(base: Config, table: str, column: str, seeds: Sequence[int]) -> Iterator[Config]:
    """The runs of a column of a table; where they hold out no validation split, also those by which λ is chosen."""
    common = dataclasses.replace(base, **parse_column(column))
    for changes in TABLES[table]:
        changes = dict(changes)
        if isinstance(changes.get("start"), float):
            changes["start"] = int(changes["start"] * base.epochs)
        for seed in seeds:
            yield dataclasses.replace(common, seed=seed, **changes)
        tuning = dataclasses.replace(common, seed=TUNING_SEED, validation=TUNING_VALIDATION, **changes)
        if not base.validation and tuning.method in ("absgd", "kl-radius"):
            yield tuning
