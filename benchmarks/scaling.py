"""How does it scale? Images/s against batch size, runs trained together and devices; cost against classes and examples.

python -m benchmarks.scaling

SGD and ABSGD train a small ResNet on random images that live on the device, each batch drawn from them. One number is
increased, 4 times or more, until the next program would need more memory than there is (the compiler says what it needs
before anything is allocated) or a step takes long. Devices are real ones where there are as many, otherwise the CPU
split into them, in a process of its own, where they share its cores. From the times follows, by arithmetic, what 256
devices would need.
"""

import dataclasses
import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import tyro
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.progress import Progress

from benchmarks.harness import programs, steps
from benchmarks.harness.records import Record, publish, table
from examples.cifar_lt.augment import normalise
from examples.lab.errors import UserError

# Of the arithmetic, and assumed rather than measured: seconds for a message to reach a neighbour and be added (software
# included), and bytes/s of a device's link; 400 Gbit/s is what each GPU of an NVIDIA DGX H100 or H200 has.
HOP, LINK = 5e-6, 50e9
MANY = (1, 8, 64, 256)
GROWTH = {"batch_size": 4, "runs": 4, "classes": 100, "examples": 16}
TITLES = {
    "batch_size": "batch size",
    "runs": "runs trained together",
    "classes": "classes",
    "examples": "examples",
    "devices": "devices",
}
START = {"batch_size": 16, "runs": 1, "classes": 10, "examples": 1024}


