"""One JSON a run: what was asked for, what came out, and what it depends on."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from examples.environment import hardware, versions
from examples.lab import files, plan, trainer
from examples.lab.config import Run, describe
from examples.lab.errors import UserError
from examples.lab.recipe import SYMBOLS, Recipe

SERIES = (
    "loss",
    "risk",
    "sample_size",
    "largest_weight",
    "temperature",
    "weight_of_wrong",
    "test_accuracy",
    "validation_accuracy",
)


def shots(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Masks of the classes of over 100, of 20 to 100 and of less than 20 training examples (Liu et al. 2019)."""
    many, few = counts > 100, counts < 20
    return {"many": many, "medium": ~many & ~few, "few": few}


def record(experiment: str, recipe: Recipe, run: Run, settings: trainer.Settings, command: str) -> dict[str, Any]:
    """The record of a run that is done."""
    data = trainer.load(run.task, settings.data_dir)
    _, lines = trainer.left_by(run, settings)
    last, counts = lines[-1], np.bincount(data.train.labels, minlength=run.task.classes)
    per_class = np.array(last["test_per_class"], float)
    groups = {name: mask & np.isfinite(per_class) for name, mask in shots(counts).items()}
    return {
        "experiment": experiment,
        "preset": recipe.preset,
        "dataset": recipe.dataset,
        "method": recipe.title,
        "loss": recipe.loss,
        **{name: getattr(recipe, name) for name in SYMBOLS},
        "seed": recipe.seed,
        "accuracy": last["test_accuracy"],
        "balanced_accuracy": float(np.nanmean(per_class)),
        "validation_accuracy": last.get("validation_accuracy"),
        **{name: float(per_class[mask].mean()) if mask.any() else None for name, mask in groups.items()},
        "per_class": per_class.round(2).tolist(),
        "class_counts": counts.tolist(),
        "epochs": run.epochs,
        "stages": [stage.epochs for stage in run.stages],
        "by_epoch": {
            name: [[line["epoch"], round(line[name], 4)] for line in lines if name in line] for name in SERIES
        },
        "diverged": not all(math.isfinite(line.get("loss", 0)) for line in lines),
        "seconds": round(sum(line["seconds"] for line in lines), 1),
        "command": command,
        "config": describe(recipe) | {"run": describe(run)},
        "code": plan.program(),
        "versions": versions(),
        "hardware": hardware(),
    }


def read(path: Path) -> dict[str, Any]:
    """A record, with what was not finite as numbers again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        content["config"]["run"]
        content["by_epoch"] = {
            name: [[epoch, float(value)] for epoch, value in series] for name, series in content["by_epoch"].items()
        }
        if missing := {"accuracy", "diverged", "experiment", "hardware", "seconds"} - set(content):
            raise KeyError(missing)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not the record of a run. Choose another --out, or delete it.") from None
    return content


def is_done(path: Path, recipe: Recipe, run: Run) -> bool:
    """Whether the record is there; one of other settings is not overwritten."""
    if not path.exists():
        return False
    there, here = read(path)["config"], files.jsonable(describe(recipe) | {"run": describe(run)})
    changed = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if changed:
        differences = ", ".join(f"{k}: {there.get(k)} there, {here.get(k)} here" for k in changed)
        raise UserError(f"{path} is of a run with other settings ({differences}). Choose another --out, or delete it.")
    return True


def summary(path: Path) -> str:
    content = read(path)
    groups = ", ".join(f"{k} {content[k]:.2f} %" for k in ("many", "medium", "few") if content[k] is not None)
    return f"test accuracy {content['accuracy']:.2f} % ({groups})"
