"""Training as one compiled program, vmapped over seeds, learning rates and temperatures."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from absgd_jax import losses
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


def train(params, data, evaluation, key, *, rule, counts, learning_rate, batch_size, passes, records_per_pass=1):
    """The parameters after some passes, and the History. The learning rate falls to 0 along a cosine.

    ``rule`` makes a pair of functions, as that of :func:`absgd_jax.within_groups`, of the number of steps. ``counts``
    are those of the classes that balanced softmax is told; equal ones make it cross entropy.
    """
    chunk = len(data.y) // batch_size // records_per_pass  # steps between two records
    steps = passes * records_per_pass * chunk
    weighting = rule(steps)
    optimizer = optax.sgd(lambda t: learning_rate * (1 + jnp.cos(jnp.pi * t / steps)) / 2, momentum=0.9)
    shape = (records_per_pass, chunk, batch_size)

    def objective(params, state, x, y):
        values = losses.balanced_softmax(models.logits(params, x), y, counts)
        weights, state = weighting.update(values, state, y)
        return jnp.mean(weights * values), (weights, state)

    def step(carry, batch):
        params, optimizer_state, state = carry
        x, y, special = batch
        grads, (weights, state) = jax.grad(objective, has_aux=True)(params, state, x, y)
        updates, optimizer_state = optimizer.update(grads, optimizer_state)
        seen = jnp.stack([weights @ special, weights @ (1 - special), special.sum(), (1 - special).sum()])
        params: Any = optax.apply_updates(params, updates)
        return (params, optimizer_state, state), seen

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
    start = params, optimizer.init(params), weighting.init()
    (params, *_), history = jax.lax.scan(record, start, orders.reshape(-1, *shape[1:]))
    return params, history


@partial(jax.jit, static_argnames=("rule", "sizes", "batch_size", "passes", "records_per_pass"))
def train_together(data, evaluation, counts, seeds, rates, values, *, rule, sizes, **schedule):
    """The History of several runs, with axes (run, record); ``rule`` makes a weighting of a value and the steps."""

    def one(data, evaluation, counts, seed, rate, value):
        init_key, key = jax.random.split(jax.random.key(seed))
        options = {"rule": partial(rule, value), "counts": counts, "learning_rate": rate} | schedule
        return train(models.init(init_key, sizes), data, evaluation, key, **options)[1]

    return jax.vmap(one)(data, evaluation, counts, seeds, rates, values)
