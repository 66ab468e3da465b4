"""What do micro-batches and devices change? The gradient not at all, memory for the better, time hardly.

python -m benchmarks.microbatch

An MLP whose activations are most of what it needs. Errors are those of the risk and of the whole gradient (Euclidean
norms), relative to the full batch in float64, next to what averaging the parts' gradients would give. Memory is the
compiler's figure for each device. Devices are real ones where there are as many, otherwise the CPU split into them, in
a process of its own. Times, on one device, are ratios to plain accumulation (the mean of the micro-batches' gradients)
in the same round.
"""

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from rich.progress import Progress

import absgd_jax
from benchmarks.harness import programs
from benchmarks.harness.records import Record, publish, table
from examples import style
from examples.lab.errors import UserError

INPUTS, CLASSES, TEMPERATURE, RATE = 64, 10, 0.1, 1e-4
ROUNDING = 1e-5  # what float32 sums of thousands of numbers may be off by


@dataclasses.dataclass(frozen=True)
class Options:
    """Micro-batches and devices."""

    batch_size: int = 4096
    """Examples in a batch."""
    layers: int = 8
    """Hidden layers of the MLP."""
    width: int = 256
    """Units of each hidden layer."""
    microbatches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of micro-batches; on several devices each device takes as many."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices."""
    rounds: int = 40
    """Timings of each number of micro-batches."""


def make_params(options: Options) -> list[np.ndarray]:
    rng, sizes = np.random.default_rng(0), (INPUTS, *[options.width] * options.layers, CLASSES)
    return [rng.standard_normal(shape, np.float32) * shape[0] ** -0.5 for shape in pairwise(sizes)]


def make_batch(options: Options) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.standard_normal((options.batch_size, INPUTS), np.float32), rng.integers(
        CLASSES, size=options.batch_size
    ).astype(np.int32)


def per_example_loss(params: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
    *hidden, last = params
    for kernel in hidden:
        x = jnp.tanh(x @ kernel)  # smooth: the kink of a ReLU would tell float32 from float64
    return optax.softmax_cross_entropy_with_integer_labels(x @ last, labels)


# --- exactness and memory


@cache
def reference(options: Options, parts: int = 1) -> tuple[float, np.ndarray]:
    """The mean of the risks of some equal parts, and its gradient, in float64 and by the formula as it stands."""

    def risk(params, x, labels):
        losses = per_example_loss(params, x, labels).reshape(parts, -1)
        risks = TEMPERATURE * jax.nn.logsumexp(losses / TEMPERATURE, axis=1, b=1 / losses.shape[1])
        return jnp.mean(risks)

    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (make_params(options), make_batch(options)[0]))
        value, grads = jax.jit(jax.value_and_grad(risk))(*wide, make_batch(options)[1])
        return float(value), flat(grads)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def distance(grads: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(grads - exact) / np.linalg.norm(exact))


def exactness(options: Options) -> list[Record]:
    """Errors and memory for each number of devices and micro-batches."""
    params, batch = make_params(options), make_batch(options)
    risk, exact = reference(options)
    records = []
    for devices in options.devices:
        for number in options.microbatches:
            risk_and_grad = partial(
                absgd_jax.value_and_grad(
                    per_example_loss, num_microbatches=number, axis_name="data" if devices > 1 else None
                ),
                temperature=TEMPERATURE,
            )
            if devices > 1:
                specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P()}
                risk_and_grad = jax.shard_map(risk_and_grad, mesh=programs.mesh(devices), **specs)
            with jax.default_matmul_precision("highest"):  # GPUs round float32 products to fewer bits unless told
                compiled = jax.jit(risk_and_grad).lower(params, *batch).compile()
            value, grads = compiled(params, *batch)
            parts = devices * number
            records.append(
                {
                    "microbatches": number,
                    "devices": devices,
                    "risk_error": abs(float(value) / risk - 1),
                    "gradient_error": distance(flat(grads), exact),
                    "averaging_error": distance(reference(options, parts)[1], exact),
                    "gradient_bytes": programs.nbytes(params),
                    "temporary_bytes": programs.figures(compiled)["temporary_bytes"],
                    "platform": jax.default_backend(),
                }
            )
    return records


# --- time


def accumulate(number: int) -> Callable[..., Any]:
    """The gradient of the mean loss, micro-batch by micro-batch."""

    def mean_loss(params, *batch):
        return jnp.mean(per_example_loss(params, *batch))

    def gradient(params, *batch):
        def add(total, part):
            return jax.tree.map(lambda a, b: a + b / number, total, jax.grad(mean_loss)(params, *part)), None

        if number == 1:
            return jax.grad(mean_loss)(params, *batch)
        parts = jax.tree.map(lambda x: x.reshape(number, -1, *x.shape[1:]), batch)
        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)[0]

    return gradient


def merge(number: int) -> Callable[..., Any]:
    """The gradient of the risk, micro-batch by micro-batch."""
    risk_and_grad = absgd_jax.value_and_grad(per_example_loss, num_microbatches=number)
    return lambda params, *batch: risk_and_grad(params, *batch, temperature=TEMPERATURE)[1]


def descend(gradient: Callable[..., Any]) -> Callable[..., Any]:
    """A step along a gradient."""
    return lambda params, *batch: jax.tree.map(lambda w, g: w - RATE * g, params, gradient(params, *batch))


