"""The training as pure functions on pytrees: an epoch is one program, and so is an evaluation.

They hold nothing and can be transformed: ``jax.vmap`` of ``train_epoch`` trains several runs at once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import absgd_jax
from examples.cifar_lt import meta, recover
from examples.cifar_lt.augment import crop_and_flip, cut_out, normalise, pad
from examples.cifar_lt.classifiers import CLASSIFIERS, Linear, balanced_batch
from examples.cifar_lt.config import Config
from examples.cifar_lt.models import ResNet
from examples.cifar_lt.objective import make_objective
from examples.cifar_lt.schedule import Hyper, learning_rate, steps_per_epoch

EVAL_BATCH = 500


def precision() -> Any:
    """The type of images between the layers. Parameters, batch statistics, losses and the risk are float32."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


class Data(NamedTuple):
    """Images and labels on the device."""

    images: jax.Array  # shape=(N, 32, 32, 3), dtype=uint8
    labels: jax.Array  # shape=(N,), dtype=int32


class State(NamedTuple):
    """Everything that training changes, and the key from which it draws."""

    params: Any
    batch_stats: Any
    opt_state: Any  # of absgd: a tuple that begins with ABSGD's own state
    recover: recover.RecoverState | None  # of the algorithm recover
    key: jax.Array  # the seed's; epoch e draws from fold_in(key, e)
    epoch: jax.Array  # shape=(), dtype=int32; epochs done


class Metrics(NamedTuple):
    """What is seen of an epoch, scalars."""

    loss: jax.Array  # mean over the examples
    risk: jax.Array  # running robust risk after the last step
    ess: jax.Array  # effective sample size over batch size, mean over the steps
    temperature: jax.Array  # λ of the last step
    lr: jax.Array  # learning rate


class Batch(NamedTuple):
    """Augmented and normalised images, each of which may be mixed of two."""

    images: jax.Array  # shape=(B, 32, 32, 3), dtype=float32
    labels: jax.Array  # shape=(B,)
    others: jax.Array  # labels of the images that are mixed in, shape=(B,)
    share: Any  # of the first image; 1 if none is mixed in


class Functions(NamedTuple):
    """The pure functions that :func:`make_functions` makes."""

    init: Callable[[Hyper], State]
    take_over: Callable[[State, Hyper], State]
    plan: Callable[[State, jax.Array, Hyper], tuple[jax.Array, jax.Array]]
    step: Callable[[State, "Batch", "Batch | None", Hyper], tuple[State, Metrics]]
    train_epoch: Callable[[State, Data, Data, Hyper], tuple[State, Metrics]]
    evaluate: Callable[[State, Data], jax.Array]
    features: Callable[[State, Data], jax.Array]
    refit: dict[str, Callable[[State, Data], State]]


