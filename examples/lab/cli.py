"""The commands of an experiment: ``python -m examples.<experiment> train | sweep | search | profile | report``."""

import argparse
import dataclasses
import inspect
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console

from examples.lab import files, plan, processes, profile, records, report, search, trainer
from examples.lab.errors import UsageError, UserError, exit_code
from examples.lab.experiment import Experiment, rivals, tuned, with_seeds
from examples.lab.recipe import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where the data are."""

    data_dir: Path = Path("data")
    """Folder that holds the data in their official layout, or is to hold them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine(Source):
    """Where and how to train; nothing here changes a result."""

    out: Path | None = None
    """Folder of the results. By default results/ of the experiment for a sweep, runs/ for a single run."""
    work: Path = Path("runs")
    """Folder of the checkpoints; it can be deleted when all is done."""
    devices: int = 1
    """Devices over which each batch is spread."""
    distributed: bool = False
    """Join the processes of a SLURM job or a TPU slice, and spread each batch over all their devices."""
    together: int | None = None
    """The most runs that one program trains; by default 1 on a CPU, else 64."""
    max_minutes: float = float("inf")
    """Stop after an epoch when this time is over; the same command goes on."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Which rows, and how often."""

    preset: str
    """The network, the schedule and the size of the data."""
    tables: tuple[str, ...] = ()
    """Tables, by default all that the dataset has."""
    datasets: tuple[str, ...] = ()
    """Datasets, by default that of the preset."""
    methods: tuple[str, ...] = ()
    """Only these methods, by their names in the records."""
    losses: tuple[str, ...] = ()
    """Only these losses."""
    seeds: int = 3
    """Number of seeds."""


def train(experiment: Experiment, arguments: Sequence[str]) -> None:
    """Trains one model; the same command continues a run that was stopped."""
    recipe, machine = _one_run(experiment, "train", arguments, Machine())
    deadline = time.monotonic() + 60 * machine.max_minutes
    (path,) = _train(experiment, [recipe], machine, machine.out or machine.work / "results", deadline)
    _check_finite([path])
    _console().print(f"{path.stem}: {records.summary(path)}; see {path}")


def run_profile(experiment: Experiment, arguments: Sequence[str]) -> None:
    """Measures where the time of a training step goes: batch, losses, gradient, update."""
    recipe, source = _one_run(experiment, "profile", arguments, Source())
    Console().print(profile.profile(experiment.make_run(recipe), source.data_dir), soft_wrap=True)


def _one_run(experiment: Experiment, command: str, arguments: Sequence[str], others: Any) -> tuple:
    """What the options of one run say; the defaults are those of its preset."""
    presets = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    presets.add_argument("--preset", default=next(iter(experiment.presets)))
    preset = presets.parse_known_args(arguments)[0].preset
    return _ask(experiment, command, arguments, experiment.base(preset), others)


def _ask(experiment: Experiment, command: str, arguments: Sequence[str], *defaults: Any) -> tuple:
    """The options of a command; those not given are the defaults."""
    names = (command, *(type(default).__name__.lower() for default in defaults[1:]))
    options = tuple(Annotated[type(d), tyro.conf.arg(name=name)] for d, name in zip(defaults, names, strict=True))
    return tyro.cli(
        tyro.conf.OmitArgPrefixes[tuple[options]],
        default=defaults,
        args=list(arguments),
        prog=f"python -m examples.{experiment.name} {command}",
        description=inspect.getdoc(COMMANDS[command]),
    )


def sweep(experiment: Experiment, arguments: Sequence[str]) -> None:
    """Trains all rows of some tables; what is done is not done twice.

    Of rows that differ in a strength alone, each is trained once on a part of the training set; the one that is best on
    the rest is trained on all of it with every seed.
    """
    chosen, machine = _ask(experiment, "sweep", arguments, Sweep(next(iter(experiment.presets))), Machine())
    if chosen.seeds < 1:
        raise UsageError(f"--seeds {chosen.seeds}: at least 1 is needed.")
    rows = [r for d in chosen.datasets or (None,) for r in experiment.recipes(chosen.preset, d, chosen.tables)]
    for name, kept, of in (("methods", chosen.methods, lambda r: r.title), ("losses", chosen.losses, lambda r: r.loss)):
        known = {of(row) for row in rows}
        if unknown := set(kept) - known:
            raise UsageError(f"--{name} {' '.join(sorted(unknown))}: choose from {', '.join(sorted(known))}.")
        rows = [row for row in rows if not kept or of(row) in kept]
    families = rivals(rows)
    choosing = [tuned(row) for family in families if len(family) > 1 for row in family]
    choosing += [run for row in rows if row.validation for run in with_seeds(row, chosen.seeds)]
    results, deadline = machine.out or experiment.folder / "results", time.monotonic() + 60 * machine.max_minutes
    paths = _train(experiment, choosing, machine, results, deadline)

    def validated(row):
        return records.read(experiment.path(tuned(row), results))["validation_accuracy"]

    best = [max(family, key=validated) if len(family) > 1 else family[0] for family in families]
    paths += _train(experiment, [r for row in best for r in with_seeds(row, chosen.seeds)], machine, results, deadline)
    _check_finite(paths)
    _console().print(f"{len(paths)} runs. See: python -m examples.{experiment.name} report {paths[0].parents[1]}")


