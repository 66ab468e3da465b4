"""Training as one compiled program, vmapped over seeds, learning rates and temperatures."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

import absgd_jax
from examples.digits import models
from examples.digits.data import CLASSES


class Data(NamedTuple):
    """A training set; ``special`` marks the examples whose weights are watched (rare classes, wrong labels)."""

    x: ArrayLike
    y: ArrayLike
    special: ArrayLike


class History(NamedTuple):
    """What is recorded after every pass, or more often."""

    accuracy: jax.Array  # of every class, on the evaluation split
    sample_size: jax.Array  # effective fraction of a batch, mean since the last record
    weight: jax.Array  # mean weight of a special example over that of the others


def per_example_loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(models.logits(params, x), y)


loss_and_grad = absgd_jax.value_and_grad(
    lambda params, x, y: (per_example_loss(params, x, y),) * 2, has_aux=True, with_kl=True
)


def train(carry, data, evaluation, key, *, learning_rate, temperature, batch_size, passes, records_per_pass=1):
    """Continues from ``carry`` = (params, optimizer state) for some passes; also returns the History.

    The learning rate falls to 0 along a cosine.
    """
    chunk = len(data.y) // batch_size // records_per_pass  # steps between two records
    steps = passes * records_per_pass * chunk
    carry = carry[0], optax.tree.set(carry[1], count=jnp.int32(0))
    optimizer = absgd_jax.absgd(lambda t: learning_rate * (1 + jnp.cos(jnp.pi * t / steps)) / 2, temperature)
    shape = (records_per_pass, chunk, batch_size)

    def step(carry, batch):
        params, state = carry
        x, y, special = batch
        lam = state[0].temperature
        ((risk, kl), losses), grads = loss_and_grad(params, x, y, state=state)
        updates, state = optimizer.update(grads, state, params, value=risk, kl=kl)
        weights = jax.nn.softmax(losses / lam)
        fraction = absgd_jax.effective_sample_size(weights) / batch_size
        seen = jnp.stack([weights @ special, weights @ (1 - special), special.sum(), (1 - special).sum()])
        params: Any = optax.apply_updates(params, updates)
        return (params, state), (fraction, seen)

    def record(carry, order):
        carry, (fraction, seen) = jax.lax.scan(step, carry, jax.tree.map(lambda a: a[order], data))
        special, others, n_special, n_others = seen.sum(0)
        right = models.logits(carry[0], evaluation.x).argmax(-1) == evaluation.y
        classes = jax.nn.one_hot(evaluation.y, CLASSES)
        weight = (special / jnp.maximum(n_special, 1)) / (others / jnp.maximum(n_others, 1))
        return carry, History(100 * (right @ classes) / classes.sum(0), fraction.mean(), weight)

    def order_of(key):
        return jax.random.permutation(key, len(data.y))[: math.prod(shape)].reshape(shape)

    orders = jax.vmap(order_of)(jax.random.split(key, passes))
    return jax.lax.scan(record, carry, orders.reshape(-1, *shape[1:]))


def start(seed, sizes):
    """Parameters and optimizer state (at λ = ∞) of a seed, and the key for what follows."""
    key, later = jax.random.split(jax.random.key(seed))
    params = models.init(key, sizes)
    return (params, absgd_jax.absgd(lambda t: 0.0, jnp.inf).init(params)), later


def make_run(setting, rule):
    """Compiles a function of (evaluation, seeds, data, rates, values), the last four with an axis of runs.

    Its History has the axes (run, record). ``rule`` makes a temperature of a value. All runs are trained together.
    """

    def one(evaluation, seed, data, rate, value):
        carry, key = start(seed, setting.sizes)
        stage = partial(train, data=data, evaluation=evaluation, batch_size=setting.batch_size)
        first, second = jax.random.split(key)
        history = []
        if setting.first_passes:
            carry, before = stage(
                carry,
                key=first,
                learning_rate=setting.first_learning_rate,
                temperature=jnp.inf,
                passes=setting.first_passes,
            )
            history.append(before)
        # kl_radius takes over from a state at λ = ∞ and starts by itself.
        _, after = stage(
            carry,
            key=second,
            learning_rate=rate,
            temperature=rule(value),
            passes=setting.passes,
            records_per_pass=setting.records_per_pass,
        )
        return jax.tree.map(lambda *h: jnp.concatenate(h), *history, after)

    return jax.jit(jax.vmap(one, (None, 0, 0, 0, 0)))