def make_functions(config: Config, class_counts: np.ndarray) -> Functions:
    """Makes the functions of all runs that share the settings of ``config`` but for what :class:`Hyper` holds.

    Returns:
      ``init(hyper) -> State``.
      ``take_over(state, hyper) -> State``, a state that a run with other settings has left, ready for ``hyper``.
      ``plan(state, labels, hyper) -> (batches, keys)``, the indices of each batch of the coming epoch and the key of
      each step.
      ``step(state, batch, held_out, hyper) -> (State, Metrics)``, one update; ``held_out`` is a balanced batch for META
      and L2RW.
      ``train_epoch(state, data, held_out, hyper) -> (State, Metrics)``.
      ``evaluate(state, data) -> correct``, the correctly classified examples of each class, shape (C,).
      ``features(state, data)``, what the classifier sees, shape (N, D).
      ``refit[name](state, data) -> State``, with the classifier of that name fitted to the features.
    """
    steps = steps_per_epoch(config, class_counts)
    objective = make_objective(class_counts)

    def make_model(key):
        shape = {"depth": config.depth, "classes": config.classes, "width": config.width, "cosine": config.cosine}
        return ResNet(**shape, dtype=precision(), rngs=nnx.Rngs(key))

    graphdef, shapes, _ = nnx.split(nnx.eval_shape(make_model, jax.random.key(0)), nnx.Param, nnx.BatchStat)
    last_block = (config.depth - 2) // 2 - 1
    parts = jax.tree_util.tree_map_with_path(lambda path, _: part_of(path, last_block), shapes)

    def make_optimizer(learning_rate, hyper):
        plain = config.algorithm != "absgd"
        return absgd_jax.absgd(
            learning_rate,
            jnp.inf if plain else hyper.temperature,
            hyper.gamma,
            momentum=hyper.momentum,
            weight_decay=hyper.weight_decay,
        )

    def init(hyper):
        key = jax.random.key(hyper.seed)
        _, params, batch_stats = nnx.split(make_model(key), nnx.Param, nnx.BatchStat)
        opt_state = make_optimizer(0.0, hyper).init(params)
        return take_over(State(params, batch_stats, opt_state, None, jax.random.key_data(key), jnp.int32(0)), hyper)

    def take_over(state, hyper):
        # The state holds the λ of the next step. A KL radius leaves ∞ by itself.
        if callable(hyper.temperature) and config.algorithm == "absgd":
            first, *rest = state.opt_state
            temperature = jnp.asarray(hyper.temperature(first.count), first.temperature.dtype)
            state = state._replace(opt_state=(first._replace(temperature=temperature), *rest))
        storm = recover.init(state.params) if config.algorithm == "recover" else None
        return state._replace(recover=storm)

    def forward(params, state, batch, hyper, class_weights):
        """One loss per example, weighted by class, and the new batch statistics."""
        model = nnx.merge(graphdef, params, state.batch_stats, copy=True)
        logits = model(batch.images, train=True)
        # The loss if the label were c, shape (B, C): smoothing takes their mean, mixing takes two of them.
        if_label = jax.vmap(lambda c: objective(hyper.loss, logits, jnp.full_like(batch.labels, c)), out_axes=-1)
        losses, smoothing = if_label(jnp.arange(config.classes)), hyper.label_smoothing

        def of(labels):
            own = jnp.take_along_axis(losses, labels[:, None], axis=-1)[:, 0]
            return class_weights[labels] * ((1 - smoothing) * own + smoothing * jnp.mean(losses, axis=-1))

        mixed = batch.share * of(batch.labels) + (1 - batch.share) * of(batch.others)
        return mixed, nnx.state(model, nnx.BatchStat)

    def learnt_weights(state, batch, held_out, hyper):
        """The weights of a batch's examples by META or L2RW."""
        equal = jnp.ones(config.classes)

        def losses_of(params):
            return forward(params, state, batch, hyper, equal)[0]

        def held_out_loss(params):
            return jnp.mean(forward(params, state, held_out, hyper, equal)[0])

        if config.algorithm == "l2rw":
            return meta.l2rw(losses_of, state.params, held_out_loss)
        # The authors' step ahead is on the sum of the losses.
        rate = config.batch_size * learning_rate(config, hyper, state.epoch)
        return meta.jamal(losses_of, state.params, held_out_loss, hyper.class_weights[batch.labels], rate)

    def step(state, batch, held_out, hyper):
        now, second_stage = state.opt_state[0], state.epoch >= config.second_stage
        temperature, learns_weights = now.temperature, config.algorithm in ("meta", "l2rw")
        if learns_weights:
            weights, class_weights = learnt_weights(state, batch, held_out, hyper), jnp.ones(config.classes)
        else:
            weights, class_weights = 1, jnp.where(second_stage, hyper.class_weights, 1)

        def per_example_loss(params):
            losses, batch_stats = forward(params, state, batch, hyper, class_weights)
            return weights * losses, (weights * losses, batch_stats)

        risk_and_grad = absgd_jax.value_and_grad(per_example_loss, has_aux=True, with_kl=True)
        if config.algorithm == "recover":
            temperature, aux = hyper.temperature(now.count), []

            def at(params):
                ((risk, _), seen), grads = risk_and_grad(params, temperature=temperature)
                aux.append(seen)
                return risk, grads

            grads, storm = recover.update(at, state.params, state.recover, temperature=temperature)
            (losses, batch_stats), risk, kl = aux[0], storm.risk, jnp.float32(0)
        else:
            ((risk, kl), (losses, batch_stats)), grads = risk_and_grad(state.params, state=state.opt_state)
            storm = None
        rate = learning_rate(config, hyper, state.epoch)
        optimizer = make_optimizer(rate, hyper)
        updates, after = optimizer.update(grads, state.opt_state, state.params, value=risk, kl=kl)
        opt_state: Any = after
        moves = jax.tree.map(lambda part: ~second_stage | (part >= hyper.trained), parts)
        updates = jax.tree.map(lambda update, moves: jnp.where(moves, update, 0), updates, moves)
        params = optax.apply_updates(state.params, updates)
        relative = weights if learns_weights else jax.nn.softmax(losses / temperature)
        metrics = Metrics(
            loss=jnp.mean(losses),
            risk=opt_state[0].risk,
            ess=absgd_jax.effective_sample_size(relative) / losses.size,
            temperature=temperature,
            lr=rate,
        )
        return State(params, batch_stats, opt_state, storm, state.key, state.epoch), metrics

    def plan(state, labels, hyper):
        order_key, steps_key = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.key), state.epoch))
        shape = steps, config.batch_size
        order = jax.random.permutation(order_key, labels.size)[: steps * config.batch_size].reshape(shape)
        drawn = balanced_batch(labels, config.classes, steps * config.batch_size)(order_key).reshape(shape)
        return jnp.where(hyper.balanced, drawn, order), jax.random.split(steps_key, steps)

    def train_epoch(state, data, held_out, hyper):
        padded = pad(data.images)
        padded_held_out = pad(held_out.images)

        def body(state, places_and_key):
            places, key = places_and_key
            batch = augmented(padded, data.labels, places, key, hyper)
            balanced = None
            if config.algorithm in ("meta", "l2rw"):
                draw_key, augment_key = jax.random.split(jax.random.fold_in(key, 1))
                places = balanced_batch(held_out.labels, config.classes, config.batch_size)(draw_key)
                images, labels = normalise(crop_and_flip(padded_held_out, places, augment_key)), held_out.labels[places]
                balanced = Batch(images, labels, labels, 1)
            return step(state, batch, balanced, hyper)

        state, each = jax.lax.scan(body, state, plan(state, data.labels, hyper))
        last = jax.tree.map(lambda x: x[-1], each)
        return state._replace(epoch=state.epoch + 1), last._replace(loss=jnp.mean(each.loss), ess=jnp.mean(each.ess))

    def over_batches(function, data):
        """A function of images in batches of a size that does not depend on their number; returns (N, ...)."""
        size = data.labels.size
        places = jnp.arange(-(-size // EVAL_BATCH) * EVAL_BATCH).reshape(-1, EVAL_BATCH) % size
        results = jax.lax.map(lambda place: function(normalise(data.images[place])), places)
        return results.reshape(-1, *results.shape[2:])[:size]

    def merge(state):
        return nnx.merge(graphdef, state.params, state.batch_stats, copy=True)

    def evaluate(state, data):
        model = merge(state)
        guesses = over_batches(lambda images: jnp.argmax(model(images, train=False), axis=-1), data)
        return jnp.zeros(config.classes, jnp.int32).at[data.labels].add(guesses == data.labels)

    def features(state, data):
        model = merge(state)
        return over_batches(lambda images: model.features(images, train=False), data)

    def refit(fit, state, data):
        model = merge(state)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), config.epochs)
        layer: Any = model.classifier
        fitted = fit(features(state, data), data.labels, Linear(layer.kernel[...], layer.bias[...]), key)
        layer.kernel[...], layer.bias[...] = fitted
        return state._replace(params=nnx.state(model, nnx.Param))

    refits = {name: partial(refit, fit) for name, fit in CLASSIFIERS.items()}
    return Functions(init, take_over, plan, step, train_epoch, evaluate, features, refits)


def augmented(padded: jax.Array, labels: jax.Array, places: jax.Array, key: jax.Array, hyper: Hyper) -> Batch:
    """The images at some places, cropped, flipped, cut out and mixed."""
    share_key, cut_key = jax.random.split(jax.random.fold_in(key, 2))
    images, labels = normalise(crop_and_flip(padded, places, key)), labels[places]
    images = cut_out(images, hyper.cutout, cut_key)
    share = jnp.where(hyper.mixup, jax.random.uniform(share_key), 1)
    # The order of a batch is random, so that the next image is any.
    mixed = share * images + (1 - share) * jnp.roll(images, 1, 0)
    return Batch(mixed, labels, jnp.roll(labels, 1), share)


def part_of(path: tuple[Any, ...], last_block: int) -> int:
    """The index into ``config.TRAINED`` of the smallest part of the network that holds a parameter."""
    names = [getattr(key, "key", getattr(key, "name", key)) for key in path]
    if names[0] == "classifier":
        return 2
    return 1 if names[:2] == ["blocks", last_block] else 0
