"""A table of the paper, cell by cell: every method, several seeds, one command.

python -m examples.cifar_lt.sweep --table 1 --columns cifar10-lt-100 --seeds 3 --data-dir data
python -m examples.cifar_lt.report examples/cifar_lt/results/mini

It can be stopped and started again; what is done is not done twice. Results: one JSON a cell.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import tyro
from rich.console import Console

from examples.cifar_lt import checkpoint, pack, plan, profile
from examples.cifar_lt.cells import TABLES, cells
from examples.cifar_lt.config import Config, Preset
from examples.cifar_lt.configs import CONFIGS
from examples.cifar_lt.errors import UsageError, exit_code
from examples.cifar_lt.programs import kind
from examples.cifar_lt.run import run
from examples.cifar_lt.subsets import identity, packed_file, prepare


@dataclasses.dataclass(frozen=True)
class Options:
    """Trains all methods of a table."""

    table: tuple[Literal["1", "2", "noise", "pair"], ...] = ("1", "2")
    """1: ABSGD and META on the losses of the paper. 2: all else. noise: wrong labels. pair: with and without λ."""
    columns: tuple[str, ...] = ("cifar10-lt-100",)
    """Dataset (cifar10, cifar100), long tail or step (lt, st), imbalance ratio; also, say, cifar10-lt-1-sym0.4."""
    preset: Preset = "mini"
    """The network, the size of the training set and the schedule: see configs/."""
    methods: tuple[str, ...] = ()
    """Only these methods, by their names in the table, such as sgd absgd."""
    seeds: int = 3
    """Number of seeds."""
    out: Path = Path(__file__).parent / "results"
    """Folder of the results; a subfolder is made for the preset, and in it one for each column."""
    work: Path = Path("runs")
    """Folder of the checkpoints; it can be deleted when all is done."""
    data_dir: Path = Path("data")
    """Folder that holds the unpacked official archives, or is to hold them."""
    packed: Path | None = None
    """Folder of packed images, in place of the archives."""
    pack: Path | None = None
    """Only pack the images of the columns into this folder, to carry them to a machine without a network."""
    profile: bool = False
    """Only train the first runs for some epochs: what they cost, and how near that is to the device's limits."""
    runs_together: int = 1 if jax.default_backend() == "cpu" else 64
    """Runs that are trained in one program at most."""
    max_minutes: float = float("inf")
    """Stop after an epoch when this time is over; the same command goes on."""


def choose(options: Options) -> dict[Config, Path]:
    """The runs, and where the result of each goes."""
    base = dataclasses.replace(CONFIGS[options.preset], data_dir=options.data_dir, packed=options.packed)
    if options.seeds < 1:
        raise UsageError(f"--seeds {options.seeds}: at least 1 is needed.")
    runs = {}
    for column in options.columns:
        for table in options.table:
            for config in cells(base, table, column, range(options.seeds)):
                runs[config] = options.out / options.preset / column / f"{config.name}.json"
    known = {config.method for config in runs}
    for method in options.methods:
        if method not in known:
            raise UsageError(f"--methods {method}: tables {' '.join(TABLES)} have {', '.join(sorted(known))}.")
    return {config: path for config, path in runs.items() if not options.methods or config.method in options.methods}


def write_packs(runs: Sequence[Config], folder: Path, console: Console) -> None:
    """The images of all runs, each set once."""
    for config in {str(identity(config)): config for config in runs}.values():
        path = packed_file(config, folder)
        pack.write(path, prepare(dataclasses.replace(config, packed=None))._asdict(), identity(config))
        console.print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def show_profile(measured: dict[str, Any], folder: Path, console: Console) -> None:
    """Writes profile.json and prints it."""
    checkpoint.write_json(folder / "profile.json", measured)
    for name, value in measured.items():
        console.print(f"{name.replace('_', ' '):<34} {f'{value:.4g}' if isinstance(value, float) else value}")


def command(config: Config) -> str:
    """The command that gives one run alone."""
    default = CONFIGS[config.preset].identity()
    changed = {k: v for k, v in config.identity().items() if v != default[k] and k != "preset"}
    flags = [f"--{k.replace('_', '-')}" + (f" {v}" if v is not True else "") for k, v in changed.items()]
    return " ".join(["python -m examples.cifar_lt.main --preset", config.preset, *flags])


def sweep(options: Options) -> None:
    """All runs, or what is to be done in their place."""
    console, runs, folder = Console(), choose(options), options.out / options.preset
    if options.pack is not None:
        write_packs(list(runs), options.pack, console)
    elif options.profile:
        first = plan.together(plan.segments(runs).values(), kind, options.runs_together)[0]
        show_profile(profile.profile([segment.config for segment in first]), folder, console)
    else:
        deadline = time.monotonic() + 60 * options.max_minutes
        run(runs, options.work, command, console, runs_together=options.runs_together, deadline=deadline)
        console.print(f"{len(runs)} cells in {folder}. See: python -m examples.cifar_lt.report {folder}")


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    sys.exit(exit_code(lambda: sweep(chosen)))
