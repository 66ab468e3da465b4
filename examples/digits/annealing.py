"""How precisely λ < 0 has to be chosen: fixed, and annealed from -4 in the first third of training.

python -m examples.digits.annealing

Writes annealing.json and annealing.png into results/ beside this file, in about two minutes on two CPU cores. The
learning rate of every λ is chosen on the noisy validation split, as in the demo.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich.progress import Progress

from examples import style
from examples.digits import experiment
from examples.digits.experiment import Method, Setting, noisy_labels, noisy_long_tail

LAST = (-4.0, -2.8, -2.0, -1.4, -1.0, -0.7, -0.5, -0.35)  # λ, or what it goes to
SEEDS = range(10)
RESULTS = Path(__file__).parent / "results"


def for_every(setting: Setting, baseline: str, fixed: Any, annealed: Any) -> Setting:
    """A setting of the demo with a method for every λ."""
    base, balanced = setting.methods[baseline], setting.methods[baseline].balanced
    ways = {"fixed": fixed, "annealed": annealed}
    methods = {f"{way} {lam:g}": Method(rule, (lam,), balanced) for way, rule in ways.items() for lam in LAST}
    return dataclasses.replace(setting, methods={"SGD": base, **methods})


SETTINGS = (
    *(for_every(noisy_labels(rate), "SGD", experiment.absgd, experiment.absgd_annealed) for rate in (0.2, 0.4, 0.6)),
    for_every(noisy_long_tail(0.3), "Balanced softmax", experiment.absgd_within, experiment.absgd_within_annealed),
)


def main(out: Path = RESULTS, settings=SETTINGS, seeds=SEEDS) -> None:
    """Runs every setting, and writes and draws what it gave."""
    with Progress(transient=True) as progress:
        result = experiment.run_all(settings, seeds, progress, "python -m examples.digits.annealing")
    (out / "annealing.json").write_text(json.dumps(result, indent=1) + "\n")
    style.save(figure(result), out / "annealing.png")


def figure(result: dict[str, Any]) -> Figure:
    """Accuracy over λ, a panel for every setting."""
    fig, axes = plt.subplots(1, len(result["settings"]), figsize=(10.5, 2.9), layout="constrained", squeeze=False)
    for axis, setting in zip(axes[0], result["settings"], strict=True):
        noise = f"{setting['noise']:.0%}".replace("%", " %")
        methods, on = (
            setting["methods"],
            "balanced softmax, within classes" if setting["imbalanced"] else "cross entropy",
        )
        axis.set_title(f"{noise} wrong{', long tail' * setting['imbalanced']}\n{on}", loc="left", fontsize=9)
        base = methods["SGD"]["accuracy"][0]
        axis.axhline(base, color=style.SGD, ls="--", label="λ = ∞")
        for way, colour in (("fixed", style.BOUNDED), ("annealed", style.ABSGD)):
            points = [(float(name.split()[1]), m["accuracy"]) for name, m in methods.items() if name.startswith(way)]
            lam, (mean, std) = [abs(lam) for lam, _ in points], zip(*(accuracy for _, accuracy in points), strict=True)
            axis.errorbar(lam, mean, std, fmt="o-", ms=3, lw=1.5, color=colour, label=f"λ {way}")
        axis.set_xscale("log")
        axis.invert_xaxis()
        axis.set_xticks([abs(lam) for lam in LAST], [f"{lam:g}" for lam in LAST], rotation=60)
        axis.minorticks_off()
        axis.set_ylim(base - 12, 100)
        axis.set_xlabel("λ in the end")
    axes[0, 0].set_ylabel("test accuracy in %")
    axes[0, 0].legend(loc="lower left")
    return fig


if __name__ == "__main__":
    main()
