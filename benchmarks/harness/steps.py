"""Steps of SGD and ABSGD on one device, or on each of several over which the batch is spread; and a ResNet for them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import absgd_jax
from examples.cifar_lt.models import ResNet
from examples.cifar_lt.task import precision

TEMPERATURE, RATE, MOMENTUM, DECAY = 1.0, 1e-4, 0.9, 5e-4
MERGED = 3 * 4  # bytes that the collective which merges the devices' risks takes of each: three float32

OPTIMIZER = optax.chain(optax.add_decayed_weights(DECAY), optax.trace(MOMENTUM), optax.scale_by_learning_rate(RATE))


class State(NamedTuple):
    """All that a step changes."""

    params: Any
    stats: Any  # of batch normalisation; of each device its own
    optimizer: Any
    method: Any  # what the method keeps


class Method(NamedTuple):
    """What makes the gradient of a step, which then goes through momentum.

    ``gradient(losses, params, kept, batch, axis_name)`` gives the gradient, what the method keeps, and new statistics.
    ``losses(params, x, labels)`` returns those of the examples and new statistics. With an axis name this is called on
    each of the devices over which the batch is spread.
    """

    init: Callable[[Any], Any]
    gradient: Callable[..., tuple[Any, Any, Any]]


def sgd() -> Method:
    """The gradient of the mean loss."""

    def gradient(losses, params, kept, batch, axis_name):
        def mean(params):
            each, stats = losses(params, *batch[:2])
            return jnp.mean(each), stats

        if axis_name is not None:  # a gradient for each device: that of what is the same everywhere would be their sum
            params = jax.lax.pcast(params, axis_name, to="varying")
        grads, stats = jax.grad(mean, has_aux=True)(params)
        return grads if axis_name is None else jax.lax.pmean(grads, axis_name), kept, stats

    return Method(lambda params: (), gradient)


def absgd(temperature: Any) -> Method:
    scale = absgd_jax.scale_by_absgd(temperature)

    def gradient(losses, params, kept, batch, axis_name):
        risk_and_grad = absgd_jax.value_and_grad(losses, has_aux=True, axis_name=axis_name)
        (risk, stats), grads = risk_and_grad(params, *batch[:2], state=kept)
        return *scale.update(grads, kept, value=risk), stats

    return Method(scale.init, gradient)


def methods(temperature: Any) -> dict[str, Method]:
    """The first is what others are compared with."""
    return {"SGD": sgd(), "ABSGD": absgd(temperature)}


def first_state(method: Method, params: Any, stats: Any, devices: int = 1) -> State:
    """The state before the first step; the statistics of several devices lie side by side."""
    # Copies, because the state of each method is donated.
    params, stats = jax.tree.map(jnp.copy, (params, stats))
    stats = jax.tree.map(lambda x: jnp.concatenate([x] * devices), stats)
    return State(params, stats, OPTIMIZER.init(params), method.init(params))


def make_step(method: Method, losses: Callable[..., Any], axis_name: str | None = None) -> Callable[..., State]:
    """One update, for ``losses(params, stats, x, labels)``; with an axis name, that of one of the devices."""

    def step(state, *batch):
        of_params = lambda params, x, labels: losses(params, state.stats, x, labels)  # noqa: E731
        grads, kept, stats = method.gradient(of_params, state.params, state.method, batch, axis_name)
        updates, optimizer = OPTIMIZER.update(grads, state.optimizer, state.params)
        return State(optax.apply_updates(state.params, updates), stats, optimizer, kept)

    return step


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


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
