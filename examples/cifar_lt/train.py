"""The training as pure functions on pytrees: an epoch is one program, and so is an evaluation.

They hold nothing and can be transformed: ``jax.vmap`` of ``init`` and ``train_epoch`` trains several seeds, or several
λ, at once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import absgd_jax
from examples.cifar_lt.augment import crop_and_flip, normalise, pad
from examples.cifar_lt.config import Config
from examples.cifar_lt.models import ResNet
from examples.cifar_lt.objective import make_objective, needs_cosines
from examples.cifar_lt.schedule import make_learning_rate, steps_per_epoch

EVAL_BATCH = 500


class Data(NamedTuple):
    """Images and labels on the device."""

    images: jax.Array  # shape=(N, 32, 32, 3), dtype=uint8
    labels: jax.Array  # shape=(N,), dtype=int32


class State(NamedTuple):
    """Everything that training changes, and the key from which it draws."""

    params: Any
    batch_stats: Any
    opt_state: Any  # of absgd: a tuple that begins with ABSGD's own state
    key: jax.Array  # the seed's; epoch e draws from fold_in(key, e)
    epoch: jax.Array  # shape=(), dtype=int32; epochs done


class Metrics(NamedTuple):
    """What is seen of an epoch, scalars."""

    loss: jax.Array  # mean over the examples
    risk: jax.Array  # running robust risk after the last step
    ess: jax.Array  # effective sample size over batch size, mean over the steps
    temperature: jax.Array  # λ of the last step
    lr: jax.Array  # learning rate of the last step


class Functions(NamedTuple):
    """The pure functions that :func:`make_functions` makes."""

    init: Callable[[jax.Array | int], State]
    plan: Callable[[State, int], tuple[jax.Array, jax.Array]]
    step: Callable[[State, jax.Array, jax.Array, Any], tuple[State, Metrics]]
    train_epoch: Callable[[State, Data, Any], tuple[State, Metrics]]
    evaluate: Callable[[State, Data], jax.Array]


def make_functions(config: Config, class_counts: np.ndarray) -> Functions:
    """Makes the functions of a run on a training set with ``class_counts`` images of each class.

    Returns:
      ``init(seed) -> State``.
      ``plan(state, size) -> (batches, keys)``, the indices of each batch of the coming epoch and the key of each step.
      ``step(state, images, labels, temperature) -> (State, Metrics)``, one update on augmented and normalised images.
      ``train_epoch(state, data, temperature) -> (State, Metrics)``; ``temperature`` is one of
      :func:`temperature_rules`, a pytree, so that λ is an input and no constant of the program.
      ``evaluate(state, data) -> correct``, the correctly classified examples of each class, shape (C,).
    """
    steps = steps_per_epoch(config, class_counts)
    objective = make_objective(config.loss, class_counts, config.second_stage)
    learning_rate = make_learning_rate(config, steps)

    def make_model(key):
        cosine = needs_cosines(config.loss)
        return ResNet(config.depth, config.classes, width=config.width, cosine=cosine, rngs=nnx.Rngs(key))

    graphdef, *_ = nnx.split(nnx.eval_shape(make_model, jax.random.key(0)), nnx.Param, nnx.BatchStat)

    def make_optimizer(temperature):
        return absgd_jax.absgd(
            learning_rate, temperature, config.gamma, momentum=config.momentum, weight_decay=config.weight_decay
        )

    def init(seed):
        key = jax.random.key(seed)
        _, params, batch_stats = nnx.split(make_model(key), nnx.Param, nnx.BatchStat)
        opt_state = make_optimizer(jnp.inf).init(params)
        return State(params, batch_stats, opt_state, jax.random.key_data(key), jnp.int32(0))

    def per_example_loss(params, images, labels, *, batch_stats, epoch):
        model = nnx.merge(graphdef, params, batch_stats, copy=True)
        losses = objective(model(images, train=True), labels, epoch)
        return losses, (losses, nnx.state(model, nnx.BatchStat))

    risk_and_grad = absgd_jax.value_and_grad(per_example_loss, has_aux=True, with_kl=True)

    def step(state, images, labels, temperature):
        params, batch_stats, opt_state, key, epoch = state
        now = opt_state[0]
        ((risk, kl), (losses, batch_stats)), grads = risk_and_grad(
            params, images, labels, state=opt_state, batch_stats=batch_stats, epoch=epoch
        )
        updates, opt_state = make_optimizer(temperature).update(grads, opt_state, params, value=risk, kl=kl)
        state = State(optax.apply_updates(params, updates), batch_stats, opt_state, key, epoch)
        metrics = Metrics(
            loss=jnp.mean(losses),
            risk=state.opt_state[0].risk,
            ess=absgd_jax.effective_sample_size(jax.nn.softmax(losses / now.temperature)) / losses.size,
            temperature=now.temperature,
            lr=jnp.asarray(learning_rate(now.count)),
        )
        return state, metrics

    def plan(state, size):
        order_key, steps_key = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), state.epoch))
        order = jax.random.permutation(order_key, size)[: steps * config.batch_size]
        return order.reshape(steps, config.batch_size), jax.random.split(steps_key, steps)

    def train_epoch(state, data, temperature):
        padded = pad(data.images)

        def body(state, batch_and_key):
            batch, key = batch_and_key
            images = normalise(crop_and_flip(padded, batch, key))
            return step(state, images, data.labels[batch], temperature)

        state, each = jax.lax.scan(body, state, plan(state, data.labels.size))
        last = jax.tree.map(lambda x: x[-1], each)
        return state._replace(epoch=state.epoch + 1), last._replace(loss=jnp.mean(each.loss), ess=jnp.mean(each.ess))

    def evaluate(state, data):
        model = nnx.merge(graphdef, state.params, state.batch_stats, copy=True)
        size = data.labels.size
        batches = -(-size // EVAL_BATCH)
        places = jnp.arange(batches * EVAL_BATCH).reshape(batches, -1)  # those past the end are not counted

        def body(correct, place):
            labels = data.labels[place % size]
            guesses = jnp.argmax(model(normalise(data.images[place % size]), train=False), axis=-1)
            hits = (guesses == labels) & (place < size)
            return correct.at[labels].add(hits), None

        return jax.lax.scan(body, jnp.zeros(config.classes, jnp.int32), places)[0]

    return Functions(init, plan, step, train_epoch, evaluate)


def take_over(state: State, temperature: Any) -> State:
    """A state that another rule for λ may have left, with the λ that ``temperature`` gives to its next step.

    The state holds the λ of the next step, and of a run that branches off from one of SGD that would still be ∞. A KL
    radius leaves ∞ by itself.
    """
    if not callable(temperature):
        return state
    first, *rest = state.opt_state
    first = first._replace(temperature=jnp.asarray(temperature(first.count), first.temperature.dtype))
    return state._replace(opt_state=(first, *rest))
