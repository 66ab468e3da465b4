"""What does a step cost? SGD against ABSGD, the mini-batch softmax, RECOVER and META on three networks.

python -m benchmarks.step_cost

FLOPs, bytes and memory are the compiler's figures of one step on one device. Collectives are those of SGD's and ABSGD's
step compiled for 8 data-parallel devices: real ones where there are as many, otherwise the CPU split into 8, in a
process of its own. Times are ratios to the step of SGD that ran in the same round.
"""

import dataclasses
from collections.abc import Callable
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
from benchmarks.harness.steps import Method, State, cross_entropy, first_state, make_step
from examples.cifar_lt.task import precision
from examples.lab.methods import Batch
from examples.lab.methods.absgd import Absgd
from examples.lab.methods.look_ahead import Meta
from examples.lab.methods.recover import Recover

DEVICES = 8
CLASSES = 10
SLOW = ("RECOVER", "META")  # two and more gradients a step: there is nothing to measure to 0.5 %
COMPARED = ("flops", "bytes", "temporary_bytes")


@dataclasses.dataclass(frozen=True)
class Options:
    """Cost of a step."""

    models: tuple[Literal["MLP", "ResNet", "transformer"], ...] = ("MLP", "ResNet", "transformer")
    """Networks to measure."""
    batch_size: int = 128
    """Examples in a batch."""
    depth: int = 32
    """Depth of the ResNet, 6n + 2."""
    hidden: int = 256
    """Units of the MLP's two hidden layers."""
    embedding: int = 896
    """Channels of the transformer block, which has 12 times their square of parameters."""
    tokens: int = 8
    """Length of the transformer's sequences."""
    rounds: int = 200
    """Timings of each method at most; a quarter of them for RECOVER and META."""
    most_seconds: float = 15.0
    """Fewer timings, but at least three, where those of SGD would take longer."""


# --- networks


class Problem(NamedTuple):
    """A network and a batch for it."""

    losses: Callable[..., tuple[jax.Array, Any]]  # (params, stats, x, labels) -> (one per example, stats)
    params: Any
    stats: Any  # of batch normalisation; of each device its own
    batch: tuple[jax.Array, ...]  # images and labels, and again images and labels, held out for META


def random_batch(size: int, *shape: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(1), 4)
    x, held_out = (jax.random.normal(key, (size, *shape)) for key in keys[:2])
    y, held_out_y = (jax.random.randint(key, (size,), 0, CLASSES) for key in keys[2:])
    return x, y, held_out, held_out_y


def dense(key: jax.Array, before: int, after: int) -> jax.Array:
    return jax.random.normal(key, (before, after)) / before**0.5


def mlp(options: Options) -> Problem:
    sizes = (784, options.hidden, options.hidden, CLASSES)
    keys = jax.random.split(jax.random.key(0), 3)
    layers = [(dense(*args), jnp.zeros(args[2])) for args in zip(keys, sizes, sizes[1:], strict=False)]

    def losses(layers, stats, x, labels):
        for kernel, bias in layers[:-1]:
            x = jax.nn.relu(x @ kernel + bias)
        kernel, bias = layers[-1]
        return cross_entropy(x @ kernel + bias, labels), stats

    return Problem(losses, layers, None, random_batch(options.batch_size, sizes[0]))


def resnet(options: Options) -> Problem:
    losses, init = steps.network(options.depth, 16, CLASSES)
    params, stats = init()
    return Problem(losses, params, stats, random_batch(options.batch_size, 32, 32, 3))


def transformer(options: Options) -> Problem:
    """One block before a linear classifier of its mean."""
    size = options.embedding
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = {"qkv": (size, 3 * size), "out": (size, size), "up": (size, 4 * size), "down": (4 * size, size)}
    shapes["classifier"] = (size, CLASSES)
    params = {name: dense(key, *shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}

    def losses(params, stats, x, labels):
        x = x.astype(precision())
        w = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)
        heads = jnp.reshape(jax.nn.standardize(x) @ w["qkv"], (*x.shape[:2], 3, -1, 64))
        attended = jax.nn.dot_product_attention(*jnp.moveaxis(heads, 2, 0))
        x = x + attended.reshape(x.shape) @ w["out"]
        x = x + jax.nn.gelu(jax.nn.standardize(x) @ w["up"]) @ w["down"]
        return cross_entropy(jnp.mean(x, axis=1, dtype=jnp.float32) @ params["classifier"], labels), stats

    return Problem(losses, params, None, random_batch(options.batch_size, options.tokens, size))