def overhead(options: Options, number: int) -> Record:
    """Time and memory relative to plain accumulation."""
    batch = tuple(map(jnp.asarray, make_batch(options)))
    init = lambda: list(map(jnp.asarray, make_params(options)))  # noqa: E731
    gradients = {"mean": accumulate(number), "risk": merge(number)}
    steps = {name: programs.compile_step(descend(gradient), init, *batch) for name, gradient in gradients.items()}
    seconds, ratios = programs.time_ratios(steps, batch, options.rounds)
    median, quartiles = programs.quartiles(ratios["risk"])
    plain, merged = (programs.figures(step.compiled)["temporary_bytes"] for step in steps.values())
    return {
        "time_ratio": median,
        "time_ratio_quartiles": quartiles,
        "plain_temporary_bytes": plain,
        "temporary_bytes_ratio": merged / plain,
        "seconds_of_mean": seconds,
        "timings": len(ratios["risk"]),
    }


# --- results


def measure(options: Options) -> list[Record]:
    """A record for each number of devices and micro-batches; times on one device."""
    if 1 not in options.devices or len(options.microbatches) < 2:
        raise UserError(
            f"--devices {options.devices} --microbatches {options.microbatches}: 1 device and two numbers of "
            "micro-batches are needed, to compare with."
        )
    here = tuple(count for count in options.devices if count <= jax.device_count())
    elsewhere = tuple(count for count in options.devices if count not in here)
    records = exactness(dataclasses.replace(options, devices=here))
    if elsewhere:
        records += programs.on_devices(max(elsewhere), exactness, dataclasses.replace(options, devices=elsewhere))
    with Progress() as progress:
        for record in progress.track(records, description="micro-batches"):
            record |= {"batch_size": options.batch_size, "layers": options.layers, "width": options.width}
            if record["devices"] == 1:
                record |= overhead(options, record["microbatches"])
    return records


def by_devices(records: list[Record]) -> dict[int, list[Record]]:
    """The records of each number of devices, in the order of their micro-batches."""
    counts = sorted({record["devices"] for record in records})
    ordered = sorted(records, key=lambda record: record["microbatches"])
    return {count: [record for record in ordered if record["devices"] == count] for count in counts}


def markdown(records: list[Record]) -> str:
    """The targets, then all figures."""
    series = by_devices(records)
    alone = series[1]
    falls = [
        after["temporary_bytes"] / before["temporary_bytes"]
        for of_count in series.values()
        for before, after in pairwise(of_count)
        if before["temporary_bytes"] > 1.05 * before["gradient_bytes"]
    ]
    aims = [
        ("largest relative error of the risk", max(r["risk_error"] for r in records), "≤", ROUNDING),
        ("largest relative error of the gradient", max(r["gradient_error"] for r in records), "≤", ROUNDING),
        ("memory after / before doubling the micro-batches, until gradients are all of it", max(falls), "<", 1),
        *((f"time / plain accumulation, {r['microbatches']} micro-batches", r["time_ratio"], "≤", 1.02) for r in alone),
    ]
    rows = []
    for name, value, relation, bound in aims:
        met = value < bound if relation == "<" else value <= bound
        row = {"": name, "target": f"{relation} {bound:g}", "measured": f"{value:.4g}", " ": "met" if met else "missed"}
        rows.append(row)
    figures = []
    for record in (r for of_count in series.values() for r in of_count):
        row = {
            "devices": str(record["devices"]),
            "micro-batches": str(record["microbatches"]),
            "error of the risk": f"{record['risk_error']:.1e}",
            "of the gradient": f"{record['gradient_error']:.1e}",
            "of averaged gradients": f"{record['averaging_error']:.1e}",
            "memory of a device, MB": f"{record['temporary_bytes'] / 1e6:.1f}",
            "of plain accumulation": "–",
            "time / plain accumulation (quartiles)": "–",
        }
        if "time_ratio" in record:
            low, high = record["time_ratio_quartiles"]
            row["of plain accumulation"] = f"{record['plain_temporary_bytes'] / 1e6:.1f}"
            row["time / plain accumulation (quartiles)"] = f"{record['time_ratio']:.3f} ({low:.3f} to {high:.3f})"
        figures.append(row)
    return (
        f"{table(rows)}\n\n{table(figures)}\n\nAn MLP of {records[0]['layers']} layers of {records[0]['width']} "
        f"units, {records[0]['batch_size']} examples; errors against float64."
    )


def figure(records: list[Record]) -> Figure:
    """Memory, errors and time against the number of micro-batches."""
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    for count, of_count in by_devices(records).items():
        label = f"{count} device{'s' if count > 1 else ''}"
        numbers = [record["microbatches"] for record in of_count]
        axes[0].loglog(numbers, [record["temporary_bytes"] / 1e6 for record in of_count], marker="o", label=label)
        axes[1].loglog(numbers, [record["gradient_error"] for record in of_count], marker="o", label=label)
        if count == 1:
            averaged = [(record["microbatches"], record["averaging_error"]) for record in of_count[1:]]
            axes[1].loglog(*zip(*averaged, strict=True), color=style.SGD, ls="--", label="averaged")
            low, high = zip(*(record["time_ratio_quartiles"] for record in of_count), strict=True)
            axes[2].semilogx(numbers, [record["time_ratio"] for record in of_count], marker="o")
            axes[2].fill_between(numbers, low, high, alpha=0.3)
            axes[2].axhline(1.02, color=style.SGD, ls="--")
    axes[0].set_ylabel("memory of a device, MB")
    axes[1].set_ylabel("relative error of the gradient")
    axes[2].set_ylabel("time / plain accumulation")
    axes[1].legend()
    for axis in axes:
        axis.set_xlabel("micro-batches")
        numbers = sorted({record["microbatches"] for record in records})
        axis.set_xticks(numbers, [str(number) for number in numbers])
        axis.minorticks_off()
    return fig


if __name__ == "__main__":
    publish("microbatch", partial(measure, tyro.cli(Options)), markdown, figure)
