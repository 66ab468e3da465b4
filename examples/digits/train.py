"""Training as one compiled program, vmapped over seeds, learning rates and temperatures."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import absgd_jax
from examples.digits import models
from examples.digits.data import CLASSES


class Data(NamedTuple):
    """A training set; ``special`` marks the examples whose weights are watched (rare classes, wrong labels)."""

    x: jax.Array
    y: jax.Array
    special: jax.Array


class History(NamedTuple):
    """What is recorded after every pass."""

    accuracy: jax.Array  # of every class, on the evaluation split
    sample_size: jax.Array  # effective fraction of a batch, mean over the pass
    weight: jax.Array  # mean weight of a special example over that of the others


def per_example_loss(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(models.logits(params, x), y)


loss_and_grad = absgd_jax.value_and_grad(
    lambda params, x, y: (per_example_loss(params, x, y),) * 2, has_aux=True, with_kl=True
)


def train(carry, data, evaluation, key, *, learning_rate, temperature, batch_size, passes):
    """Continues from ``carry`` = (params, optimizer state) for some passes; also returns the History of each."""
    optimizer = absgd_jax.absgd(learning_rate, temperature)
    steps = len(data.y) // batch_size

    def step(carry, batch):
        params, state = carry
        x, y, special = batch
        lam = state[0].temperature
        ((risk, kl), losses), grads = loss_and_grad(params, x, y, state=state)
        updates, state = optimizer.update(grads, state, params, value=risk, kl=kl)
        weights = jax.nn.softmax(losses / lam)
        fraction = absgd_jax.effective_sample_size(weights) / batch_size
        seen = jnp.stack([weights @ special, weights @ (1 - special), special.sum(), (1 - special).sum()])
        return (optax.apply_updates(params, updates), state), (fraction, seen)

    def one_pass(carry, key):
        order = jax.random.permutation(key, len(data.y))[: steps * batch_size].reshape(steps, batch_size)
        carry, (fraction, seen) = jax.lax.scan(step, carry, jax.tree.map(lambda a: a[order], data))
        special, others, n_special, n_others = seen.sum(0)
        right = models.logits(carry[0], evaluation.x).argmax(-1) == evaluation.y
        classes = jax.nn.one_hot(evaluation.y, CLASSES)
        weight = (special / jnp.maximum(n_special, 1)) / (others / jnp.maximum(n_others, 1))
        return carry, History(100 * (right @ classes) / classes.sum(0), fraction.mean(), weight)

    return jax.lax.scan(one_pass, carry, jax.random.split(key, passes))


def start(seed, sizes):
    """Parameters and optimizer state (at λ = ∞) of a seed, and the key for what follows."""
    key, later = jax.random.split(jax.random.key(seed))
    params = models.init(key, sizes)
    return (params, absgd_jax.absgd(0.0, jnp.inf).init(params)), later


def make_run(setting, evaluation, rule, *, grid: bool):
    """Compiles a function of (seeds, data, first rate, rate, value), the data stacked over the seeds.

    ``rule`` makes a temperature of ``value``. With ``grid`` every rate meets every value: axes (rate, value, seed, pass).
    """

    def one(seed, data, first_rate, rate, value) -> Any:
        carry, key = start(seed, setting.sizes)
        first, second = jax.random.split(key)
        if setting.first_passes:
            carry, before = train(
                carry, data, evaluation, first,
                learning_rate=first_rate, temperature=jnp.inf, batch_size=setting.batch_size, passes=setting.first_passes,
            )  # fmt: skip
        else:
            # kl_radius takes over from the state of λ = ∞ that start() made, as it does in the second of two stages.
            before = None
        _, after = train(
            carry, data, evaluation, second,
            learning_rate=rate, temperature=rule(value), batch_size=setting.batch_size, passes=setting.passes,
        )  # fmt: skip
        return after if before is None else jax.tree.map(lambda *h: jnp.concatenate(h), before, after)

    run = jax.vmap(one, (0, 0, None, None, None))
    if grid:
        run = jax.vmap(run, (None, None, None, None, 0))
        run = jax.vmap(run, (None, None, None, 0, None))
    return jax.jit(run)
