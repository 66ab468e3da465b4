"""What ABSGD gains over SGD in all committed experiments: one figure, and the table of the README, which has baselines.

python -m examples.gains

Writes gains.png beside this file, from the records alone. A row is a dataset and a loss. Gains are over SGD with the
same loss and seed, at the strength that validation chose or the only one; lines reach one standard deviation to either
side.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from examples import style
from examples.lab import report
from examples.readme import fill

FORMS = {"absgd": ("o", style.ABSGD), "bounded-absgd": ("s", style.BOUNDED), "trust": ("D", style.RIVALS[1])}
BASELINES = ("gce", "elr")  # columns of the README's table
WIDEST = 6.0  # points; what lies beyond is written at the edge
SETTING = ["experiment", "preset", "dataset", "loss"]
README = {  # the rows of its table
    ("noise", "cifar10-lt-1-sym0.2", "ce"): "20 % symmetric noise",
    ("noise", "cifar10-lt-1-sym0.4", "ce"): "40 % symmetric noise",
    ("noise", "cifar10-lt-1-sym0.6", "ce"): "60 % symmetric noise",
    ("noise", "cifar10-lt-1-worse", "ce"): "CIFAR-10N, 40 % human errors",
    ("noise", "cifar10-lt-1-asym0.4", "ce"): "20 % asymmetric noise",
    ("noise", "cifar10-lt-10-sym0.2", "ce"): "20 % symmetric noise, long tail, 10 : 1",
    ("noise", "cifar10-lt-10-sym0.4", "ce"): "40 % symmetric noise, long tail, 10 : 1",
    ("noise", "cifar10-lt-10-worse", "ce"): "40 % human errors, long tail, 10 : 1",
    ("adult", "adult-sym0.4", "ce"): "Adult, 40 % symmetric noise",
    ("small", "digits-sym0.4", "ce"): "digits, 50 epochs, 40 % symmetric noise",
    ("fast", "cifar10-lt-100", "ce"): "long tail, 100 : 1, cross entropy",
    ("fast", "cifar10-lt-100", "cb-ce"): "… class-balanced cross entropy",
    ("fast", "cifar10-lt-100", "deferred-balanced-softmax"): "… balanced softmax",
    ("fast", "cifar10-lt-100", "ldam"): "… LDAM",
    ("fast", "cifar100-lt-100", "ce"): "CIFAR-100, long tail, 100 : 1, cross entropy",
}
WORDS = {  # of the figure; what is missing is shown as it is called
    "cifar10-lt-100": "CIFAR-10, long tail 100 : 1", "cifar100-lt-100": "CIFAR-100, long tail 100 : 1",
    "cifar10-lt-1": "CIFAR-10, balanced",
    "cifar10-lt-1-sym0.2": "CIFAR-10, 20 % symmetric noise", "cifar10-lt-1-sym0.4": "CIFAR-10, 40 % symmetric noise",
    "cifar10-lt-1-sym0.6": "CIFAR-10, 60 % symmetric noise", "cifar10-lt-10-sym0.2": "CIFAR-10, 10 : 1, 20 % noise",
    "cifar10-lt-10-sym0.4": "CIFAR-10, 10 : 1, 40 % noise", "cifar10-lt-100-sym0.2": "CIFAR-10, 100 : 1, 20 % noise",
    "cifar10-lt-10-worse": "CIFAR-10N, 10 : 1, 40 % human errors",
    "cifar10-lt-1-asym0.4": "CIFAR-10, 20 % asymmetric noise", "cifar10-lt-1-worse": "CIFAR-10N, 40 % human errors",
    "xray64-10": "X-rays 10 : 1", "scenes-10": "scenes 10 : 1", "scenes-100": "scenes 100 : 1",
    "imdb-10": "reviews 10 : 1", "adult": "Adult", "breast-cancer": "breast cancer", "digits": "digits, clean",
    "adult-sym0.2": "Adult, 20 % symmetric noise", "adult-sym0.4": "Adult, 40 % symmetric noise",
    "digits-sym0.2": "digits, 20 % symmetric noise", "digits-sym0.4": "digits, 40 % symmetric noise",
    "ce": "CE", "ce, one stage": "CE, one stage", "cb-ce": "class-balanced CE", "cb-focal": "class-balanced focal",
    "ldam": "LDAM", "cb-ldam": "class-balanced LDAM",
    "deferred-balanced-softmax": "balanced softmax", "balanced-softmax": "balanced softmax throughout",
}  # fmt: skip


def collect(examples: Path) -> Any:
    """A row for each dataset, loss and form of ABSGD, or a baseline, that was run: the gains, and what SGD has."""
    rows = []
    for folder in sorted(path for path in examples.glob("*/results/*") if any(path.glob("*/*.json"))):
        for _, frame in report.load(folder).groupby("dataset"):
            runs = report.at_the_chosen(frame)
            for (method, loss), family in runs.dropna(subset=["gain"]).groupby(["method", "loss"]):
                form = method.removesuffix("-one-stage")
                if form in (*FORMS, *BASELINES):
                    base = runs[(runs.method == "sgd") & (runs.loss == loss)].accuracy
                    setting = {name: family[name].iloc[0] for name in SETTING}
                    setting["loss"] += ", one stage" if form != method else ""
                    rows.append(setting | {"method": form, "gains": family.gain.to_numpy(), "sgd": base})
    return pd.DataFrame(rows)


def table(gains: Any) -> str:
    """The table of the README, in Markdown."""
    rows = []
    for (preset, dataset, loss), words in README.items():
        here = gains[(gains.preset == preset) & (gains.dataset == dataset) & (gains.loss == loss)].set_index("method")
        found = {method: report.spread(pd.Series(row.gains), "+.2f") for method, row in here.iterrows()}
        cells = {style.name(method): found.get(method, "not run") for method in (*FORMS, *BASELINES)}
        seeds = sorted({len(row.gains) for _, row in here.iterrows()})
        seeds = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
        rows.append(
            {"CIFAR-10, unless named": words, "SGD, %": report.spread(here.sgd.iloc[0]), **cells, "seeds": seeds}
        )
    return pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)


def figure(gains: Any):
    """Gains of all settings, a row each."""
    settings = list(gains[~gains.method.isin(BASELINES)].groupby(SETTING, sort=False))
    fig, axis = plt.subplots(figsize=(7.5, 0.9 + 0.24 * len(settings)), layout="constrained")
    for place, (_, rows) in enumerate(settings):
        axis.axhspan(place - 0.5, place + 0.5, color=style.SGD, alpha=0.08 * (place % 2), lw=0)
        for shift, (_, row) in enumerate(rows.iterrows(), 1):
            draw(axis, place - 0.5 + shift / (len(rows) + 1), row)
    axis.axvline(0, color="black", lw=0.8)
    labels = [
        f"{WORDS.get(dataset, dataset)}{', ResNet-32' * (preset == 'paper')}: {WORDS.get(loss, loss)}"
        for (_, preset, dataset, loss), _ in settings
    ]
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_xlim(-WIDEST, WIDEST)
    axis.set_xlabel("points over SGD with the same loss")
    for method, (marker, colour) in FORMS.items():
        axis.plot([], [], marker, color=colour, ms=5, label=style.name(method))
    fig.legend(*axis.get_legend_handles_labels(), loc="outside upper right", ncols=len(FORMS))
    return fig


def draw(axis: Any, place: float, row: Any) -> None:
    """A mean and a standard deviation, or at the edge the number."""
    marker, colour = FORMS[row.method]
    mean = row.gains.mean()
    if abs(mean) > WIDEST:
        words, side = (f"{mean:+.0f} ▸", "right") if mean > 0 else (f"◂ {mean:+.0f}", "left")
        axis.text(np.copysign(0.99 * WIDEST, mean), place, words, color=colour, fontsize=7, va="center", ha=side)
        return
    spread = row.gains.std(ddof=1) if len(row.gains) > 1 else 0
    for side in (-1, 1):
        if abs(mean + side * spread) > WIDEST:
            axis.plot(side * WIDEST, place, "<>"[side > 0], ms=4, color=colour, clip_on=False)
    axis.errorbar(mean, place, xerr=spread, fmt=marker, ms=4, lw=1, color=colour)


if __name__ == "__main__":
    here = Path(__file__).parent
    found = collect(here)
    style.save(figure(found), here / "gains.png")
    fill(here.parent / "README.md", table(found))
