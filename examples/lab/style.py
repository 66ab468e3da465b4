"""One style for all figures: SGD grey, ABSGD blue, rivals in other colours that colour-blind eyes tell apart."""

import matplotlib
import matplotlib.pyplot as plt

matplotlib.use("Agg")
SGD, ABSGD, BOUNDED, RIVALS = "#666666", "#0072B2", "#56B4E9", ("#D55E00", "#009E73", "#CC79A7", "#E69F00")
plt.rcParams.update(
    {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "savefig.dpi": 110}
)


def colour(method: str, bounded: bool = False) -> str:
    """Of a method by its name in records."""
    if method.startswith("sgd"):
        return SGD
    if method.startswith(("absgd", "bounded-absgd", "kl-radius", "trust", "focus", "term", "adaptive-gamma")):
        return BOUNDED if bounded or method.startswith("bounded") else ABSGD
    return RIVALS[sum(map(ord, method)) % len(RIVALS)]


def line(method: str) -> str:
    """Broken where λ follows a rule, so that forms of ABSGD are told apart."""
    return "--" if method in ("trust", "focus", "kl-radius") else "-"
