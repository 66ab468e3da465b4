"""The figures of a dataset (gains, accuracy while training, by class, over λ and over the trusted fraction, weight of
wrong labels), and of a search.
"""

import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from examples import style

LOWEST = -15.0  # points of a gain; a network that is destroyed loses more, and would leave no room for the others
# In the pictures of training and of classes.
SHOWN = ("sgd", "absgd", "bounded-absgd", "within-class", "kl-radius", "trust", "trust-first-form", "focus")


def draw(frame: Any, picked: Any, folder: Path) -> list[Path]:
    """Draws what there is something to see of, from all records and from the runs at the strength that was chosen."""
    alike = with_the_same_seeds(picked[picked.method.isin(SHOWN)])
    drawn, found = [], {"gains": gains(picked), "training": training(alike), "classes": classes(alike)}
    found["wrong_labels"] = wrong_labels(alike)
    found |= {"strengths": strengths(frame), "fractions": fractions(frame)}
    for name, figure in found.items():
        path = folder / f"{name}.png"
        path.unlink(missing_ok=True)
        if figure is not None:
            style.save(figure, path)
            drawn.append(path)
    return drawn


def with_the_same_seeds(runs: Any) -> Any:
    """The runs of the seeds that all methods with a loss have, so that means over seeds can be compared."""
    methods = [runs.groupby(names).method.transform("nunique") for names in (["loss", "seed"], ["loss"])]
    return runs[methods[0] == methods[1]]


def gains(picked: Any):
    """Gain over SGD with the same loss, a bar for each method and loss, and a dot for each seed."""
    runs = picked[(picked.method != "sgd") & picked.gain.notna()]
    families = list(runs.groupby(["loss", "method"], sort=True))
    if len(families) < 2:
        return None
    figure, axis = plt.subplots(figsize=(7, 0.8 + 0.24 * len(families)), layout="constrained")
    for place, ((_, method), family) in enumerate(families):
        mean = family.gain.mean()
        axis.barh(place, mean, 0.7, color=style.colour(method), alpha=0.8)
        axis.plot(family.gain, np.full(len(family), place), ".", color="black", ms=4)
        if mean < LOWEST:
            axis.text(LOWEST, place, f" ◂ {mean:+.0f}", fontsize=7, va="center")
    axis.set_xlim(left=max(axis.get_xlim()[0], LOWEST))
    labels = [f"{loss}: {label(method, family)}" for (loss, method), family in families]
    axis.set_yticks(range(len(families)), labels)
    axis.invert_yaxis()
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xlabel("points over SGD with the same loss")
    return figure


def label(method: str, family: Any) -> str:
    """A method and the strength of its runs."""
    return f"{style.name(method)}, {family.strength.iloc[0]}".removesuffix(", –")


def look(method: str, family: Any) -> dict[str, Any]:
    """Of its line in a plot."""
    return {"linestyle": style.line(method), "color": style.colour(method), "label": label(method, family)}


def training(runs: Any):
    """Test accuracy while training, mean over seeds, for each loss; the second stage is marked."""
    runs = runs[np.array([len(each["test_accuracy"]) > 1 for each in runs.by_epoch], bool)]  # also of no runs
    losses = [loss for loss, family in runs.groupby("loss", sort=False) if family.method.nunique() > 1]
    if not losses:
        return None
    figure, axes = panels(len(losses), "test accuracy, %", sharey=True)
    for axis, loss in zip(axes, losses, strict=True):
        for method, family in runs[runs.loss == loss].groupby("method", sort=False):
            series = np.array([each["test_accuracy"] for each in family.by_epoch])
            axis.plot(*series.mean(axis=0).T, marker=".", **look(method, family))
            if (begin := second_stage(family.config.iloc[0]["run"]["stages"])) is not None:
                axis.axvline(begin, color="black", lw=0.8, ls=":")
        axis.set_title(loss, loc="left", fontsize=9)
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        below(axis)
    return figure


def panels(count: int, ylabel: str, **options: Any) -> tuple[Any, list[Any]]:
    """A figure of as many axes, at most four in a row, of which the first is labelled."""
    columns, rows = min(count, 4), -(-count // 4)
    size = 3.2 * columns, 2.8 * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    for spare in axes.flat[count:]:
        spare.remove()
    for first in axes[:, 0]:
        first.set_ylabel(ylabel)
    return figure, list(axes.flat[:count])


def below(axis: Any) -> None:
    """The legend below the axes, where it covers no line."""
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.24))


def second_stage(stages: list[dict[str, Any]]) -> int | None:
    """The epoch from which on a run differs in more than the learning rate; None if there is none."""
    done = 0
    plain = [{name: value for name, value in stage.items() if name not in ("epochs", "rate")} for stage in stages]
    for stage, fields in zip(stages, plain, strict=True):
        if fields != plain[0]:
            return done
        done += stage.get("epochs", 0)
    return None


