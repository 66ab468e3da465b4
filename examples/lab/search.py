"""A search that says beforehand what it will try: ``python -m examples.<experiment> search FOLDER``.

``FOLDER/space.json`` is written, and committed, before anything is trained:

    {"preset": "fast", "dataset": "cifar10-lt-100",
     "baseline": {"loss": "balanced-softmax"},
     "candidates": [{"loss": "balanced-softmax", "method": "absgd", "temperature": 1.0, "max_weight": 3.0}],
     "choosing_seeds": 2, "confirmed": 1, "confirming_seeds": [100, 101, 102, 103, 104]}

Baseline and candidates are trained without a validation split, by which the best candidates are chosen among those
that are better there than the baseline; these and the baseline are trained anew on all data with seeds that nothing was
chosen by. The result is the difference on the test set, seed by seed, with Student's interval.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy  # its parts are imported when they are used

from examples import style
from examples.lab import figures, files, processes, records, report
from examples.lab.errors import UserError
from examples.lab.experiment import TUNING_VALIDATION, Experiment, with_seeds
from examples.lab.recipe import Recipe

KEYS = {"preset", "dataset", "baseline", "candidates", "choosing_seeds", "confirmed", "confirming_seeds"}


def search(experiment: Experiment, folder: Path, train: Callable[[Sequence[Recipe]], Any]) -> str:
    """Runs what is registered, as far as it has no record yet.

    Args:
      experiment: the experiment.
      folder: the search's folder, with ``space.json``; records and the result are written there.
      train: trains recipes and writes their records into the folder.

    Returns:
      The result as Markdown, which is also in ``result.md``; its numbers are in ``result.json``, its picture in
      ``result.png``.
    """
    space = _read(folder / "space.json")
    base = experiment.base(space["preset"], space["dataset"])
    try:
        baseline, *candidates = (dataclasses.replace(base, **row) for row in [space["baseline"], *space["candidates"]])
    except TypeError as error:
        raise UserError(f"{folder / 'space.json'}: {error}.") from None

    def accuracies(runs: Sequence[Recipe], name: str) -> np.ndarray:
        return np.array([records.read(experiment.path(run, folder))[name] for run in runs], float)

    def held_out(row: Recipe) -> list[Recipe]:
        return with_seeds(dataclasses.replace(row, validation=TUNING_VALIDATION), space["choosing_seeds"])

    def anew(row: Recipe) -> list[Recipe]:
        return [dataclasses.replace(row, seed=seed) for seed in space["confirming_seeds"]]

    train([run for row in (baseline, *candidates) for run in held_out(row)])
    by_validation = {row: accuracies(held_out(row), "validation_accuracy") for row in (baseline, *candidates)}
    better = [row for row in candidates if by_validation[row].mean() > by_validation[baseline].mean()]
    best = sorted(better, key=lambda row: -by_validation[row].mean())[: space["confirmed"]]
    compared = [baseline, *best] if best else []
    train([run for row in compared for run in anew(row)])
    result = []
    for row, scores in by_validation.items():
        names = {"recipe": experiment.name_of(row), "label": label(experiment, row), "method": row.method}
        line: dict[str, Any] = names | {"validation": scores.tolist()}
        if row in compared:
            test = accuracies(anew(row), "accuracy")
            line |= {"test": test.tolist(), "difference": (test - accuracies(anew(baseline), "accuracy")).tolist()}
        if row in best:
            line["interval"] = list(scipy.stats.ttest_1samp(line["difference"], 0.0).confidence_interval())
        result.append(line)
    processes.by_first(lambda: _write(folder, space, result))
    return markdown(result)


def label(experiment: Experiment, row: Recipe) -> str:
    """A recipe in words, for tables and pictures."""
    changes = (f"{name.replace('_', ' ')} {value:g}" for name, value in experiment.changed(row).items())
    parts = (style.name(row.title), row.loss, report.strength(dataclasses.asdict(row)), *changes)
    return ", ".join(part for part in parts if part != report.NOTHING)


def _write(folder: Path, space: dict[str, Any], result: list[dict[str, Any]]) -> None:
    files.write_json(folder / "result.json", {"space": space, "result": result})
    if confirmed := [line for line in result if "interval" in line]:
        style.save(figures.differences(confirmed), folder / "result.png")
    files.write(folder / "result.md", f"{markdown(result)}\n".encode())


def markdown(result: list[dict[str, Any]]) -> str:
    """The candidates by validation accuracy, and of the confirmed ones the difference to the baseline, the first."""
    rows = []
    for line in [result[0], *sorted(result[1:], key=lambda line: -np.mean(line["validation"]))]:
        row = {"recipe": line["label"], "validation accuracy": f"{np.mean(line['validation']):.2f}"}
        row |= {"test accuracy": "" if line is result[0] else "not confirmed", "difference": "", "95 % interval": ""}
        if "test" in line:
            row["test accuracy"] = report.spread(pd.Series(line["test"]))
        if "interval" in line:
            low, high = line["interval"]
            row |= {"difference": f"{np.mean(line['difference']):+.2f}", "95 % interval": f"{low:+.2f} to {high:+.2f}"}
        rows.append(row)
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        space = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}. Write there what is to be tried; see examples/lab/search.py.") from None
    if not isinstance(space, dict) or set(space) != KEYS:
        raise UserError(f"{path}: it must have {', '.join(sorted(KEYS))}, and nothing else.")
    confirming, choosing, confirmed = (space[k] for k in ("confirming_seeds", "choosing_seeds", "confirmed"))
    numbers = [choosing, confirmed, *confirming] if isinstance(confirming, list) else [None]
    if not all(isinstance(number, int) for number in numbers):
        raise UserError(f"{path}: choosing_seeds and confirmed must be integers, confirming_seeds a list of them.")
    if len(set(confirming)) < max(2, len(confirming)) or choosing < 1 or confirmed < 1:
        raise UserError(f"{path}: at least one seed is needed to choose, and two different ones to confirm one recipe.")
    return space
