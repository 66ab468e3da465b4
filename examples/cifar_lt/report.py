"""The table and the figure of examples/cifar_lt/README.md, drawn from the JSON results.

python -m examples.cifar_lt.report
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from examples.readme import fill

matplotlib.use("Agg")
HERE = Path(__file__).parent
NAMES = {"sgd": "SGD", "absgd": "ABSGD", "kl-radius": "ABSGD in a KL ball"}
COLOURS = {"sgd": "#666666", "absgd": "#0072B2", "kl-radius": "#D55E00"}  # told apart by colour-blind eyes too


def load(folder: Path) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """The tested runs of each method, and the validation runs."""
    tested, tuned = defaultdict(list), []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if result["validation"]:
            tuned.append(result)
        else:
            tested[result["method"]].append(result)
    return {method: tested[method] for method in NAMES if method in tested}, tuned


def _pm(values) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def _strength(result: dict[str, Any]) -> str:
    return {"sgd": "λ = ∞", "absgd": f"λ = {result['temperature']}", "kl-radius": f"ρ = {result['kl_radius']}"}[
        result["method"]
    ]


def markdown(tested: dict[str, list[dict[str, Any]]], tuned: list[dict[str, Any]]) -> str:
    """Accuracy, mean ± standard deviation over the seeds; gain over SGD seed by seed; what was chosen from."""
    lines = ["| method | chosen | top-1 | head | tail | gain over SGD | effective sample size at the end | seeds |"]
    lines.append("|---" * 8 + "|")
    base = {r["seed"]: r["top1"] for r in tested["sgd"]}
    for method, results in tested.items():
        gains = [r["top1"] - base[r["seed"]] for r in results if r["seed"] in base]
        columns = [_pm([r[k] for r in results]) for k in ("top1", "head", "tail")]
        size = np.mean([r["ess_by_epoch"][-1] for r in results])
        gain = "" if method == "sgd" else _pm(gains)
        cells = [NAMES[method], _strength(results[0]), *columns, gain, f"{size:.0%} of the batch", str(len(results))]
        lines.append("| " + " | ".join(cells) + " |")
    first = tested["sgd"][0]
    lines += ["", f"Hardware: {first['hardware']}. A run takes {np.mean([r['seconds'] for r in tested['sgd']]):.0f} s "]
    lines[-1] += f"and {np.mean([r['compile_seconds'] for r in tested['sgd']]):.0f} s of compilation. "
    choices = ", ".join(f"{_strength(r)}: {r['val_top1']:.2f}" for r in tuned)
    lines[-1] += f"Validation accuracy (one seed): {choices}."
    return "\n".join(lines)


def figure(tested: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Accuracy of every class, and the effective sample size over training."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=(1.7, 1))
    width = 0.8 / len(tested)
    counts = tested["sgd"][0]["class_counts"]
    for i, (method, results) in enumerate(tested.items()):
        per_class = np.array([r["per_class"] for r in results])
        places = np.arange(len(counts)) + (i + 0.5) * width - 0.4
        errors = per_class.std(0, ddof=1) if len(results) > 1 else None
        label = f"{NAMES[method]}, {_strength(results[0])}"
        left.bar(
            places, per_class.mean(0), width, yerr=errors, color=COLOURS[method], label=label, error_kw={"lw": 0.8}
        )
        sizes = 100 * np.mean([r["ess_by_epoch"] for r in results], axis=0)
        right.plot(range(1, len(sizes) + 1), sizes, color=COLOURS[method], lw=2, ls="--" if method == "sgd" else "-")
    left.set_xticks(range(len(counts)), [f"{c}\n{n}" for c, n in enumerate(counts)])
    left.set_xlabel("class, and its training images")
    left.set_ylabel("test accuracy in %")
    left.legend(frameon=False)
    right.set_xlabel("epoch")
    right.set_ylabel("effective sample size, % of the batch")
    right.set_ylim(0, 105)
    fig.savefig(path, dpi=110)
    plt.close(fig)


if __name__ == "__main__":
    tested_runs, tuning_runs = load(HERE / "results" / "mini")
    figure(tested_runs, HERE / "results" / "mini.png")
    fill(HERE / "README.md", markdown(tested_runs, tuning_runs))