@dataclasses.dataclass(frozen=True)
class Options:
    """Scaling."""

    depth: int = 8
    """Depth of the ResNet, 6n + 2."""
    width: int = 16
    """Channels of its first stage."""
    batch_size: int = 32
    """Examples in a batch, on each device, where the batch size is not what is varied."""
    sweeps: tuple[Literal["batch_size", "runs", "classes", "examples", "devices"], ...] = (
        "batch_size",
        "runs",
        "classes",
        "examples",
        "devices",
    )
    """What to vary."""
    devices: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of devices."""
    memory_gb: float | None = None
    """Memory to fill, in 10⁹ bytes; by default 90 % of what the device has, 2 where it does not say (a CPU)."""
    rounds: int = 7
    """Timings of each method."""
    most_seconds: float = 0.5
    """A number is not increased further once a step of SGD takes longer."""


class Setting(NamedTuple):
    """What is varied."""

    batch_size: int
    runs: int = 1
    classes: int = 10
    examples: int = 4096


class Run(NamedTuple):
    """A training run."""

    count: Any  # steps, from which the batches are drawn
    temperature: Any
    state: steps.State


# --- programs


def make_images(setting: Setting) -> tuple[jax.Array, jax.Array]:
    """Random images, some of them again and again, and random labels."""
    few = jax.random.bits(jax.random.key(0), (256, 32, 32, 3), jnp.uint8)
    labels = jax.random.randint(jax.random.key(1), (setting.examples,), 0, setting.classes)
    return jnp.resize(few, (setting.examples, *few.shape[1:])), labels


def training(options: Options, setting: Setting, name: str, devices: int = 1) -> Any:
    """``step(run, images, labels) -> run`` and ``init() -> run``, of a single run or of several at once.

    Of several devices the step is that of one, and the state that of all.
    """
    losses, init_network = steps.network(options.depth, options.width, setting.classes)

    def init_run(temperature, count):
        return Run(
            count, temperature, steps.first_state(steps.methods(temperature)[name], *init_network(), devices=devices)
        )

    def step(run, images, labels):
        places = jax.random.randint(
            jax.random.fold_in(jax.random.key(0), run.count), (setting.batch_size,), 0, len(labels)
        )
        take_step = steps.make_step(steps.methods(run.temperature)[name], losses, "data" if devices > 1 else None)
        return Run(run.count + 1, run.temperature, take_step(run.state, normalise(images[places]), labels[places]))

    if setting.runs == 1:
        return step, lambda: init_run(jnp.float32(steps.TEMPERATURE), jnp.int32(0))
    temperatures = jnp.linspace(1, 2, setting.runs) * steps.TEMPERATURE
    counts = jnp.arange(setting.runs) * 1_000_000
    return jax.vmap(step, (0, None, None)), lambda: jax.vmap(init_run)(temperatures, counts)


def data_parallel(options: Options, setting: Setting, name: str, devices: int) -> Any:
    """The same for several devices, each with its part of the images and of the batch."""
    step, init = training(options, setting, name, devices)
    # Each device has the statistics of its own part of the batch.
    specs = Run(P(), P(), steps.State(P(), P("data"), P(), P()))
    places = {"in_specs": (specs, P("data"), P("data")), "out_specs": specs}
    return jax.shard_map(step, mesh=programs.mesh(devices), **places), init


# --- results


def memory(options: Options) -> float:
    """Bytes that may be used."""
    if options.memory_gb is not None:
        return options.memory_gb * 1e9
    limits = jax.devices()[0].memory_stats() or {}
    return 0.9 * limits["bytes_limit"] if "bytes_limit" in limits else 2e9


def bytes_needed(alternatives: dict[str, programs.Program], images: Any) -> int:
    """Memory of the images, of all states, and of the program that needs most for itself."""
    states = sum(programs.nbytes(jax.eval_shape(program.init)) for program in alternatives.values())
    analyses = [program.compiled.memory_analysis() for program in alternatives.values()]
    own = max(a.temp_size_in_bytes + a.output_size_in_bytes - a.alias_size_in_bytes for a in analyses)
    return programs.nbytes(images) + states + own


def measure_setting(options: Options, setting: Setting, devices: int = 1) -> Record:
    """Compiles SGD and ABSGD and, if they fit into the memory, times them."""
    draw = partial(make_images, setting._replace(examples=setting.examples * devices))
    images = jax.eval_shape(draw)
    make = training if devices == 1 else partial(data_parallel, devices=devices)
    alternatives = {name: programs.compile_step(*make(options, setting, name), *images) for name in steps.methods(1.0)}
    parameters = sum(x.size for x in jax.tree.leaves(jax.eval_shape(alternatives["SGD"].init).state.params))
    record = {
        **setting._asdict(),
        "devices": devices,
        "depth": options.depth,
        "width": options.width,
        "parameters": parameters // setting.runs,
        "bytes_needed": bytes_needed(alternatives, images),
        "memory": memory(options),
        "platform": jax.default_backend(),
    }
    if record["bytes_needed"] > record["memory"]:
        return record | {"ended_by": "memory"}
    seconds, ratios = programs.time_ratios(
        alternatives, draw(), options.rounds, most_seconds=options.rounds * options.most_seconds
    )
    median, quartiles = programs.quartiles(ratios["ABSGD"])
    return record | {
        "seconds_per_step": seconds,
        "time_ratio": median,
        "time_ratio_quartiles": quartiles,
        "images_per_second": setting.batch_size * setting.runs * devices / seconds,
        "timings": len(ratios["ABSGD"]),
        "ended_by": "time" if seconds > options.most_seconds else None,
    }


def grow(options: Options, name: str) -> list[Record]:
    """The records of growing values of one number, the last of which says what ended it."""
    setting = Setting(options.batch_size)._replace(**{name: START[name]})
    records = []
    while not records or records[-1]["ended_by"] is None:
        records.append({"sweep": name} | measure_setting(options, setting))
        setting = setting._replace(**{name: getattr(setting, name) * GROWTH[name]})
    return records


def over_devices(options: Options) -> list[Record]:
    """A record for each number of devices; each has the same batch size."""
    setting = Setting(options.batch_size)
    return [{"sweep": "devices"} | measure_setting(options, setting, count) for count in options.devices]


def measure(options: Options) -> list[Record]:
    """A record for each value of each number that is varied."""
    records = []
    with Progress() as progress:
        for name in progress.track(options.sweeps, description="scaling"):
            if name == "devices":
                records += programs.on_devices(max(options.devices), over_devices, options)
            else:
                records += grow(options, name)
    if not any("time_ratio" in record for record in records):
        raise UserError(f"Nothing fits into {memory(options):.3g} bytes; give more with --memory-gb.")
    return records


# --- arithmetic


def all_reduce_seconds(devices: int, size: float) -> float:
    """Of ``size`` bytes on each device: up and down a tree of hops, and twice all bytes through a link."""
    return 2 * math.log2(devices) * HOP + 2 * (devices - 1) / devices * size / LINK


def projection(record: Record, devices: int) -> dict[str, float]:
    """Seconds of a step on many devices, from that of SGD on one."""
    gradients = all_reduce_seconds(devices, 4 * record["parameters"])
    numbers = all_reduce_seconds(devices, steps.MERGED * devices)
    sgd = record["seconds_per_step"]
    return {
        "gradients": gradients,
        "numbers": numbers,
        "sgd": sgd + gradients,
        "absgd": sgd + numbers + gradients,
        "sgd_hidden": max(sgd, gradients),  # all of it while the backward pass goes on: no program can do better
    }


def markdown(records: list[Record]) -> str:
    """A table for each number that was varied, and one of the arithmetic."""
    parts = []
    for name in dict.fromkeys(record["sweep"] for record in records):
        rows = []
        for record in (record for record in records if record["sweep"] == name):
            timed = "time_ratio" in record
            low, high = record["time_ratio_quartiles"] if timed else (0, 0)
            row = {
                TITLES[name]: f"{record[name]:,}",
                "images/s, SGD": f"{record['images_per_second']:,.0f}" if timed else "not run",
                "step of SGD, ms": f"{1e3 * record['seconds_per_step']:.3g}" if timed else "not run",
                "time of ABSGD / SGD (quartiles)": (
                    f"{record['time_ratio']:.3f} ({low:.3f} to {high:.3f})" if timed else "not run"
                ),
                "memory, MB": f"{record['bytes_needed'] / 1e6:,.0f}",
                "": f"the last: {record['ended_by']}" if record["ended_by"] else "",
            }
            rows.append(row)
        parts.append(table(rows))
    if base := reference(records):
        parts.append(arithmetic(base))
    first = records[0]
    network = f"ResNet-{first['depth']}, {first['width']} channels in its first stage"
    parts.append(f"{network}. Memory: of {first['memory'] / 1e9:.3g} GB. Several devices on a CPU share its cores.")
    return "\n\n".join(parts)


def reference(records: list[Record]) -> Record | None:
    """The batch with the shortest step on one device: where a collective costs most."""
    timed = [record for record in records if record["sweep"] == "batch_size" and "time_ratio" in record]
    return min(timed, key=lambda record: record["seconds_per_step"], default=None)


def arithmetic(record: Record) -> str:
    """What many such devices would need: calculated, not measured."""
    rows = []
    for devices in MANY:
        of = projection(record, devices)
        rows.append(
            {
                "devices (calculated)": str(devices),
                "all-reduce of the gradients, µs": f"{1e6 * of['gradients']:.1f}",
                "of ABSGD's numbers, µs": f"{1e6 * of['numbers']:.1f}",
                "step of SGD, ms": f"{1e3 * of['sgd']:.4g}",
                "time of ABSGD / SGD": f"{of['absgd'] / of['sgd']:.4f}",
                "the same, if its all-reduce were hidden": f"{1 + of['numbers'] / of['sgd_hidden']:.4f}",
            }
        )
    return (
        f"{table(rows)}\n\nFrom the shortest measured step, {record['batch_size']} examples on one device "
        f"({1e3 * record['seconds_per_step']:.4g} ms of SGD, {record['parameters']:,} parameters), and "
        f"assumed {HOP * 1e6:g} µs a hop and {LINK / 1e9:g} GB/s a link; what ABSGD costs on one device is not in it. "
        f"Its collective costs {MANY[-1]} devices 1 % of a step of {1e5 * of['numbers']:.2g} ms, whatever the size "
        "of the network."
    )


def figure(records: list[Record]) -> Figure:
    """Images/s above, the time of ABSGD relative to SGD below, against each number that was varied."""
    timed = [record for record in records if "time_ratio" in record]
    names = list(dict.fromkeys(record["sweep"] for record in timed))
    size, layout = (3 * len(names), 5), "constrained"
    fig, axes = plt.subplots(2, len(names), figsize=size, layout=layout, squeeze=False, sharex="col", sharey="row")
    for name, (above, below) in zip(names, axes.T, strict=True):
        chosen = [record for record in timed if record["sweep"] == name]
        values = [record[name] for record in chosen]
        above.semilogx(values, [record["images_per_second"] for record in chosen], marker="o")
        below.semilogx(values, [record["time_ratio"] for record in chosen], marker="o")
        below.fill_between(values, *zip(*(r["time_ratio_quartiles"] for r in chosen), strict=True), alpha=0.3)
        below.axhline(1, color="black", lw=1)
        below.set_xlabel(TITLES[name])
        below.set_xticks(values, [EngFormatter(places=0, sep="")(value) for value in values])
        below.minorticks_off()
    axes[0][0].set_ylim(0)
    axes[0][0].set_ylabel("images/s")
    axes[1][0].set_ylabel("time of ABSGD / SGD")
    return fig


if __name__ == "__main__":
    publish("scaling", partial(measure, tyro.cli(Options)), markdown, figure)
