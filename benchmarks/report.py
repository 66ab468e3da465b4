"""Fills the README with the tables of all benchmarks, drawn from their JSON.

python -m benchmarks.report
"""

import importlib
from pathlib import Path

from benchmarks.harness.records import RESULTS, read
from examples.readme import fill

README = Path(__file__).parent / "README.md"
BENCHMARKS = {
    "step_cost": "Cost of a step",
    "microbatch": "Micro-batches and devices",
    "kl_dro": "Optimising the objective",
    "theorem1": "Theorem 1",
    "safety": "Numerical safety",
    "published_package": "Against the published package",
    "scaling": "Scaling",
}


def section(name: str, title: str) -> str:
    """The question, the table, the plot and how they were made."""
    parts, records = [f"### {title}"], read(name)
    if not records:
        return "\n\n".join([*parts, f"Not run: `python -m benchmarks.{name}`."])
    module, one = importlib.import_module(f"benchmarks.{name}"), records[0]
    versions = ", ".join(f"{package} {number}" for package, number in one["versions"].items())
    parts += [(module.__doc__ or "").splitlines()[0], module.markdown(records)]
    if (RESULTS / f"{name}.png").exists():
        parts.append(f"![{title}](results/{name}.png)")
    return "\n\n".join([*parts, f"`{one['command']}` on {one['hardware']}; {versions}."])


if __name__ == "__main__":
    fill(README, "\n\n".join(section(name, title) for name, title in BENCHMARKS.items()))