MODELS = {"MLP": mlp, "ResNet": resnet, "transformer": transformer}


# --- methods


def of(method: Any) -> Method:
    """A method of the examples, on one device."""

    def gradient(losses, params, kept, batch, axis_name):
        del axis_name
        of_batch = lambda params, batch: losses(params, batch.inputs, batch.labels)  # noqa: E731
        seen, held_out = (Batch(x, labels, jnp.ones(len(labels))) for x, labels in (batch[:2], batch[2:]))
        grads, kept, info = method.gradient(of_batch, params, kept, seen, held_out)
        return grads, kept, info.aux

    return Method(partial(method.init, size=(0, CLASSES)), gradient)


SPREAD = steps.methods(steps.TEMPERATURE)  # over devices too
METHODS = SPREAD | {
    "mini-batch softmax": of(Absgd(steps.TEMPERATURE, gamma=1.0)),
    "RECOVER": of(Recover(steps.TEMPERATURE)),
    "META": of(Meta(rate=steps.RATE)),
}


def on_each_device(step: Callable[..., State], count: int) -> Callable[..., State]:
    """A data-parallel step: all but the statistics is the same on all devices, the batch is spread over them."""
    specs = State(P(), P("data"), P(), P())
    return jax.shard_map(step, mesh=programs.mesh(count), in_specs=(specs, P("data"), P("data")), out_specs=specs)


# --- results


def collectives(options: Options) -> dict[tuple[str, str], Record]:
    """Those of the data-parallel step, for each model and each method that is spread."""
    found = {}
    for model in options.models:
        problem = MODELS[model](options)
        for name, method in SPREAD.items():
            step = on_each_device(make_step(method, problem.losses, "data"), DEVICES)
            init = partial(first_state, method, problem.params, problem.stats, DEVICES)
            met = programs.collectives(programs.compile_step(step, init, *problem.batch[:2]).compiled)
            found[model, name] = {
                "collectives": len(met),
                "collectives_before_backward": sum(c.before_backward for c in met),
                "collective_bytes": [c.bytes for c in met],
            }
    return found


def measure(options: Options) -> list[Record]:
    """A record for every model and method."""
    meetings = programs.on_devices(DEVICES, collectives, options)
    records = []
    with Progress() as progress:
        for model in progress.track(options.models, description="cost of a step"):
            problem = MODELS[model](options)
            compiled = {
                name: programs.compile_step(
                    make_step(method, problem.losses),
                    partial(first_state, method, problem.params, problem.stats),
                    *problem.batch,
                )
                for name, method in METHODS.items()
            }
            seconds, ratios = programs.time_ratios(
                compiled, problem.batch, options.rounds, rarely=SLOW, most_seconds=options.most_seconds
            )
            base = cost_of(compiled["SGD"])
            for method, step in compiled.items():
                cost = cost_of(step)
                median, quartiles = programs.quartiles(ratios[method])
                records.append(
                    {
                        "model": f"ResNet-{options.depth}" if model == "ResNet" else model,
                        "method": method,
                        **{f"{name}_ratio": cost[name] / base[name] for name in COMPARED},
                        "time_ratio": median,
                        "time_ratio_quartiles": quartiles,
                        "compile_seconds": step.compile_seconds,
                        "extra_state_bytes": cost["state_bytes"] - base["state_bytes"],
                        **meetings.get((model, method), {}),
                        **{name: cost[name] for name in COMPARED},
                        "seconds_of_baseline": seconds,
                        "timings": len(ratios[method]),
                        "parameters": sum(leaf.size for leaf in jax.tree.leaves(problem.params)),
                        "batch_size": options.batch_size,
                        "platform": jax.default_backend(),
                    }
                )
    return records


def cost_of(step: programs.Program) -> dict[str, float]:
    return programs.figures(step.compiled) | {"state_bytes": programs.nbytes(jax.eval_shape(step.init))}


