"""Which stages runs have in common: equal first stages of one task and seed are trained once."""

import importlib.metadata
import inspect
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import jax

from examples.lab.config import Run, fingerprint

PACKAGES = ("absgd_jax", "jax", "jaxlib", "flax", "optax", "numpy")
SOURCES = Path(__file__).parents[2]
ASKING = (
    "cli",
    "experiment",
    "errors",
    "figures",
    "files",
    "profile",
    "recipe",
    "records",
    "report",
    "schedule",
    "search",
    "__main__",
)


def _checksum(folder: Path) -> str:
    """Of the code in a folder that training runs through, and not of what only asks for it or draws it."""
    files = [path for path in sorted(folder.rglob("*.py")) if path.stem not in ASKING]
    return fingerprint(*(path.read_text(encoding="utf-8") for path in files))


@cache
def program() -> str:
    """A checksum of the code and the versions, without which a stage must not be continued.

    Of all experiments that are trained in stages, because they share networks and data.
    """
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    trained = sorted(path.parent for path in (SOURCES / "examples").glob("*/task.py"))
    return fingerprint(*versions, *map(_checksum, (SOURCES / "absgd_jax", *trained)))


@cache
def key(run: Run) -> str:
    """The name under which the state that a run leaves is kept."""
    return fingerprint(run, program(), _checksum(Path(inspect.getfile(type(run.task))).parent))


def prefixes(run: Run) -> list[Run]:
    """The run and what it begins with, from its first stage to all."""
    return [*prefixes(run.parent), run] if run.parent else [run]


def groups(runs: Iterable[Run], is_done, together: int) -> Iterator[list[Run]]:
    """What has to be trained, in an order in which parents come first; runs of one group share a program.

    Args:
      runs: the runs that are wanted.
      is_done: whether the state that a run leaves is there already.
      together: how many runs may train in one program.
    """
    needed: dict[int, dict[Run, None]] = defaultdict(dict)
    for run in runs:
        for part in reversed(prefixes(run)):
            if is_done(part):
                break
            needed[len(part.stages)][part] = None
    for depth in sorted(needed):
        alike = defaultdict(list)
        for run in needed[depth]:
            alike[run.task, run.epochs, jax.tree.structure(run.stages[-1])].append(run)
        for (task, *_), members in alike.items():
            size = 1 if task.streamed else together
            yield from (members[i : i + size] for i in range(0, len(members), size))


def carries_method(run: Run) -> bool:
    """Whether the last stage goes on with the method, and so with the method's state, of the one before."""
    return len(run.stages) > 1 and run.stages[-1].method == run.stages[-2].method
