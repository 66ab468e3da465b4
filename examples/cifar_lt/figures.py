"""The figures of a column of results. Each function draws one, or says that there is nothing to draw."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from examples.cifar_lt.errors import UserError

if TYPE_CHECKING:  # the report imports this module
    from examples.cifar_lt.report import Row

matplotlib.use("Agg")

STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
# Okabe and Ito's colours, which colour-blind eyes tell apart; the marks say it again.
KEY = {
    ("sgd", "ce"): ("#666666", "o"),
    ("sgd", "cb-ce"): ("#E69F00", "s"),
    ("absgd", "ce"): ("#0072B2", "D"),
    ("kl-radius", "ce"): ("#D55E00", "^"),
    ("meta", "ce"): ("#CC79A7", "v"),
    ("recover", "ce"): ("#009E73", "P"),
    ("crt", "ce"): ("#56B4E9", "X"),
}
GROUPS = 10  # as many marks as can be told apart on an axis
POINTS = 2000  # of t-SNE, which takes seconds for these and minutes for a whole test set


def draw(rows: Sequence[Row], folder: Path) -> tuple[dict[str, str], list[str]]:
    """The title of each figure drawn by its file name, and a sentence about each that its data did not let draw."""
    makers: dict[str, tuple[str, Callable[[Sequence[Row], Path], bool]]] = {
        "per_class.png": ("accuracy by class", per_class),
        "curves.png": ("training curves", curves),
        "gains.png": ("gains over SGD", gains),
        "tsne.png": ("t-SNE of the features", tsne),
    }
    drawn, problems = {}, []
    for name, (title, make) in makers.items():
        try:
            with plt.rc_context(STYLE):
                if make(rows, folder / name):
                    drawn[name] = title
        except UserError as error:
            problems.append(str(error))
        finally:
            plt.close("all")
    return drawn, problems


def find(rows: Sequence[Row], method: str, loss: str = "ce") -> list[Row]:
    """The chosen strength, or all where there was nothing to choose by."""
    return [r for r in rows if (r.method, r.loss) == (method, loss) and r.cells and r.chosen is not False]


def is_balanced(cell: dict[str, Any]) -> bool:
    """Whether all classes are as frequent, up to what wrong labels do to their numbers."""
    return cell["config"].get("ratio") == 1


def ordered(cell: dict[str, Any]) -> np.ndarray:
    """The classes from frequent to rare."""
    counts = np.array(cell["class_counts"])
    return np.arange(len(counts)) if is_balanced(cell) else np.argsort(-counts, kind="stable")


def label(row: Row) -> str:
    return row.name + (f", {row.strength}" if row.strength.symbol else "")


def per_class(rows: Sequence[Row], path: Path) -> bool:
    """Accuracy of each class (many classes: of ten groups of neighbours), and the gain over SGD there."""
    fills = ("full", "none", "left", "right", "top", "bottom")  # tell the strengths apart where none was chosen
    shown = [(row, *look, fill) for key, look in KEY.items() for row, fill in zip(find(rows, *key), cycle(fills))]
    if not shown:
        return False
    some = shown[0][0].cells[0]
    counts = np.array(some["class_counts"])
    order = np.array_split(ordered(some), min(GROUPS, len(counts)))
    ends = order if is_balanced(some) else [counts[g] for g in order]
    ticks = [f"{g[0]}" if len(g) == 1 else f"{g[0]}–{g[-1]}" for g in ends]

    def by_group(cell) -> np.ndarray:
        return np.array([np.mean(np.asarray(cell["per_class"])[g]) for g in order])

    base = {c["seed"]: by_group(c) for row in find(rows, "sgd") for c in row.cells}
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for i, (row, colour, mark, fill) in enumerate(shown):
        style: dict[str, Any] = {"color": colour, "marker": mark, "fillstyle": fill, "ms": 5, "lw": 1.4}
        name = "SGD-DRW (cb-ce)" if row.loss == "cb-ce" else label(row)
        left.plot(np.mean([by_group(c) for c in row.cells], axis=0), label=name, **style)
        pairs = [by_group(c) - base[c["seed"]] for c in row.cells if c["seed"] in base]
        if pairs and row.method + row.loss != "sgdce":
            places = np.arange(len(order)) + 0.7 * ((i - 0.5) / max(len(shown) - 1, 1) - 0.5)
            errors = np.std(pairs, axis=0, ddof=1) if len(pairs) > 1 else None
            right.errorbar(places, np.mean(pairs, axis=0), errors, elinewidth=0.8, **(style | {"ls": "none"}))
    right.axhline(0, color="#666666", lw=1)
    many = len(order) < len(counts)
    what = "class" if ends is order else f"training images of the class{'es' if many else ''}, from frequent to rare"
    for axis in (left, right):
        turned = {"rotation": 40, "ha": "right"} if many else {}
        axis.set_xticks(range(len(order)), ticks, **turned)
        axis.set_xlabel(what)
    left.set_ylim(0, 100)
    left.set_ylabel("test accuracy in %")
    right.set_ylabel("gain over SGD (ce) in points,\nmean ± standard deviation")
    fig.legend(loc="outside upper center", ncols=min(len(shown), 5))
    fig.savefig(path, dpi=110)
    return True


def _mean(curves: Sequence[Sequence[Any]]) -> np.ndarray:
    """Mean over seeds, as far as all of them go. JSON holds what is not finite as a string."""
    length = min(map(len, curves), default=0)
    return np.mean([np.array(curve[:length], float) for curve in curves], axis=0)


def curves(rows: Sequence[Row], path: Path) -> bool:
    """Loss, effective sample size, accuracy: by strength, and with a part of the method taken away."""
    sgd = [(row, {"color": "#666666", "ls": "--"}) for row in find(rows, "sgd")]
    absgd = [r for r in rows if (r.method, r.loss) == ("absgd", "ce") and r.cells]
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, max(len(absgd), 2)))
    strengths = [(row, {"color": shade}) for row, shade in zip(absgd, shades, strict=False)]
    strengths += [
        (row, {"color": "#D55E00", "ls": style})
        for row, style in zip(find(rows, "kl-radius"), ("-.", ":", (0, (1, 3)), (0, (5, 5))), strict=False)
    ]
    looks = {
        "sgd-no-momentum": {"color": "#666666", "ls": ":"},
        "absgd-no-momentum": {"color": "#0072B2", "ls": ":"},
        "absgd-one-stage": {"color": "#E69F00", "ls": "-."},
    }
    parts = [(row, look) for method, look in looks.items() for row in find(rows, method)]
    # The whole method at the strength of its parts: only then does nothing but the part differ.
    whole = [r for r in absgd if r.strength in {p.strength for p, _ in parts}] or find(rows, "absgd")
    lines = [sgd + strengths]
    if parts:
        lines.append(sgd + [(row, {"color": "#0072B2"}) for row in whole] + parts)
    if not lines[0]:
        return False
    fig, axes = plt.subplots(
        len(lines), 3, figsize=(13, 3.1 * len(lines)), layout="constrained", sharex=True, squeeze=False
    )
    for (loss, size, accuracy), shown in zip(axes, lines, strict=True):
        for row, look in shown:
            look = {"lw": 1.6, "ls": "-"} | look
            mean_loss = _mean([c["loss_by_epoch"] for c in row.cells])
            loss.plot(np.arange(1, mean_loss.size + 1), mean_loss, label=label(row), **look)
            sizes = 100 * _mean([c["ess_by_epoch"] for c in row.cells])
            size.plot(np.arange(1, sizes.size + 1), sizes, **look)
            points = _mean([c["top1_by_epoch"] for c in row.cells]).reshape(-1, 2)
            accuracy.plot(*points.T, marker="." if len(points) <= 20 else "", **look)
        for axis in (loss, size, accuracy):
            axis.axvline(shown[0][0].cells[0]["second_stage"] + 0.5, color="black", lw=0.8, ls=":")
        loss.set_yscale("log")
        loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        loss.yaxis.set_major_formatter("{x:g}")
        loss.yaxis.set_minor_formatter(NullFormatter())
        loss.set_ylabel("training loss")
        size.set_ylim(0, 105)
        size.set_ylabel("effective sample size,\n% of the batch")
        accuracy.set_ylabel("test accuracy in %")
        handles, names = loss.get_legend_handles_labels()
        accuracy.legend(handles, names, loc="center left", bbox_to_anchor=(1.02, 0.5))
    for axis in axes[-1]:
        axis.set_xlabel("epoch (dotted: the second stage begins)")
    fig.savefig(path, dpi=110)
    return True


def gains(rows: Sequence[Row], path: Path) -> bool:
    """Gain over SGD with the same loss, of every method and loss."""
    shown = [row for row in rows if row.gains and row.chosen is not False]
    if not shown:
        return False
    fig, axis = plt.subplots(figsize=(8, 1.3 + 0.25 * len(shown)), layout="constrained")
    kinds = {"ABSGD and its variants": ("#0072B2", "o"), "other methods": ("#D55E00", "s")}
    for kind, (colour, mark) in kinds.items():
        places = [i for i, row in enumerate(shown) if ("ABSGD" in row.name) == (kind != "other methods")]
        means = [float(np.mean(shown[i].gains)) for i in places]
        errors = [float(np.std(shown[i].gains, ddof=1)) if len(shown[i].gains) > 1 else 0.0 for i in places]
        if places:
            axis.errorbar(means, places, xerr=errors, color=colour, marker=mark, ls="none", ms=5, lw=1.2, label=kind)
    axis.axvline(0, color="#666666", lw=1)
    axis.set_yticks(range(len(shown)), [f"{label(row)} ({row.loss})" for row in shown])
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.grid(axis="x", lw=0.4)
    axis.set_xlabel("gain over SGD with the same loss, points of test accuracy\nmean ± standard deviation over seeds")
    fig.legend(loc="outside upper center", ncols=2)
    fig.savefig(path, dpi=110)
    return True


def tsne(rows: Sequence[Row], path: Path) -> bool:
    """Test features of SGD and ABSGD in two dimensions, the same images of the same seed in both."""

    def files(row: Row) -> dict[int, Path]:
        named = {c["seed"]: c["path"].with_name(c["path"].stem + "-features.npz") for c in row.cells}
        return {seed: file for seed, file in named.items() if file.exists()}

    candidates = [
        (seed, [(sgd, base[seed]), (absgd, file)])
        for sgd in find(rows, "sgd")
        for base in [files(sgd)]
        for absgd in find(rows, "absgd")
        for seed, file in files(absgd).items()
        if seed in base
    ]
    if not candidates:
        return False
    from sklearn.manifold import TSNE  # takes a second to import
    from threadpoolctl import threadpool_limits

    _, pair = candidates[0]
    cell = pair[0][0].cells[0]
    order = ordered(cell)
    ranks = np.unique(np.linspace(0, len(order) - 1, GROUPS).round().astype(int))
    fig, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    points = None
    for axis, (row, file) in zip(axes, pair, strict=True):
        try:
            with np.load(file) as data:
                features, labels = data["features"], data["labels"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{file} cannot be read: {error}.") from error
        places = np.argsort(order)[labels]
        shown = np.flatnonzero(np.isin(places, ranks))
        shown = np.sort(np.random.default_rng(0).permutation(shown)[:POINTS])
        reducer = TSNE(random_state=0, init="pca", perplexity=min(30, (len(shown) - 1) / 3))
        with threadpool_limits(1):  # several threads crawl where other programs share the cores
            flat = reducer.fit_transform(features[shown].astype(np.float32))
        colours = np.searchsorted(ranks, places[shown])
        points = axis.scatter(*flat.T, c=colours, cmap=plt.get_cmap("viridis", len(ranks)), s=6, lw=0)
        points.set_clim(-0.5, len(ranks) - 0.5)
        axis.set_title(label(row))
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(visible=True, color="#AAAAAA")
    assert points is not None
    of = f" ({len(ranks)} of {len(order)} classes)" if len(ranks) < len(order) else ""
    what = "class" if is_balanced(cell) else "training images of the class"
    bar = fig.colorbar(points, ax=axes, ticks=range(len(ranks)), label=f"{what}{of}")
    bar.ax.set_yticklabels([str(order[r] if is_balanced(cell) else cell["class_counts"][order[r]]) for r in ranks])
    bar.ax.invert_yaxis()
    fig.savefig(path, dpi=110)
    return True