def classes(runs: Any):
    """Accuracy of each class, from frequent to rare, with cross entropy."""
    runs = runs[runs.loss == "ce"]
    if runs.method.nunique() < 2 or len(set(runs.class_counts.iloc[0])) == 1 or len(runs.class_counts.iloc[0]) < 3:
        return None
    counts = np.array(runs.class_counts.iloc[0])
    long_tailed = counts.max() > 3 * counts.min()  # else counts differ by wrong labels alone
    order = np.argsort(-counts, kind="stable") if long_tailed else np.arange(len(counts))
    figure, axis = plt.subplots(figsize=(6, 2.8), layout="constrained")
    for method, family in runs.groupby("method", sort=False):
        mean = np.nanmean(np.array(family.per_class.tolist(), float), axis=0)[order]
        marker = "." if len(order) <= 20 else None
        axis.plot(mean, marker=marker, **look(method, family))
    axis.set_xlabel("class, from frequent to rare" if long_tailed else "class")
    if long_tailed and len(order) <= 20:
        axis.set_xticks(range(len(order)), [f"{count:,}" for count in counts[order]])
        axis.set_xlabel("training examples of the class")
    axis.set_ylabel("test accuracy, %")
    below(axis)
    return figure


def strengths(frame: Any):
    """Validation accuracy over λ, a line for each bound and a panel for each loss and variant; SGD's is grey."""
    runs = frame[frame.validation_accuracy.notna()]
    runs = runs.assign(variant=runs.method.str.removeprefix("bounded-"))
    families = runs[runs.variant.str.startswith("absgd")].groupby(["loss", "variant"], sort=True)
    families = [
        (name, family)
        for name, family in families
        if family.temperature.nunique() > 2 and family.validation_accuracy.nunique() > 1
    ]
    if not families:
        return None
    figure, axes = panels(len(families), "validation accuracy, %")
    for axis, ((loss, method), family) in zip(axes, families, strict=True):
        plain = runs[(runs.method == method.replace("absgd", "sgd")) & (runs.loss == loss)]
        if len(plain):
            axis.axhline(plain.validation_accuracy.mean(), color=style.SGD, label=style.name("sgd"))
        for (negative, bound), line in family.groupby([family.temperature < 0, "max_weight"], sort=True):
            mean = line.groupby(line.temperature.abs()).validation_accuracy.mean()
            shown = ("λ < 0" if negative else "λ > 0") + (f", weights at most {bound:g}" if np.isfinite(bound) else "")
            line_style = "--" if negative else "-"
            colour = style.colour(method, np.isfinite(bound))
            axis.plot(mean, line_style, marker=".", color=colour, label=shown)
        axis.set_xscale("log")
        ticks = sorted(set(family.temperature.abs()))
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_title(f"{loss}, {style.name(method)}", loc="left", fontsize=9)
        axis.set_xlabel("|λ|" if (family.temperature < 0).any() else "λ")
        axis.legend(fontsize=7)
    return figure


def fractions(frame: Any):
    """Test accuracy over the fraction that is trusted, with the loss of most fractions; SGD's is grey."""
    runs = frame[frame.validation_accuracy.notna()]
    trusting = runs[runs.method.str.startswith("trust")]
    tried = trusting.groupby("loss").fraction.nunique()
    if tried.empty or tried.max() < 3:
        return None
    trusting = trusting[trusting.loss == tried.idxmax()]
    plain = runs[(runs.method == "sgd") & (runs.loss == tried.idxmax())]
    figure, axis = plt.subplots(figsize=(4, 2.8), layout="constrained")
    if len(plain):
        axis.axhline(plain.accuracy.mean(), color=style.SGD, label=style.name("sgd"))
    for method, family in trusting.groupby("method"):
        mean = family.groupby("fraction").accuracy.mean()
        axis.plot(mean, linestyle=style.line(method), marker=".", color=style.ABSGD, label=style.name(method))
    axis.set_xlabel("fraction that is trusted")
    axis.set_ylabel("test accuracy, %")
    axis.legend()
    return figure


def wrong_labels(runs: Any):
    """How much of all weight wrong labels have in each epoch, mean over seeds; with SGD it is their share."""
    runs = runs[runs.loss == "ce"]
    runs = runs[np.array([any(share for _, share in each.get("weight_of_wrong", [])) for each in runs.by_epoch], bool)]
    if runs.method.nunique() < 2:
        return None
    figure, axis = plt.subplots(figsize=(4, 2.8), layout="constrained")
    for method, family in runs.groupby("method", sort=False):
        epochs, share = np.array([each["weight_of_wrong"] for each in family.by_epoch]).mean(axis=0).T
        axis.plot(epochs, 100 * share, marker=".", **look(method, family))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("epoch")
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axis.set_ylabel("weight of wrong labels, %")
    below(axis)
    return figure


def differences(confirmed: list[dict[str, Any]]):
    """What each confirmed recipe of a search gains over the baseline: a dot for each seed, and Student's interval."""
    figure, axis = plt.subplots(figsize=(7, 0.9 + 0.4 * len(confirmed)), layout="constrained")
    for place, line in enumerate(confirmed):
        mean, colour = np.mean(line["difference"]), style.colour(line["method"])
        axis.plot(line["interval"], [place, place], color=colour, lw=6, alpha=0.5, solid_capstyle="butt")
        axis.plot(mean, place, "|", color=colour, ms=14, mew=3)
        axis.plot(line["difference"], np.full(len(line["difference"]), place), ".", color="black", ms=4)
    lines = (line["label"].replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}") for line in confirmed)
    axis.set_yticks(range(len(confirmed)), [textwrap.fill(line, 42, break_on_hyphens=False) for line in lines])
    axis.set_ylim(len(confirmed) - 0.5, -0.5)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_xlabel("points of test accuracy over the baseline")
    return figure
