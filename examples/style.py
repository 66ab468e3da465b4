"""One style for all figures: SGD grey, ABSGD blue, rivals in other colours that colour-blind eyes tell apart."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

matplotlib.use("Agg")
SGD, ABSGD, BOUNDED, RIVALS = "#666666", "#0072B2", "#56B4E9", ("#D55E00", "#009E73", "#CC79A7", "#E69F00")
plt.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": plt.cycler(color=[ABSGD, *RIVALS, BOUNDED, SGD]),
        "legend.frameon": False,
        "savefig.dpi": 110,
    }
)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure, and closes it."""
    figure.savefig(path)
    plt.close(figure)


NAMES = {
    "sgd": "SGD", "absgd": "ABSGD", "bounded-absgd": "ABSGD, bounded", "kl-radius": "ABSGD, KL radius",
    "trust": "ABSGD, trusted fraction", "trust-first-form": "ABSGD, trusted fraction, first form",
    "within-class": "ABSGD within classes",
    "focus": "ABSGD, fraction in focus", "adaptive-gamma": "ABSGD, adaptive γ", "term": "TERM", "recover": "RECOVER",
    "meta": "META", "l2rw": "L2RW", "resample": "Resampling", "ncm": "NCM", "crt": "cRT", "tau-norm": "τ-norm, τ = 1",
    "lws": "LWS", "gce": "Generalised CE", "sce": "Symmetric CE", "smoothing": "Label smoothing",
    "forward": "Forward correction, symmetric", "small-loss": "Small-loss selection",
    "elr": "Early-learning regularisation", "rgd": "RGD",
}  # fmt: skip
FORMS = {
    "-fc": "classifier only",
    "-one-stage": "one stage",
    "-no-momentum": "without momentum",
    "-annealed": "annealed",
}


def name(method: str) -> str:
    """Of a method as people know it, by its name in records."""
    plain, changed, factor = method.partition("-rate")
    if changed:
        return f"{name(plain)}, rate × {factor}"
    for suffix, words in FORMS.items():
        if method.endswith(suffix):
            return f"{name(method.removesuffix(suffix))}, {words}"
    return NAMES.get(method, method)


def colour(method: str, bounded: bool = False) -> str:
    """Of a method by its name in records."""
    if method.startswith("sgd"):
        return SGD
    if method.startswith(
        ("absgd", "bounded-absgd", "kl-radius", "trust", "focus", "within-class", "term", "adaptive-gamma")
    ):
        return BOUNDED if bounded or method.startswith("bounded") else ABSGD
    return RIVALS[sum(map(ord, method)) % len(RIVALS)]


def line(method: str) -> str:
    """Broken where λ follows a rule, dotted within classes, so that forms of ABSGD are told apart."""
    by_rule = dict.fromkeys(("trust", "focus", "kl-radius"), "--")
    return (by_rule | {"trust-first-form": "-.", "within-class": ":"}).get(method, "-")