def targets(records: list[Record]) -> list[tuple[str, str, float, float]]:
    """Of ABSGD: the model, what is aimed at, the figure and its bound."""
    rows = []
    for methods in by_model(records).values():
        sgd, absgd = methods["SGD"], methods["ABSGD"]
        slower = 1.02 if absgd["platform"] == "cpu" else 1.01
        rows += [
            (absgd["model"], "FLOPs / SGD's", absgd["flops_ratio"], 1.001),
            (absgd["model"], "bytes accessed / SGD's", absgd["bytes_ratio"], 1.005),
            (absgd["model"], "time / SGD's, median", absgd["time_ratio"], slower),
            (absgd["model"], "bytes of state beyond SGD's", absgd["extra_state_bytes"], 20),
            (absgd["model"], "collectives between the passes", absgd["collectives_before_backward"], 1),
            (absgd["model"], "collectives beyond SGD's", absgd["collectives"] - sgd["collectives"], 1),
            (
                absgd["model"],
                "bytes of collectives beyond SGD's",
                sum(absgd["collective_bytes"]) - sum(sgd["collective_bytes"]),
                steps.MERGED * DEVICES,
            ),
        ]
    return rows


def by_model(records: list[Record]) -> dict[str, dict[str, Record]]:
    """The records of each model by method."""
    models: dict[str, dict[str, Record]] = {}
    for record in records:
        models.setdefault(record["model"], {})[record["method"]] = record
    return models


def markdown(records: list[Record]) -> str:
    """The targets and what was measured, then all methods."""
    aims = [
        {
            "ABSGD": aim,
            "model": model,
            "target": f"≤ {bound:g}",
            "measured": f"{value:.6g}",
            "": "met" if value <= bound else "missed",
        }
        for model, aim, value, bound in targets(records)
    ]
    rows = []
    for record in records:
        middle, (low, high) = record["time_ratio"], record["time_ratio_quartiles"]
        row = {
            "model": f"{record['model']}, {record['parameters']:,} parameters",
            "method": record["method"],
            "FLOPs": f"{record['flops_ratio']:.4f}",
            "bytes": f"{record['bytes_ratio']:.4f}",
            "temporary memory": f"{record['temporary_bytes_ratio']:.4f}",
            "time (quartiles)": f"{middle:.3f} ({low:.3f} to {high:.3f})",
            "compiling, s": "–" if record["compile_seconds"] is None else f"{record['compile_seconds']:.1f}",
            "extra state, bytes": f"{record['extra_state_bytes']:,}",
            "collectives (between the passes)": (
                f"{record['collectives']} ({record['collectives_before_backward']})" if "collectives" in record else "–"
            ),
        }
        rows.append(row)
    seconds = EngFormatter("s", places=1)
    base = "; ".join(f"{model} {seconds(m['SGD']['seconds_of_baseline'])}" for model, m in by_model(records).items())
    scalings = "; ".join(
        f"{model} {m['SGD']['parameters'] / m['SGD']['flops']:.3%}" for model, m in by_model(records).items()
    )
    return (
        f"{table(aims)}\n\nABSGD scales the gradient by a number, which is one FLOP for each parameter. Of "
        f"SGD's FLOPs that is: {scalings}.\n\n{table(rows)}\n\nRatios to SGD in the same run, batches of "
        f"{records[0]['batch_size']}; a step of SGD takes: {base}. Collectives over {DEVICES} devices."
    )


def figure(records: list[Record]) -> Figure:
    """Time, FLOPs and bytes relative to SGD, a panel for each model."""
    models = by_model(records)
    fig, axes = plt.subplots(1, len(models), figsize=(4 * len(models), 3.5), layout="constrained", squeeze=False)
    for axis, (model, methods) in zip(axes[0], models.items(), strict=True):
        others = list(methods.values())[1:]
        for i, (name, label) in enumerate([("time", "time"), ("flops", "FLOPs"), ("bytes", "bytes")]):
            places = [j + (i - 1) / 4 for j in range(len(others))]
            axis.barh(places, [other[f"{name}_ratio"] for other in others], 0.22, label=label, color=f"C{i}")
        axis.set_yticks(range(len(others)), [other["method"] for other in others])
        axis.invert_yaxis()
        axis.axvline(1, color="black", lw=1)
        axis.set_title(model)
        axis.set_xlabel("relative to SGD")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


if __name__ == "__main__":
    publish("step_cost", partial(measure, tyro.cli(Options)), markdown, figure)
