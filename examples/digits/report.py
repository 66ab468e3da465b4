"""The table and the figure, drawn from the JSON alone."""

from pathlib import Path
from typing import Any

import matplotlib
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"SGD": "#666666", "ABSGD λ": "#0072B2", "ABSGD KL radius": "#D55E00"}  # told apart by colour-blind eyes too


def table(result: dict[str, Any]) -> Table:
    """Accuracy on the test split, mean ± standard deviation over the seeds, and the gain over SGD seed by seed."""
    shown = Table(title=f"Test accuracy in %, {len(result['seeds'])} seeds, last pass", title_justify="left")
    for column in ("setting", "method", "rate", "λ or ρ"):
        shown.add_column(column)
    for column in ("all classes", "0-4 (head)", "5-9 (tail)", "gain over SGD"):
        shown.add_column(column, justify="right")
    for setting in result["settings"].values():
        for i, (name, m) in enumerate(setting["methods"].items()):
            cells = [setting["title"] if i == 0 else "", name, f"{m['learning_rate']:g}", str(m["value"])]
            cells += [f"{mean:.1f} ± {std:.1f}" for mean, std in (m["accuracy"], m["head"], m["tail"])]
            gain = f"{m['gain'][0]:+.1f} ± {m['gain'][1]:.1f}" if m["gain"] else ""
            shown.add_row(*cells, gain, end_section=i == len(setting["methods"]) - 1)
    return shown


def markdown(result: dict[str, Any]) -> str:
    """The same table for a README."""
    shown = table(result)
    rows = zip(*(list(column.cells) for column in shown.columns), strict=True)
    lines = [" | ".join(str(column.header) for column in shown.columns), " | ".join("---" for _ in shown.columns)]
    return "\n".join(f"| {line} |" for line in [*lines, *(" | ".join(row) for row in rows)])


def figure(result: dict[str, Any], path: Path) -> None:
    """One column a setting: accuracy while training, accuracy by class, weight of the watched examples."""
    settings = list(result["settings"].values())
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(3, len(settings), figsize=(10.5, 7.6), layout="constrained", squeeze=False)
    for (top, middle, bottom), setting in zip(axes.T, settings, strict=True):
        total = setting["first_passes"] + setting["passes"]
        for offset, (name, m) in enumerate(setting["methods"].items()):
            colour, passes = COLOURS[name], range(1, total + 1)
            top.plot(passes, m["accuracy_by_pass"], color=colour, lw=2, label=f"{name}  {m['accuracy'][0]:.1f} %")
            width = 0.8 / len(setting["methods"])
            places = [i + (offset + 0.5) * width - 0.4 for i in range(len(m["per_class"]))]
            middle.bar(places, m["per_class"], width, color=colour)
            bottom.plot(passes, m["weight_by_pass"], color=colour, lw=2)
        for axis in (top, bottom):
            if setting["first_passes"]:
                axis.axvline(setting["first_passes"] + 0.5, color="black", lw=0.8, ls=":")
            axis.set_xlabel("passes over the data")
            axis.set_xlim(1, total)
        top.set_title(setting["title"], fontweight="bold", fontsize=10, loc="left")
        top.legend(frameon=False, loc="lower right", handlelength=1.2)
        low = min(min(m["accuracy_by_pass"][1:]) for m in setting["methods"].values())
        top.set_ylim(max(0, low - 12), 100)
        rarity = "class (frequent to rare)" if setting["watched"] == "rare classes" else "class"
        middle.set_xlabel(rarity)
        middle.set_xticks(range(len(m["per_class"])))
        middle.set_ylim(0, 100)
        bottom.set_yscale("log")
        bottom.axhline(1, color="black", lw=0.8, ls=":")
        bottom.set_title(f"weight of {setting['watched']}, relative to the others", fontsize=9, loc="left")
    axes[0, 0].set_ylabel("test accuracy in %")
    axes[1, 0].set_ylabel("test accuracy in %")
    axes[2, 0].set_ylabel("relative weight")
    fig.savefig(path, dpi=120)
    plt.close(fig)
