"""What makes a folder of examples/ an experiment, and which runs its tables ask for."""

import dataclasses
import itertools
import json
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from examples.lab.config import Run
from examples.lab.errors import UsageError
from examples.lab.recipe import Recipe

TUNING_SEED, TUNING_VALIDATION = 1000, 0.1
TRAINING = ("epochs", "rate", "weight_decay", "batch_size")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The tables of a paper, or a question of our own."""

    folder: Path  # with paper.json, README.md and results/
    presets: Mapping[str, Recipe]  # the defaults of each
    tables: Callable[[Any], Mapping[str, list[dict[str, Any]]]]  # of a preset's recipe: lists of changes to it
    make_run: Callable[[Any], Run]  # of a recipe of its own type
    evaluate_every: Mapping[str, int]  # epochs, for each preset

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def paper(self) -> dict[str, Any]:
        """Published numbers: dataset -> "method/loss" -> {"top1": …}."""
        path = self.folder / "paper.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def base(self, preset: str, dataset: str | None = None) -> Recipe:
        """The defaults of a preset, on another dataset if one is named."""
        if preset not in self.presets:
            raise UsageError(f"--preset {preset}: choose from {', '.join(self.presets)}.")
        default = self.presets[preset]
        return default if dataset is None else dataclasses.replace(default, dataset=dataset)

    def recipes(self, preset: str, dataset: str | None = None, tables: Collection[str] = ()) -> list[Recipe]:
        """The rows of some tables of a dataset, each once; by default of all its tables, and the preset's dataset."""
        base = self.base(preset, dataset)
        known = self.tables(base)
        for table in tables:
            if table not in known:
                raise UsageError(f"--tables {table}: {base.dataset} has {', '.join(known)}.")
        rows = itertools.chain.from_iterable(known[table] for table in tables or known)
        return list(dict.fromkeys(dataclasses.replace(base, **changes) for changes in rows))

    def changed(self, recipe: Recipe) -> dict[str, float]:
        """What of TRAINING differs from the preset."""
        preset = self.presets[recipe.preset]
        return {name: getattr(recipe, name) for name in TRAINING if getattr(recipe, name) != getattr(preset, name)}

    def name_of(self, recipe: Recipe) -> str:
        """The recipe without its seed, for files."""
        changes = "".join(f"-{name.replace('_', '-')}{value:g}" for name, value in self.changed(recipe).items())
        return f"{recipe.title}-{recipe.loss}{recipe.strength}{changes}"

    def path(self, recipe: Recipe, results: Path) -> Path:
        return results / recipe.preset / recipe.dataset / f"{self.name_of(recipe)}-s{recipe.seed}.json"

    def command(self, recipe: Recipe) -> str:
        """The command that gives one run alone."""
        default = dataclasses.asdict(self.presets[recipe.preset])
        changed = {k: v for k, v in dataclasses.asdict(recipe).items() if v != default[k] and k != "preset"}
        words = [f"python -m examples.{self.name} train --preset", recipe.preset]
        for name, value in changed.items():
            option = name.replace("_", "-")
            words.append(f"--{'no-' * (value is False)}{option}")
            if not isinstance(value, bool):
                words.append(shlex.quote(str(value)))
        return " ".join(words)


def absgd(temperatures: Iterable[float], **changes: Any) -> list[dict[str, Any]]:
    """The method's rows of a table, one for each λ."""
    return [{"method": "absgd", "temperature": t, **changes} for t in temperatures]


def wrong_labels(right: float) -> list[dict[str, Any]]:
    """Methods for a part of right labels: those that are told it, and those that are tuned."""
    weighted = [{"method": "absgd"}, {"method": "within-class", "gamma": 0.1}]
    annealed = ({**method, "temperature": t, "anneal_from": -4.0} for method in weighted for t in (-0.7, -1.4, -2.0))
    at_once = [
        *annealed,
        {"method": "forward", "fraction": right},
        {"method": "trust", "fraction": right},
        *({"method": "gce", "parameter": q} for q in (0.3, 0.5, 0.7)),
        *({"method": "sce", "parameter": alpha} for alpha in (0.1, 0.3, 1.0)),
        *({"method": "smoothing", "parameter": part} for part in (0.1, 0.3, 0.5)),
        *({"method": "small-loss", "fraction": right, "parameter": steps} for steps in (200.0, 600.0, 1200.0)),
        *({"method": "elr", "parameter": strength} for strength in (1.0, 3.0, 7.0)),
    ]
    # A fixed λ < 0 only once the network knows the classes: from the beginning it gives up whole classes.
    later = [method | {"temperature": t} for method in (*weighted, {"method": "term"}) for t in (-1.0, -2.0, -5.0)]
    return [{}, *({"begin": 0.0, **row} for row in at_once), *({"begin": 0.25, **row} for row in later)]


def rivals(rows: Iterable[Recipe]) -> list[list[Recipe]]:
    """The rows that differ in nothing but a strength, of which validation chooses one."""
    families: dict[tuple[str, ...], list[Recipe]] = {}
    for row in rows:
        if not row.validation:
            families.setdefault((row.dataset, row.title, row.loss), []).append(row)
    return list(families.values())


def tuned(row: Recipe) -> Recipe:
    """The run by which a strength is chosen; its seed is used for nothing else."""
    return dataclasses.replace(row, seed=TUNING_SEED, validation=TUNING_VALIDATION)


def with_seeds(row: Recipe, seeds: int) -> list[Recipe]:
    """A row's runs; those that hold something out have seeds for choosing."""
    first = TUNING_SEED if row.validation else 0
    return [dataclasses.replace(row, seed=first + seed) for seed in range(seeds)]
