"""What makes a folder of examples/ an experiment."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.lab.config import Run
from examples.lab.errors import UsageError
from examples.lab.recipe import Recipe

TUNING_SEED, TUNING_VALIDATION = 1000, 0.1


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The tables of a paper, or a question of our own."""

    folder: Path  # with paper.json, README.md and results/
    presets: Mapping[str, Recipe]  # the defaults of each
    tables: dict[str, list[dict[str, Any]]]  # a table is a list of changes to a preset
    make_run: Callable[[Any], Run]  # of a recipe of its own type
    evaluate_every: dict[str, int]  # epochs, for each preset
    tables_of: Callable[[str], Sequence[str]]  # the tables that belong to a dataset

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def paper(self) -> dict[str, Any]:
        """Published numbers: dataset -> "method/loss" -> {"accuracy": …}."""
        path = self.folder / "paper.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def recipes(self, preset: str, table: str, dataset: str, seeds: Sequence[int]) -> Iterator[Recipe]:
        """The runs of a table on a dataset, and those by which strengths are chosen, which have seeds of their own."""
        for changes in self.tables[table]:
            base = dataclasses.replace(self.presets[preset], dataset=dataset, **changes)
            for seed in seeds:
                yield dataclasses.replace(base, seed=seed + TUNING_SEED if base.validation else seed)
            if base.strength and not base.validation:
                yield dataclasses.replace(base, seed=TUNING_SEED, validation=TUNING_VALIDATION)

    def path(self, recipe: Recipe, results: Path) -> Path:
        return results / recipe.preset / recipe.dataset / f"{recipe.name}.json"

    def command(self, recipe: Recipe) -> str:
        """The command that gives one run alone."""
        default = dataclasses.asdict(self.presets[recipe.preset])
        changed = {k: v for k, v in dataclasses.asdict(recipe).items() if v != default[k] and k != "preset"}
        flags = [f"--{k.replace('_', '-')}" + (f" {v}" if v is not True else "") for k, v in changed.items()]
        return " ".join([f"python -m examples.{self.name} train --preset", recipe.preset, *flags])

    def check(self, preset: str, tables: Sequence[str]) -> None:
        for given, known in [(preset, self.presets), *((table, self.tables) for table in tables)]:
            if given not in known:
                raise UsageError(f"{given!r}: choose from {', '.join(known)}.")
