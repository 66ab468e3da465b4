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
    weight: jax.Array  # mean weight of a special example over that of the others, since the last record


def per_example_loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(models.logits(params, x), y)


loss_and_grad = absgd_jax.value_and_grad(
    lambda params, x, y: (per_example_loss(params, x, y),) * 2, has_aux=True, with_kl=True
)


def train(params, data, evaluation, key, *, learning_rate, temperature, batch_size, passes, records_per_pass=1):
    """The parameters after some passes, and the History. The learning rate falls to 0 along a cosine."""
    chunk = len(data.y) // batch_size // records_per_pass  # steps between two records
    steps = passes * records_per_pass * chunk
    optimizer = absgd_jax.absgd(lambda t: learning_rate * (1 + jnp.cos(jnp.pi * t / steps)) / 2, temperature)
    shape = (records_per_pass, chunk, batch_size)

    def step(carry, batch):
        params, state = carry
        x, y, special = batch
        lam = state[0].temperature
        ((risk, kl), losses), grads = loss_and_grad(params, x, y, state=state)
        updates, state = optimizer.update(grads, state, params, value=risk, kl=kl)
        weights = jax.nn.softmax(losses / lam)
        seen = jnp.stack([weights @ special, weights @ (1 - special), special.sum(), (1 - special).sum()])
        params: Any = optax.apply_updates(params, updates)
        return (params, state), seen

    def record(carry, order):
        carry, seen = jax.lax.scan(step, carry, jax.tree.map(lambda a: a[order], data))
        special, others, n_special, n_others = seen.sum(0)
        right = models.logits(carry[0], evaluation.x).argmax(-1) == evaluation.y
        classes = jax.nn.one_hot(evaluation.y, CLASSES)
        weight = (special / jnp.maximum(n_special, 1)) / (others / jnp.maximum(n_others, 1))
        return carry, History(100 * (right @ classes) / classes.sum(0), weight)

    def order_of(key):
        return jax.random.permutation(key, len(data.y))[: math.prod(shape)].reshape(shape)

    orders = jax.vmap(order_of)(jax.random.split(key, passes))
    (params, _), history = jax.lax.scan(record, (params, optimizer.init(params)), orders.reshape(-1, *shape[1:]))
    return params, history


@partial(jax.jit, static_argnames=("rule", "sizes", "batch_size", "passes", "records_per_pass"))
def train_together(data, evaluation, seeds, rates, values, *, rule, sizes, **schedule):
    """The History of several runs, with axes (run, record); ``rule`` makes a temperature of a value."""

    def one(data, evaluation, seed, rate, value):
        init_key, key = jax.random.split(jax.random.key(seed))
        params = models.init(init_key, sizes)
        return train(params, data, evaluation, key, learning_rate=rate, temperature=rule(value), **schedule)[1]

    return jax.vmap(one)(data, evaluation, seeds, rates, values)
