"""The table and the figure, drawn from the JSON alone. As a command: those of the committed results."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from rich.box import SIMPLE_HEAD
from rich.table import Table

from examples.readme import fill

matplotlib.use("Agg")

COLOURS = {"SGD": "#666666", "ABSGD λ": "#0072B2", "ABSGD KL radius": "#D55E00"}  # told apart by colour-blind eyes too


HEADER = ("method", "rate", "λ or ρ", "accuracy", "head", "tail", "gain over SGD")


def rows(setting: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row for each method, under ``HEADER``."""

    def row(name, m):
        gain = f"{m['gain'][0]:+.1f} ± {m['gain'][1]:.1f}" if m["gain"] else ""
        accuracy = f"{m['accuracy'][0]:.1f} ± {m['accuracy'][1]:.1f}"
        means = (f"{m['head'][0]:.1f}", f"{m['tail'][0]:.1f}")
        return name, f"{m['learning_rate']:g}", str(m["value"]), accuracy, *means, gain

    return [row(*item) for item in setting["methods"].items()]


def tables(result: dict[str, Any]) -> Iterator[Table]:
    """A table for each setting, narrow enough for a terminal of 80 columns."""
    for setting in result["settings"].values():
        shown = Table(title=setting["title"], title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        for i, column in enumerate(HEADER):
            shown.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows(setting):
            shown.add_row(*row)
        yield shown


def markdown(result: dict[str, Any]) -> str:
    """One table of all settings, for a README."""
    lines = ["setting | " + " | ".join(HEADER), " | ".join("---" for _ in range(len(HEADER) + 1))]
    for setting in result["settings"].values():
        for i, row in enumerate(rows(setting)):
            lines.append(" | ".join((setting["title"] if i == 0 else "", *row)))
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    lines = [f"| {line} |" for line in lines]
    return "\n".join([*lines, "", f"{result['seconds']:.0f} s on {result['hardware']}; {versions}."])


def figure(result: dict[str, Any], path: Path) -> None:
    """One column a setting: accuracy while training, accuracy by class, weight of the watched examples."""
    settings = list(result["settings"].values())
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(3, len(settings), figsize=(3.5 * len(settings), 7.4), layout="constrained", squeeze=False)
    for (top, middle, bottom), setting in zip(axes.T, settings, strict=True):
        first, records = setting["first_passes"], setting["passes"] * setting["records_per_pass"]
        passes = [*range(1, first + 1), *(first + (i + 1) / setting["records_per_pass"] for i in range(records))]
        width = 0.8 / len(setting["methods"])
        for i, (name, m) in enumerate(setting["methods"].items()):
            colour, style = COLOURS[name], {"lw": 2, "ls": "--" if name == "SGD" else "-"}
            label = f"{name}  {m['accuracy'][0]:.1f} ± {m['accuracy'][1]:.1f} %"
            top.plot(passes, m["accuracy_by_record"], color=colour, label=label, zorder=3 - i, **style)
            places = [c + (i + 0.5) * width - 0.4 for c in range(len(m["per_class"]))]
            middle.bar(places, m["per_class"], width, color=colour)
            bottom.plot(passes, m["weight_by_record"], color=colour, zorder=3 - i, **style)
        for axis in (top, bottom):
            if first:
                axis.axvline(first + 0.5, color="black", lw=0.8, ls=":")
            axis.set_xlabel("part of the stream" if setting["records_per_pass"] > 1 else "passes over the data")
            axis.set_xlim(0 if setting["records_per_pass"] > 1 else 1, passes[-1])
        top.set_title(setting["title"], fontweight="bold", fontsize=10, loc="left")
        top.set_ylim(0, 100)
        top.legend(facecolor="white", edgecolor="none", framealpha=1, loc="lower right", handlelength=1.6, fontsize=8)
        middle.set_xlabel("class, from frequent to rare" if setting["watched"] == "rare classes" else "class")
        middle.set_xticks(range(len(m["per_class"])))
        middle.set_ylim(0, 100)
        bottom.set_yscale("log")
        bottom.axhline(1, color="black", lw=0.8, ls=":")
        bottom.set_title(f"{setting['watched']}: weight relative to the rest", fontsize=9, loc="left")
    axes[0, 0].set_ylabel("test accuracy in %")
    axes[1, 0].set_ylabel("test accuracy in %")
    axes[2, 0].set_ylabel("relative weight")
    fig.savefig(path, dpi=100)
    plt.close(fig)


if __name__ == "__main__":
    here = Path(__file__).parent
    committed = json.loads((here / "results" / "digits.json").read_text())
    figure(committed, here / "results" / "digits.png")
    fill(here / "README.md", markdown(committed))
