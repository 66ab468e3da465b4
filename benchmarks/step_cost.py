"""What does a step cost? SGD against ABSGD, the mini-batch softmax, RECOVER and META on three networks.

python -m benchmarks.step_cost

FLOPs, bytes and memory are the compiler's figures of one step on one device. Collectives are those of the step compiled
for 8 data-parallel devices: real ones where there are as many, otherwise the CPU split into 8, in a process of its own.
Times are ratios to the step of SGD that ran in the same round.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import optax
import tyro
from flax import nnx
from jax.sharding import PartitionSpec as P
from rich.progress import Progress

import absgd_jax
from benchmarks import programs
from benchmarks.records import Record, publish, table
from examples.cifar_lt.models import ResNet
from examples.cifar_lt.task import precision
from examples.lab.methods.look_ahead import jamal
from examples.lab.methods.recover import Recover

matplotlib.use("Agg")

DEVICES = 8
CLASSES, TEMPERATURE, RATE, MOMENTUM, DECAY = 10, 1.0, 1e-4, 0.9, 5e-4
SLOW = ("RECOVER", "META")  # two and more gradients a step: there is nothing to measure to 0.5 %
COMPARED = ("flops", "bytes", "temporary_bytes")
RECOVER = Recover(TEMPERATURE)
NUMBERS = 3 * 4 * DEVICES  # bytes of the collective that merges the devices' risks: three numbers of each


@dataclasses.dataclass(frozen=True)
class Options:
    """Cost of a step."""

    models: tuple[str, ...] = ("MLP", "ResNet", "transformer")
    """Networks to measure."""
    methods: tuple[str, ...] = ("SGD", "ABSGD", "mini-batch softmax", "RECOVER", "META")
    """Methods to measure; the first is what the others are compared with."""
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


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


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


def network(depth: int, width: int, classes: int) -> tuple[Callable[..., Any], Callable[[], Any]]:
    """The losses of a ResNet, and what makes its parameters and statistics."""

    def make_model():
        return ResNet(depth, classes, width=width, dtype=precision(), rngs=nnx.Rngs(0))

    def init():
        return nnx.split(make_model(), nnx.Param, nnx.BatchStat)[1:]

    graphdef, *_ = nnx.split(nnx.eval_shape(make_model), nnx.Param, nnx.BatchStat)

    def losses(params, stats, x, labels):
        model = nnx.merge(graphdef, params, stats, copy=True)
        return cross_entropy(model(x, train=True), labels), nnx.state(model, nnx.BatchStat)

    return losses, init


def resnet(options: Options) -> Problem:
    losses, init = network(options.depth, 16, CLASSES)
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


class State(NamedTuple):
    """All that a step changes."""

    params: Any
    stats: Any
    optimizer: Any
    method: Any = None  # what a method keeps beside its optimizer's state


class Method(NamedTuple):
    """``gradient(losses, state, batch, axis_name)`` gives the objective, new stats, the gradient and ``state.method``.

    ``losses(params, x, labels)`` returns those of the examples and new stats. With an axis name it is called on one of
    several devices, over which the batch is spread.
    """

    gradient: Callable[..., tuple[jax.Array, Any, Any, Any]]
    optimizer: optax.GradientTransformationExtraArgs = absgd_jax.absgd(RATE, jnp.inf)
    init: Callable[[Any], Any] = lambda params: None


def varying(params: Any, axis_name: str | None) -> Any:
    """So that each device has a gradient of its own: that of what is the same everywhere would be summed over them."""
    return params if axis_name is None else jax.lax.pcast(params, axis_name, to="varying")


def mean_over(tree: Any, axis_name: str | None) -> Any:
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def sgd(losses, state, batch, axis_name, weights: Any = 1):
    def mean(params):
        each, stats = losses(params, *batch[:2])
        return jnp.mean(weights * each), stats

    (value, stats), grads = jax.value_and_grad(mean, has_aux=True)(varying(state.params, axis_name))
    value, grads = mean_over((value, grads), axis_name)
    return value, stats, grads, None


def absgd(losses, state, batch, axis_name):
    risk_and_grad = absgd_jax.value_and_grad(losses, has_aux=True, axis_name=axis_name)
    (risk, stats), grads = risk_and_grad(state.params, *batch[:2], state=state.optimizer)
    return risk, stats, grads, None


def softmax(losses, state, batch, axis_name):
    risk_and_grad = absgd_jax.value_and_grad(losses, has_aux=True, axis_name=axis_name)
    (risk, stats), grads = risk_and_grad(state.params, *batch[:2], temperature=TEMPERATURE)
    return risk, stats, grads, None


def recover_(losses, state, batch, axis_name):
    risk_and_grad, seen = absgd_jax.value_and_grad(losses, has_aux=True, axis_name=axis_name), []

    def at(params):
        (risk, stats), grads = risk_and_grad(params, *batch[:2], temperature=TEMPERATURE)
        seen.append(stats)
        return risk, grads

    grads, estimates = RECOVER.direction(at, state.params, state.method)
    return estimates.risk, seen[0], grads, estimates


def meta_(losses, state, batch, axis_name):
    x, labels, held_out, held_out_labels = batch

    def losses_of(params):
        return losses(varying(params, axis_name), x, labels)[0]

    def held_out_loss(params):
        return mean_over(jnp.mean(losses(varying(params, axis_name), held_out, held_out_labels)[0]), axis_name)

    # The look-ahead is along the sum over the whole batch: that over this device's examples, summed over the devices.
    rate = len(labels) * RATE
    weights = jamal(losses_of, state.params, held_out_loss, varying(jnp.ones(len(labels)), axis_name), rate)
    return sgd(losses, state, batch, axis_name, weights)


momentum = optax.with_extra_args_support(
    optax.chain(optax.add_decayed_weights(DECAY), optax.trace(MOMENTUM), optax.scale_by_learning_rate(RATE))
)
METHODS = {
    "SGD": Method(sgd, momentum),
    "ABSGD": Method(absgd, absgd_jax.absgd(RATE, TEMPERATURE, momentum=MOMENTUM, weight_decay=DECAY)),
    "mini-batch softmax": Method(softmax, momentum),
    "RECOVER": Method(recover_, momentum, RECOVER.init),
    "META": Method(meta_, momentum),
}


def first_state(method: Method, problem: Problem, devices: int = 1) -> State:
    """The state before the first step; the statistics of several devices lie side by side."""
    # Copies, because the state of each method is donated.
    params, stats = jax.tree.map(jnp.copy, (problem.params, problem.stats))
    stats = jax.tree.map(lambda x: jnp.concatenate([x] * devices), stats)
    return State(params, stats, method.optimizer.init(params), method.init(params))


def make_step(method: Method, problem: Problem, axis_name: str | None = None) -> Callable[..., State]:
    """One update; with an axis name, that of one of the devices over which the batch is spread."""

    def step(state, *batch):
        losses = lambda params, x, labels: problem.losses(params, state.stats, x, labels)  # noqa: E731
        value, stats, grads, kept = method.gradient(losses, state, batch, axis_name)
        updates, optimizer = method.optimizer.update(grads, state.optimizer, state.params, value=value)
        return State(optax.apply_updates(state.params, updates), stats, optimizer, kept)

    return step


def on_each_device(step: Callable[..., State], count: int, arguments: int) -> Callable[..., State]:
    """A data-parallel step: all but the statistics is the same on all devices, the arguments are spread over them."""
    specs = State(P(), P("data"), P(), P())
    inputs = (specs, *[P("data")] * arguments)
    return jax.shard_map(step, mesh=programs.mesh(count), in_specs=inputs, out_specs=specs)


# --- results


def collectives(options: Options) -> dict[tuple[str, str], list[programs.Collective]]:
    """Those of the data-parallel step, for each model and method."""
    found = {}
    for model in options.models:
        problem = MODELS[model](options)
        for name in options.methods:
            step = on_each_device(make_step(METHODS[name], problem, "data"), DEVICES, len(problem.batch))
            init = partial(first_state, METHODS[name], problem, DEVICES)
            found[model, name] = programs.collectives(programs.compile_step(step, init, *problem.batch).compiled)
    return found


def measure(options: Options) -> list[Record]:
    """A record for every model and method."""
    meetings = programs.on_devices(DEVICES, collectives, options)
    records = []
    with Progress() as progress:
        for model in progress.track(options.models, description="cost of a step"):
            problem = MODELS[model](options)
            steps = {
                name: programs.compile_step(
                    make_step(METHODS[name], problem), partial(first_state, METHODS[name], problem), *problem.batch
                )
                for name in options.methods
            }
            seconds, ratios = programs.time_ratios(
                steps, problem.batch, options.rounds, rarely=SLOW, most_seconds=options.most_seconds
            )
            base = cost_of(steps[options.methods[0]])
            for method, step in steps.items():
                cost, met = cost_of(step), meetings[model, method]
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
                        "collectives": len(met),
                        "collectives_before_backward": sum(c.before_backward for c in met),
                        "collective_bytes": [c.bytes for c in met],
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
                NUMBERS,
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
        before, middle = record["collectives_before_backward"], record["time_ratio"]
        low, high = record["time_ratio_quartiles"]
        row = {
            "model": f"{record['model']}, {record['parameters']:,} parameters",
            "method": record["method"],
            "FLOPs": f"{record['flops_ratio']:.4f}",
            "bytes": f"{record['bytes_ratio']:.4f}",
            "temporary memory": f"{record['temporary_bytes_ratio']:.4f}",
            "time (quartiles)": f"{middle:.3f} ({low:.3f} to {high:.3f})",
            "compiling, s": f"{record['compile_seconds']:.1f}",
            "extra state, bytes": f"{record['extra_state_bytes']:,}",
            "collectives (between the passes)": f"{record['collectives']} ({before})",
        }
        rows.append(row)
    scalings = "; ".join(
        f"{model} {m['SGD']['parameters'] / m['SGD']['flops']:.3%}" for model, m in by_model(records).items()
    )
    return (
        f"{table(aims)}\n\nABSGD scales the gradient by a number, which is one FLOP for each parameter. Of "
        f"SGD's FLOPs that is: {scalings}.\n\n{table(rows)}\n\nRatios to SGD in the same run, batches of "
        f"{records[0]['batch_size']}. Collectives over {DEVICES} devices."
    )


def figure(records: list[Record], path: Path) -> None:
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
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    fig.savefig(path, dpi=110)
    plt.close(fig)


if __name__ == "__main__":
    publish("step_cost", partial(measure, tyro.cli(Options)), markdown, figure)
