"""Training as one compiled program: a scan over passes of a scan over batches, vmapped over seeds and choices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import absgd_jax
from examples.digits import models
from examples.digits.config import INF, Method, Setting
from examples.digits.data import CLASSES, Sample, Split


class History(NamedTuple):
    """What is recorded after each pass; the weights are those of the whole training set, 1 on average."""

    accuracy: jax.Array  # of each class, shape=(passes, 10)
    effective: jax.Array  # effective sample size, as a fraction of the training set
    special: jax.Array  # mean weight of the special examples
    ordinary: jax.Array  # mean weight of the others


def train_passes(optimizer, params, state, key, sample: Sample, held_out: Split, passes: int, batch_size: int):
    """Trains from ``params`` and the optimizer's ``state``; returns both, and the history."""
    examples = len(sample.labels)
    batches = examples // batch_size
    value_and_grad = absgd_jax.value_and_grad(models.per_example_loss, with_kl=True)

    def step(carry, rows):
        params, state = carry
        (risk, kl), grads = value_and_grad(params, sample.images[rows], sample.labels[rows], state=state)
        updates, state = optimizer.update(grads, state, params, value=risk, kl=kl)
        return (optax.apply_updates(params, updates), state), None

    def one_pass(carry, key):
        order = jax.random.permutation(key, examples)[: batches * batch_size]
        carry, _ = jax.lax.scan(step, carry, order.reshape(batches, batch_size))
        return carry, record(*carry, sample, held_out)

    (params, state), history = jax.lax.scan(one_pass, (params, state), jax.random.split(key, passes))
    return params, state, history


def record(params, state, sample: Sample, held_out: Split) -> History:
    """The accuracy on held-out data and the weights that ABSGD gives to its training set."""
    correct = jnp.argmax(models.apply(params, held_out.images), -1) == held_out.labels
    of_class = jax.nn.one_hot(held_out.labels, CLASSES)

    losses = models.per_example_loss(params, sample.images, sample.labels)
    temperature = optax.tree_utils.tree_get(state, "temperature")
    # The gradient of the risk is the weighting; times n its mean is 1, which is what SGD gives to everyone.
    weights = losses.size * jax.grad(absgd_jax.entropic_risk)(losses, temperature)
    return History(
        accuracy=correct @ of_class / of_class.sum(0),
        effective=absgd_jax.effective_sample_size(weights) / losses.size,
        special=jnp.mean(weights, where=sample.special),
        ordinary=jnp.mean(weights, where=~sample.special),
    )


def train(setting: Setting, first: tuple[Setting, float] | None, sample, held_out, seed, learning_rate, temperature):
    """One training run; ``first`` is an earlier stage at λ = ∞ and its learning rate, from which it continues."""
    init_key, first_key, key = jax.random.split(jax.random.key(seed), 3)
    params = models.init(init_key, setting.sizes)
    optimizer = absgd_jax.absgd(learning_rate, temperature)
    state = optimizer.init(params)
    if first is not None:
        stage, rate = first
        sgd = absgd_jax.absgd(rate, temperature=INF)
        params, state, _ = train_passes(
            sgd, params, sgd.init(params), first_key, sample, held_out, stage.passes, stage.batch_size
        )
    return train_passes(optimizer, params, state, key, sample, held_out, setting.passes, setting.batch_size)[-1]


def train_all(setting: Setting, method: Method, choices, seeds, train_split: Split, held_out: Split, first=None):
    """The histories of all choices, pairs of a learning rate and a value of the method, and all seeds.

    Returns:
      A :class:`History` whose arrays start with the axes (choices, seeds).
    """
    samples = jax.tree.map(lambda *x: jnp.stack(x), *(setting.sample(train_split, seed) for seed in seeds))
    held_out = jax.tree.map(jnp.asarray, held_out)

    def one(learning_rate, value, seed, sample):
        return train(setting, first, sample, held_out, seed, learning_rate, method.temperature(value))

    over_seeds = jax.vmap(one, in_axes=(None, None, 0, 0))
    over_choices = jax.vmap(over_seeds, in_axes=(0, 0, None, None))
    learning_rates, values = jnp.asarray(choices, jnp.float32).T
    return jax.jit(over_choices)(learning_rates, values, jnp.asarray(seeds), samples)
