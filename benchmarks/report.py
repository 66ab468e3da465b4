"""Draws the tables of all benchmarks, which fill the README, and their plots, from the JSON alone.

python -m benchmarks.report
"""

import importlib
import pkgutil
from pathlib import Path

from benchmarks.harness.records import RESULTS, read
from examples.readme import fill

README = Path(__file__).parent / "README.md"


def names() -> list[str]:
    """The benchmarks: all modules of this folder but this one."""
    found = pkgutil.iter_modules([str(README.parent)])
    return [module.name for module in found if not module.ispkg and module.name != "report"]


def section(name: str) -> str:
    """The question, the table, the plot and how they were made."""
    records = read(name)
    if not records:
        return f"### {name}\n\nNot run: `python -m benchmarks.{name}`."
    module, one = importlib.import_module(f"benchmarks.{name}"), records[0]
    versions = ", ".join(f"{package} {number}" for package, number in one["versions"].items())
    question, mark, rest = (module.__doc__ or "").splitlines()[0].partition("?")
    module.figure(records, RESULTS / f"{name}.png")
    parts = [f"### {question}{mark}", rest.strip(), module.markdown(records), f"![{name}](results/{name}.png)"]
    return "\n\n".join([*parts, f"`{one['command']}` on {one['hardware']}; {versions}."])


if __name__ == "__main__":
    fill(README, "\n\n".join(map(section, names())))
