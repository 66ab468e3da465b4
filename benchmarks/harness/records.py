"""What the benchmarks have in common: records in JSON, each with what it depends on."""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from examples import style
from examples.environment import hardware, versions
from examples.lab.errors import UserError

RESULTS = Path(__file__).parents[1] / "results"

Record = dict[str, Any]


def of_platform(name: str) -> str:
    """The name of a benchmark's files; those of an accelerator stand beside those of the CPU."""
    platform = jax.default_backend()
    return name if platform == "cpu" else f"{name}-{platform}"


def write(name: str, records: Sequence[Record], folder: Path | None = None) -> Path:
    """Writes the JSON of a benchmark, a record a line, each with the hardware, the versions and the command."""
    command = f"python -m benchmarks.{name} {shlex.join(sys.argv[1:])}".strip()
    common = {"hardware": hardware(), "versions": versions(), "command": command}
    path = (folder or RESULTS) / f"{of_platform(name)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(record | common, allow_nan=False) for record in records)
    path.write_text(f"[\n{lines}\n]\n")
    return path


def read(name: str, folder: Path | None = None) -> list[Record]:
    """The records of ``name.json``; none if it was not run."""
    path = (folder or RESULTS) / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else []


def publish(
    name: str,
    measure: Callable[[], Sequence[Record]],
    markdown: Callable[[list[Record]], str],
    figure: Callable[[list[Record]], Figure],
) -> None:
    """Measures, writes the JSON and the plot of a benchmark and prints its table, both drawn from the file.

    What was there is replaced when all is drawn; until then the new JSON is in the folder ``unfinished``.
    """
    unfinished, plot = RESULTS / "unfinished", RESULTS / f"{of_platform(name)}.png"
    try:
        path = write(name, measure(), unfinished)
    except (UserError, OSError) as error:
        sys.exit(str(error))
    records = read(of_platform(name), unfinished)
    text = markdown(records)
    style.save(figure(records), plot)
    path = path.replace(RESULTS / path.name)
    print(f"{text}\n\nWrote {path} and {plot}.")


def table(rows: Sequence[dict[str, str]]) -> str:
    """A Markdown table with the keys of the first row as its head."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
