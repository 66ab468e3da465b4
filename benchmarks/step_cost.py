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
from examples.cifar_lt import meta, recover
from examples.cifar_lt.models import ResNet
from examples.cifar_lt.train import precision

matplotlib.use("Agg")

DEVICES = 8
CLASSES, TEMPERATURE, RATE, MOMENTUM, DECAY = 10, 1.0, 1e-4, 0.9, 5e-4
SLOW = ("RECOVER", "META")  # two and more gradients a step: there is nothing to measure to 0.5 %
LEAST_SECONDS = 0.1  # of one timing


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
    tokens: int = 16
    """Length of the transformer's sequences."""
    rounds: int = 40
    """Timings of each method; a quarter of them for RECOVER and META."""


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


def resnet(options: Options) -> Problem:
    model = ResNet(options.depth, CLASSES, dtype=precision(), rngs=nnx.Rngs(0))
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def losses(params, stats, x, labels):
        model = nnx.merge(graphdef, params, stats, copy=True)
        return cross_entropy(model(x, train=True), labels), nnx.state(model, nnx.BatchStat)

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

    ``losses(params, x, labels)`` returns those of the examples and new stats; an axis name says that it is called on one
    of several devices, over which the batch is spread.
    """

    gradient: Callable[..., tuple[jax.Array, Any, Any, Any]]
    optimizer: optax.GradientTransformationExtraArgs = absgd_jax.absgd(RATE, jnp.inf)
    init: Callable[[Any], Any] = lambda params: None


def varying(params: Any, axis_name: str | None) -> Any:
    """So that each device has a gradient of its own: that of what is the same everywhere would be summed over them."""
    return params if axis_name is None else jax.lax.pcast(params, axis_name, to="varying")


def mean_over(tree: Any, axis_name: str | None) -> Any:
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def sgd(losses, state, batch, axis_name, weights=1):
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

    grads, estimates = recover.update(at, state.params, state.method, temperature=TEMPERATURE)
    return estimates.risk, seen[0], grads, estimates


def meta_(losses, state, batch, axis_name):
    x, labels, held_out, held_out_labels = batch
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)

    def losses_of(params):
        return losses(varying(params, axis_name), x, labels)[0]

    def held_out_loss(params):
        return mean_over(jnp.mean(losses(varying(params, axis_name), held_out, held_out_labels)[0]), axis_name)

    # The look-ahead is along the mean over this device's examples, summed over the devices.
    rate = len(labels) * RATE / devices
    weights = meta.jamal(losses_of, state.params, held_out_loss, varying(jnp.ones(len(labels)), axis_name), rate)
    return sgd(losses, state, batch, axis_name, weights)


momentum = optax.with_extra_args_support(
    optax.chain(optax.add_decayed_weights(DECAY), optax.trace(MOMENTUM), optax.scale_by_learning_rate(RATE))
)
METHODS = {
    "SGD": Method(sgd, momentum),
    "ABSGD": Method(absgd, absgd_jax.absgd(RATE, TEMPERATURE, momentum=MOMENTUM, weight_decay=DECAY)),
    "mini-batch softmax": Method(softmax, momentum),
    "RECOVER": Method(recover_, momentum, recover.init),
    "META": Method(meta_, momentum),
}


def init(method: Method, problem: Problem) -> State:
    # Copies, because the state of each method is donated.
    params, stats = jax.tree.map(jnp.copy, (problem.params, problem.stats))
    return State(params, stats, method.optimizer.init(params), method.init(params))


def make_step(method: Method, problem: Problem, axis_name: str | None = None) -> Callable[..., State]:
    def step(state, *batch):
        losses = lambda params, x, labels: problem.losses(params, state.stats, x, labels)  # noqa: E731
        value, stats, grads, kept = method.gradient(losses, state, batch, axis_name)
        updates, optimizer = method.optimizer.update(grads, state.optimizer, state.params, value=value)
        return State(optax.apply_updates(state.params, updates), stats, optimizer, kept)

    return step


# --- results


def collectives(options: Options) -> dict[tuple[str, str], list[programs.Collective]]:
    """Those of the data-parallel step, for each model and method."""
    specs = State(P(), P("data"), P(), P())
    found = {}
    for model in options.models:
        problem = MODELS[model](options)
        for name in options.methods:
            method = METHODS[name]
            state = jax.eval_shape(partial(init, method, problem))
            stats = jax.tree.map(lambda x: jax.ShapeDtypeStruct((DEVICES * len(x), *x.shape[1:]), x.dtype), state.stats)
            step = jax.shard_map(
                make_step(method, problem, "data"),
                mesh=programs.mesh(DEVICES),
                in_specs=(specs, *[P("data")] * len(problem.batch)),
                out_specs=specs,
            )
            program, _ = programs.compiled(step, state._replace(stats=stats), *problem.batch, donate=0)
            found[model, name] = programs.collectives(program)
    return found


def measure(options: Options) -> list[Record]:
    """A record for every model and method."""
    meetings = programs.on_devices(DEVICES, collectives, options)
    records = []
    with Progress() as progress:
        for model in progress.track(options.models, description="step cost"):
            problem = MODELS[model](options)
            costs = {name: cost_of(METHODS[name], problem) for name in options.methods}
            times, seconds = time_of(options, problem)
            base, *_ = costs.values()
            for name, cost in costs.items():
                median, quartiles = programs.quartiles(times[name])
                records.append(
                    {
                        "model": f"ResNet-{options.depth}" if model == "ResNet" else model,
                        "method": name,
                        "flops_ratio": cost["flops"] / base["flops"],
                        "bytes_ratio": cost["bytes"] / base["bytes"],
                        "temporary_bytes_ratio": cost["temporary_bytes"] / base["temporary_bytes"],
                        "time_ratio": median,
                        "time_ratio_quartiles": quartiles,
                        "timings": len(times[name]),
                        "seconds_of_sgd": seconds,
                        "compile_seconds": cost["compile_seconds"],
                        "extra_state_bytes": cost["state_bytes"] - base["state_bytes"],
                        "collectives": len(meetings[model, name]),
                        "collectives_before_backward": sum(c.before_backward for c in meetings[model, name]),
                        "collective_bytes": [c.bytes for c in meetings[model, name]],
                        "flops": cost["flops"],
                        "bytes": cost["bytes"],
                        "temporary_bytes": cost["temporary_bytes"],
                        "parameters": sum(leaf.size for leaf in jax.tree.leaves(problem.params)),
                        "batch_size": options.batch_size,
                        "platform": jax.default_backend(),
                    }
                )
    return records


def cost_of(method: Method, problem: Problem) -> dict[str, float]:
    """The compiler's figures."""
    state = jax.eval_shape(partial(init, method, problem))
    program, seconds = programs.compiled(make_step(method, problem), state, *problem.batch, donate=0)
    return programs.figures(program) | {"compile_seconds": seconds, "state_bytes": programs.nbytes(state)}
