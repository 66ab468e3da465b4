"""How many cores feed the accelerators? Images/s that a core decodes, and those that 8 GPUs and a pod have taken.

python -m benchmarks.photographs

The examples' input pipeline decodes two photographs that come with scikit-learn, packed as training images of
ImageNet-LT are, on one core and on all (Linux only: it lets a process choose its cores). What accelerators take is
not measured: others have published it. The time of the collectives is arithmetic, as in the benchmark of scaling.
"""

import dataclasses
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib.pyplot as plt
import numpy as np
import sklearn.datasets
import tyro
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import track

from benchmarks.harness.records import Record, publish, table
from benchmarks.harness.steps import MERGED
from benchmarks.scaling import HOP, LINK, all_reduce_seconds
from examples import style
from examples.imagenet_lt.data import Packed, pack
from examples.imagenet_lt.resnet import ResNet
from examples.imagenet_lt.task import Photographs
from examples.lab.input_pipeline import stream
from examples.lab.task import Split

NVIDIA = "https://catalog.ngc.nvidia.com/orgs/nvidia/teams/dle/resources/resnet_mxnet/performance"
SIDE = 256  # of which training takes a random part of 224 pixels


class Published(NamedTuple):
    """What a ResNet-50 was trained with."""

    devices: int
    images_per_second: float
    batch_size: int  # on each device
    source: str


PUBLISHED = {
    # 90 epochs of 1,281,167 images in 1.14 hours.
    "8 A100": Published(
        8,
        90 * 1_281_167 / (1.14 * 3600),
        512,
        f"[NVIDIA]({NVIDIA}), mixed precision",
    ),
    "a pod of 1,024 TPU v3": Published(
        1024, 1.05e6, 32, "[Ying et al. 2018](https://arxiv.org/abs/1811.06992), batch of 32,768"
    ),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Decoding."""

    batch_size: int = 64
    """Images in a batch."""
    batches: int = 10
    """Batches of each timing."""
    rounds: int = 5
    """Timings of each number of cores."""


@contextmanager
def on(cores: set[int]) -> Iterator[None]:
    """With no more than these cores, for this thread and those that it starts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def images_per_second(split: Split, order: np.ndarray) -> float:
    began = time.perf_counter()
    for _ in stream(Photographs(dataset="imagenet-lt"), split, order):
        pass
    return order.size / (time.perf_counter() - began)


def measure(options: Options) -> list[Record]:
    """A record for each number of cores."""
    photographs = sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))
    labels = np.zeros(options.batch_size, np.int32)
    names = [photographs[i % len(photographs)].name for i in range(len(labels))]
    cores = sorted(os.sched_getaffinity(0))
    numbers = sorted({1, len(cores)})
    rates: dict[int, list[float]] = {number: [] for number in numbers}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photographs.array_record"
        pack(names, labels, photographs[0].parent, path, skip_broken=False)
        split, order = Split(Packed(path, SIDE, SIDE), labels), np.tile(np.arange(len(labels)), (options.batches, 1))
        for _ in track(range(options.rounds), "decoding"):
            for number in numbers:
                with on(set(cores[:number])):
                    rates[number].append(images_per_second(split, order))
    common = {
        "image_bytes": statistics.mean(path.stat().st_size for path in photographs),
        "parameters": parameters(),
        "batch_size": options.batch_size,
    }
    return [
        {"cores": number, "images_per_second": statistics.median(rates[number]), "all": rates[number], **common}
        for number in numbers
    ]


def parameters() -> int:
    """Of a ResNet-50 for the 1,000 classes of ImageNet."""
    network = nnx.eval_shape(lambda: ResNet(50, 1000, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))


def markdown(records: list[Record]) -> str:
    """What was measured, and what follows for those who were published."""
    measured = [
        {
            "cores": str(r["cores"]),
            "images/s": f"{r['images_per_second']:.0f}",
            "for each core": f"{r['images_per_second'] / r['cores']:.0f}",
        }
        for r in records
    ]
    last, rows = records[-1], []
    for name, of in PUBLISHED.items():
        step = of.batch_size * of.devices / of.images_per_second
        gradients = all_reduce_seconds(of.devices, 4 * last["parameters"])
        numbers = all_reduce_seconds(of.devices, MERGED * of.devices)
        rows.append(
            {
                "accelerators": name,
                "images/s, published": f"{of.images_per_second:,.0f}",
                "cores that decode as many": f"{cores_for(last, of.images_per_second):,.0f}",
                "JPEG files, GB/s": f"{of.images_per_second * last['image_bytes'] / 1e9:.1f}",
                "step, ms": f"{1e3 * step:.0f}",
                "all-reduce of the gradients, ms": f"{1e3 * gradients:.1f}",
                "of ABSGD's numbers, ms": f"{1e3 * numbers:.2f}",
                "part of the step": f"{numbers / step:.2%}",
                "source": of.source,
            }
        )
    return (
        f"{table(measured)}\n\n{table(rows)}\n\n"
        f"Photographs of 640 × 427 pixels and {last['image_bytes'] / 1e3:.0f} kB, their shorter side resized to {SIDE} "
        f"pixels. Collectives: {HOP * 1e6:g} µs a hop and {LINK / 1e9:g} GB/s a link, assumed; "
        f"a ResNet-50 has {last['parameters']:,} parameters."
    )


def cores_for(record: Record, rate: float) -> float:
    """Cores that decode so many images a second, if they are like those of a record."""
    return rate / (record["images_per_second"] / record["cores"])


def figure(records: list[Record]) -> Figure:
    """Images/s against the number of cores, carried on as a line."""
    fig, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    last = records[-1]
    most = 1.5 * cores_for(last, max(of.images_per_second for of in PUBLISHED.values()))
    line = np.geomspace(1, most, 50)
    axis.loglog(line, line * last["images_per_second"] / last["cores"], color=style.SGD, lw=1, label="calculated")
    axis.loglog(
        [r["cores"] for r in records],
        [r["images_per_second"] for r in records],
        "o",
        color=style.ABSGD,
        label="measured",
    )
    for name, of in PUBLISHED.items():
        axis.axhline(of.images_per_second, color=style.SGD, lw=0.5, ls=":")
        axis.annotate(name, (1, of.images_per_second), xytext=(2, 2), textcoords="offset points", fontsize=8)
    axis.set_xlabel("cores")
    axis.set_ylabel("images/s")
    axis.legend(loc="lower right")
    return fig


if __name__ == "__main__":
    publish("photographs", partial(measure, tyro.cli(Options)), markdown, figure)
