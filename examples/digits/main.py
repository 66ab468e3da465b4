"""SGD against ABSGD on digits: a long-tailed stream, and wrong labels at several rates.

python -m examples.digits.main

Writes digits.json and digits.png. About two minutes on two CPU cores.
"""

import dataclasses
import json
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples import style
from examples.digits import report
from examples.digits.experiment import SETTINGS, run_all


@dataclasses.dataclass(frozen=True)
class Options:
    """SGD against ABSGD on scikit-learn's digits."""

    out: Path = Path("results")
    """Folder for digits.json and digits.png."""
    seeds: int = 10
    """Number of seeds, trained together."""

    def __post_init__(self):
        if self.seeds < 1:
            raise ValueError(f"--seeds {self.seeds}: at least 1 is needed.")


def main(options: Options, settings=SETTINGS) -> None:
    """Runs the settings one after another and writes what they gave."""
    options.out.mkdir(parents=True, exist_ok=True)
    console, seeds = Console(), range(options.seeds)
    columns = (TextColumn("{task.description:<31}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        result = run_all(settings, seeds, progress, f"python -m examples.digits.main --seeds {options.seeds}")
    (options.out / "digits.json").write_text(json.dumps(result, indent=1) + "\n")
    style.save(report.figure(result), options.out / "digits.png")
    for rows in report.tables(result):
        console.print(report.terminal(rows))
    console.print(f"Test accuracy in %, balanced, last pass, mean ± std over {options.seeds} seeds; gain seed by seed.")
    console.print(f"{result['seconds']} s. Wrote {options.out / 'digits.json'} and {options.out / 'digits.png'}.")


if __name__ == "__main__":
    main(tyro.cli(Options))