@dataclasses.dataclass(frozen=True)
class Search:
    """What is searched."""

    folder: tyro.conf.Positional[Path] = tyro.MISSING
    """The folder of space.json and of the results."""


def run_search(experiment: Experiment, arguments: Sequence[str]) -> None:
    """Trains what the space.json of a folder registers, chooses by validation and confirms with fresh seeds."""
    chosen, machine = _ask(experiment, "search", arguments, Search(), Machine())
    if machine.out is not None:
        raise UsageError(f"--out {machine.out}: the results of a search are in its folder, {chosen.folder}.")
    deadline = time.monotonic() + 60 * machine.max_minutes

    def train_all(recipes):
        return _train(experiment, recipes, machine, chosen.folder, deadline)

    _console().print(search.search(experiment, chosen.folder, train_all), soft_wrap=True)


def _train(
    experiment: Experiment, recipes: Sequence[Recipe], machine: Machine, results: Path, deadline: float
) -> list[Path]:
    """Trains what has no record yet, and writes records as runs finish."""
    devices = _devices(recipes, machine)
    if machine.together is not None and machine.together < 1:
        raise UsageError(f"--together {machine.together}: at least 1 is needed.")
    console = _console()
    paths = {recipe: experiment.path(recipe, results) for recipe in recipes}
    for path, times in Counter(paths.values()).items():
        if times > 1:
            differ = f"{path} would be of {times} runs that differ in what is no part of its name"
            raise UserError(f"{differ}. Ask for them one by one, each with another folder of results.")
    runs = {recipe: experiment.make_run(recipe) for recipe in recipes}
    missing = {recipe: run for recipe, run in runs.items() if not records.is_done(paths[recipe], recipe, run)}
    for preset, *place in dict.fromkeys(map(_where, missing)):
        todo = {recipe: run for recipe, run in missing.items() if _where(recipe) == (preset, *place)}
        every = experiment.evaluate_every[preset]
        together = machine.together or (1 if jax.default_backend() == "cpu" else 64)
        settings = trainer.Settings(machine.data_dir, machine.work, every, together, devices, deadline)

        def finished(run, todo=todo, settings=settings):
            for recipe in (recipe for recipe, its in todo.items() if its == run):
                content = records.record(experiment.name, recipe, run, settings, experiment.command(recipe))
                processes.by_first(lambda p=paths[recipe], c=content: files.write_json(p, c))

        def title(run, todo=todo):
            ends = next((recipe for recipe, its in todo.items() if its == run), None)
            if ends is not None:
                return _title(experiment, ends)
            first, *others = (recipe for recipe, its in todo.items() if run in plan.prefixes(its))
            return f"first stage of {_title(experiment, first)}{f' and of {len(others)} more' if others else ''}"

        trainer.train(list(dict.fromkeys(todo.values())), settings, console, finished, title)
    return list(paths.values())


def _title(experiment: Experiment, recipe: Recipe) -> str:
    return f"{recipe.dataset}, {search.label(experiment, recipe)}, seed {recipe.seed}"


def _console() -> Console:
    """The first process speaks for all."""
    return Console(quiet=not processes.is_first())


def _devices(recipes: Sequence[Recipe], machine: Machine) -> int:
    """The number of devices of a run; of several processes all that they have."""
    if machine.distributed:
        if machine.devices != 1:
            raise UsageError(f"--devices {machine.devices}: --distributed takes all devices that there are.")
        processes.join()
    count = jax.device_count() if machine.distributed else machine.devices
    if not 1 <= count <= jax.device_count():
        raise UsageError(f"--devices {count}: choose from 1 to {jax.device_count()}, those of this machine.")
    for size in (recipe.batch_size for recipe in recipes):
        if size % count:
            raise UsageError(f"--batch-size {size}: it must be a multiple of the {count} devices.")
    return count


def _check_finite(paths: Sequence[Path]) -> None:
    if broken := [str(path) for path in paths if records.read(path)["diverged"]]:
        raise UserError(f"The loss was not finite in {', '.join(broken)}: lower the rate, or bound the weights.")


def _where(recipe: Recipe) -> tuple:
    return recipe.preset, recipe.dataset, recipe.validation


@dataclasses.dataclass(frozen=True)
class Report:
    """Which results."""

    folders: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders of results, each of a preset. By default all of the experiment, which also fills its README."""


def write_report(experiment: Experiment, arguments: Sequence[str]) -> None:
    """Draws tables and figures of results."""
    (chosen,) = _ask(experiment, "report", arguments, Report())
    report.report(experiment, chosen.folders or sorted((experiment.folder / "results").glob("*")))


COMMANDS = {"train": train, "sweep": sweep, "search": run_search, "profile": run_profile, "report": write_report}


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code."""
    command, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command not in COMMANDS:
        usage = [f"usage: python -m examples.{experiment.name} COMMAND [--help]", ""]
        usage += [f"  {name:8} {str(f.__doc__).splitlines()[0]}" for name, f in COMMANDS.items()]
        print("\n".join(usage), file=sys.stderr)
        return 0 if command in ("-h", "--help") else 2
    return exit_code(lambda: COMMANDS[command](experiment, rest))
