"""The tables and the figure, drawn from the JSON alone. As a command: those of the committed results."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from examples import style
from examples.readme import fill

COLOURS = {
    "SGD": style.SGD,
    "ABSGD, λ tuned": style.ABSGD,
    "ABSGD, ρ tuned": style.BOUNDED,
    "ABSGD, fraction known": style.BOUNDED,
    "Balanced softmax": style.RIVALS[3],
    "Generalised CE": style.RIVALS[0],
    "ABSGD within classes": style.BOUNDED,
    "ABSGD, λ annealed": style.RIVALS[1],
    "… λ annealed": style.ABSGD,
}


def _pm(mean_std, sign=""):
    return f"{mean_std[0]:{sign}.1f} ± {mean_std[1]:.1f}"


def tables(result: dict[str, Any]) -> Iterator[list[tuple[str, ...]]]:
    """The tables of the stream, of wrong labels at each rate, and of both; the header comes first."""
    stream, *noisy, both = result["settings"]
    yield _table("Stream", "λ or ρ", stream)
    rows = [("Wrong labels", *(f"{s['noise']:.0%}".replace("%", " %") for s in noisy))]
    yield rows + [(name, *(_pm(s["methods"][name]["accuracy"]) for s in noisy)) for name in noisy[0]["methods"]]
    yield _table("Noisy long tail", "λ or q", both)


def _table(title, value, setting):
    rows = [(title, "rate", value, "accuracy", "worst class", "gain")]
    for name, m in setting["methods"].items():
        gain = _pm(m["gain"], "+") if m["gain"] else ""
        rows.append((name, f"{m['learning_rate']:g}", str(m["value"]), _pm(m["accuracy"]), _pm(m["worst_class"]), gain))
    return rows


def terminal(rows: list[tuple[str, ...]]) -> Table:
    """A table narrow enough for a terminal of 80 columns."""
    shown = Table(box=SIMPLE_HEAD)
    for i, column in enumerate(rows[0]):
        shown.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows[1:]:
        shown.add_row(*row)
    return shown


def markdown(result: dict[str, Any]) -> str:
    """The tables for a README."""
    parts = [
        pd.DataFrame(rows, columns=pd.Index(header)).to_markdown(index=False, disable_numparse=True)
        for header, *rows in tables(result)
    ]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return "\n\n".join([*parts, f"{result['seconds']:.0f} s on {result['hardware']}; {versions}."])


def figure(result: dict[str, Any]) -> Figure:
    """Accuracy, accuracy by class and weight: of the stream, of 40 % wrong labels, and of a long tail with them."""
    stream, *noisy, both = result["settings"]
    fig, axes = plt.subplots(3, 3, figsize=(10.5, 7.4), layout="constrained")
    _while_training(axes[:, 0], stream, "rare classes")
    _while_training(axes[:, 1], next(s for s in noisy if s["noise"] == 0.4), "wrong labels")
    _while_training(axes[:, 2], both, "wrong labels")
    for axis in axes[1]:
        axis.set_ylim(0, 100)
    for axis in axes[2]:
        axis.set_yscale("log")
    for axis, label in zip(axes[:, 0], ("test accuracy in %", "test accuracy in %", "relative weight"), strict=True):
        axis.set_ylabel(label)
    return fig


def _style(name):
    return {"color": COLOURS[name], "lw": 2, "ls": "--" if name == "SGD" else "-"}


def _while_training(axes, setting, watched):
    top, middle, bottom = axes
    drawn = [name for name in COLOURS if not (setting["imbalanced"] and name.startswith("ABSGD, "))]
    methods = {name: m for name, m in setting["methods"].items() if name in drawn}
    records = setting["passes"] * setting["records_per_pass"]
    passes = [(i + 1) / setting["records_per_pass"] for i in range(records)]
    width = 0.8 / len(methods)
    for i, (name, m) in enumerate(methods.items()):
        top.plot(passes, m["accuracy_by_record"], label=f"{name}  {_pm(m['accuracy'])}", **_style(name))
        places = [c + (i + 0.5) * width - 0.4 for c in range(len(m["per_class"]))]
        middle.bar(places, m["per_class"], width, color=COLOURS[name])
        bottom.plot(passes, m["weight_by_record"], **_style(name))
    for axis in (top, bottom):
        axis.set_xlabel("part of the stream" if setting["noise"] is None else "passes over the data")
    top.set_title(setting["title"], fontweight="bold", fontsize=10, loc="left")
    top.set_ylim(top=100)
    top.legend(loc="lower right", handlelength=1.6, fontsize=8)
    ordered = setting["noise"] is None or setting["imbalanced"]
    middle.set_xlabel("class, from frequent to rare" if ordered else "class")
    middle.set_xticks(range(len(m["per_class"])))
    bottom.set_title(f"{watched}: weight relative to the rest", fontsize=9, loc="left")


if __name__ == "__main__":
    here = Path(__file__).parent
    committed = json.loads((here / "results" / "digits.json").read_text())
    style.save(figure(committed), here / "results" / "digits.png")
    fill(here / "README.md", markdown(committed))
