"""Does it replace the published package? The same ResNet, weights and batches through both: agreement, then speed.

python -m benchmarks.published_package --data-dir data   # needs `pip install absgd==0.0.1 torch`

CIFAR-10 without augmentation, λ = 1, γ = 0.9, learning rate 0.01, momentum 0.9, weight decay 5e-4 (at 0.1 and without a
first stage the losses soon overflow the package). At ABLoss(mylambda=1, abgamma=0.9, abalpha=1), after one
updateLambda(), and ABSGD(lr=0.01, weight_decay=5e-4) the package is Algorithm 1 from s_0 = 0, as is absgd(0.01,
temperature=1, gamma=0.9, weight_decay=5e-4).

Agreement: a deep network tears apart any two runs that differ by a rounding, in float32 within a few steps. So the
proof is in float64 with a small network; in float32 the distance is put beside that of our own run from weights moved
by one rounding.

Speed: the package's loop against our compiled epoch, our step called from a loop and, on an accelerator, several runs
in one program. All have their images on the device; what a data loader costs comes on top of the package's loop.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.figure import Figure

from benchmarks.harness.names import EPOCH, PUBLISHED, SWEEP
from benchmarks.harness.records import Record, publish, table

AGREES, TARGETS = 1e-8, {EPOCH: 3, SWEEP: 10}  # the distance in float64; the ratios on an accelerator


@dataclasses.dataclass(frozen=True)
class Options:
    """Against the published package in use."""

    data_dir: Path = Path("data")
    """Folder that holds CIFAR-10, or is to hold it."""
    depth: int = 32
    """Of the network in float32, and of the timings."""
    steps: int = 50
    """Steps compared in float32."""
    exact_depth: int = 8
    """Of the network in float64."""
    exact_steps: int = 50
    """Steps compared in float64."""
    width: int = 16
    """Channels of the first stage."""
    batch_size: int = 128 if jax.default_backend() != "cpu" else 32
    """Images of a step."""
    timed_steps: int = 0
    """Steps of a timing; 0: 4 on the CPU, 390 (an epoch) on an accelerator."""
    repeats: int = 5
    """Timings of each method, in turn."""
    sweep: int = 16
    """Runs trained at once on an accelerator."""
    seed: int = 0
    """Of the weights and of the order of the images."""


def measure(options: Options) -> list[Record]:
    """The records of both agreements, then those of the speed."""
    from benchmarks.harness import published  # here, because the report needs no PyTorch

    return [
        *published.agreement(options, options.exact_depth, options.exact_steps, np.float64),
        *published.agreement(options, options.depth, options.steps, np.float32),
        *published.speed(options),
    ]


def markdown(records: list[Record]) -> str:
    """A table of the agreement after the first and the last step, and one of the speed."""
    steps = [record for record in records if record["quantity"] == "trajectory"]
    rows = []
    for dtype, method in dict.fromkeys((record["dtype"], record["method"]) for record in steps):
        chosen = [record for record in steps if (record["dtype"], record["method"]) == (dtype, method)]
        for record in (chosen[0], chosen[-1]):
            rows.append(
                {
                    "absgd_jax against": f"{method}, {dtype}, ResNet-{record['depth']}",
                    "step": str(record["step"]),
                    "loss": f"{record['loss_difference']:.1e}",
                    "p̃": f"{record['weight_difference']:.1e}",
                    "parameters": f"{record['parameter_distance']:.1e}",
                }
            )
    worst = max(
        record["parameter_distance"]
        for record in steps
        if (record["dtype"], record["method"]) == ("float64", PUBLISHED)
    )
    verdict = (
        f"In float64 the largest distance is {worst:.1e}: {'met' if worst <= AGREES else 'missed'} (≤ {AGREES:g})."
    )
    return (
        f"{table(rows)}\n\nDistances are relative, of parameters to how far they have moved. {verdict}\n\n"
        + of_speed([record for record in records if record["quantity"] == "images_per_second"])
    )


def of_speed(records: list[Record]) -> str:
    def text(numbers):
        return f"{numbers['median']:.3g} ({numbers['min']:.3g} to {numbers['max']:.3g})"

    def ratio(record):
        target = TARGETS.get(record["method"]) if record["device"] != "cpu" else None
        met = "met" if target and record["ratio"]["median"] >= target else "missed"
        return text(record["ratio"]) + (f", target {target}: {met}" if target else "")

    rows = [
        {
            "device": record["device"],
            "method": f"{record['method']}, {record['dtype']}" + (f", {record['runs']} runs" * (record["runs"] > 1)),
            "images/s, all runs": text(record["images_per_second"]),
            "times the package's": ratio(record),
            "compilation, s": "–" if record["compile_seconds"] is None else f"{record['compile_seconds']:.1f}",
        }
        for record in records
    ]
    return table(rows) if rows else "Speed: not run."


def figure(records: list[Record]) -> Figure:
    """How the parameters part, step by step."""
    fig, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    steps = [record for record in records if record["quantity"] == "trajectory"]
    for dtype, method in dict.fromkeys((record["dtype"], record["method"]) for record in steps):
        chosen = [record for record in steps if (record["dtype"], record["method"]) == (dtype, method)]
        label = f"{dtype}, ResNet-{chosen[0]['depth']}: {method}"
        style = "-" if method == PUBLISHED else ":"
        axis.semilogy([r["step"] for r in chosen], [r["parameter_distance"] for r in chosen], style, label=label)
    axis.set_xlabel("step")
    axis.set_ylabel("distance / distance moved")
    fig.legend(loc="outside lower center", fontsize="small")
    return fig


if __name__ == "__main__":
    publish("published_package", partial(measure, tyro.cli(Options)), markdown, figure)
