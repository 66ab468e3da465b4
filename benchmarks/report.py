"""Draws the tables of all benchmarks, which fill the README, and their plots, from the JSON alone.

python -m benchmarks.report
"""

import importlib
import pkgutil
from pathlib import Path

from benchmarks.harness.records import RESULTS, read
from examples import style
from examples.readme import fill

README = Path(__file__).parent / "README.md"


def names() -> list[str]:
    """The benchmarks: all modules of this folder but this one."""
    found = pkgutil.iter_modules([str(README.parent)])
    return [module.name for module in found if not module.ispkg and module.name != "report"]


def section(name: str) -> str:
    """The question, and on each platform the table, the plot and how they were made."""
    files = [name, *sorted(path.stem for path in RESULTS.glob(f"{name}-*.json"))]
    found = {file: records for file in files if (records := read(file))}
    if not found:
        return f"### {name}\n\nNot run: `python -m benchmarks.{name}`."
    module = importlib.import_module(f"benchmarks.{name}")
    question, mark, rest = (module.__doc__ or "").splitlines()[0].partition("?")
    parts = [f"### {question}{mark}", rest.strip()]
    for file, records in found.items():
        one = records[0]
        versions = ", ".join(f"{package} {number}" for package, number in one["versions"].items())
        if file != name:
            parts.append(f"#### On {one['hardware']}")
        style.save(module.figure(records), RESULTS / f"{file}.png")
        parts += [module.markdown(records), f"![{file}](results/{file}.png)"]
        parts.append(f"`{one['command']}` on {one['hardware']}; {versions}.")
    return "\n\n".join(parts)


if __name__ == "__main__":
    fill(README, "\n\n".join(map(section, names())))
