"""One step of training as a pure function of a stage, a state and a batch: to jit, vmap over runs, shard by batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.tree_util import keystr

import absgd_jax
from examples.lab.config import Stage
from examples.lab.losses import LOSSES
from examples.lab.methods import Batch, Outputs, with_steps
from examples.lab.task import Split, Task, initial, module_of


class State(NamedTuple):
    """Everything that training changes, and the key from which it draws."""

    params: Any
    rest: Any  # what else the network keeps, such as batch statistics
    trace: Any  # of the momentum
    method: Any  # the method's own state
    key: jax.Array  # the seed's, as key data
    step: jax.Array  # shape=(), dtype=int32; steps done
    begun: jax.Array  # shape=(), dtype=int32; the step at which the stage began


class Facts(NamedTuple):
    """What a step knows of the training set."""

    counts: Any  # examples of each class, shape=(C,)
    steps: Any  # in an epoch
    wrong: Any  # shape=(N,), dtype=bool; whether an example's label is known to be wrong


class Metrics(NamedTuple):
    """What is seen of a step, scalars."""

    loss: jax.Array  # mean over the batch
    risk: jax.Array  # the method's objective
    sample_size: jax.Array  # effective sample size, as a fraction of the batch
    largest_weight: jax.Array  # relative to the mean
    weight_of_wrong: jax.Array  # the part of all weight that wrong labels have
    temperature: jax.Array  # λ
    rate: jax.Array


def first_state(task: Task, stage: Stage, size: tuple[int, int], seed: Any) -> State:
    """The state before any training; ``size`` is the number of training examples and of classes."""
    key = jax.random.key(seed)
    params, rest = initial(task, stage.loss, key)
    trace, method = optimizer(stage, 0.0).init(params), stage.method.init(params, size)
    zero = jnp.zeros((), jnp.int32)
    return State(params, rest, trace, method, jax.random.key_data(key), zero, jnp.zeros_like(zero))


def take_over(stage: Stage, carry_method: bool, size: tuple[int, int], state: State) -> State:
    """The state that one stage has left, ready for the next; the momentum goes on, a new method begins anew."""
    method = state.method if carry_method else stage.method.init(state.params, size)
    return state._replace(method=method, begun=state.step)


def optimizer(stage: Stage, rate: Any) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(stage.weight_decay),
        optax.trace(stage.momentum, nesterov=stage.nesterov),
        optax.scale_by_learning_rate(rate),
    )


def train_step(
    task: Task, stage: Stage, state: State, batch: Split, indices: jax.Array, held_out: Split | None, facts: Facts
) -> tuple[State, Metrics]:
    """One update.

    Args:
      task: static.
      stage: its numbers may be traced.
      state: the state before.
      batch: raw inputs and integer labels, shape (B,).
      indices: where in the training set they are, shape (B,).
      held_out: a balanced batch likewise, for methods that need one.
      facts: of the training set.
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    rate = stage.rate_at(state.step - state.begun, facts.steps)
    class_weights = jnp.ones(facts.counts.shape)
    if stage.class_weights:
        class_weights = absgd_jax.losses.class_balanced_weights(facts.counts)
    losses = losses_of(task, stage, state.rest, facts.counts)
    inputs, labels = augmented(task, batch, key)
    seen, balanced = Batch(inputs, labels, class_weights[labels], indices), None
    if held_out is not None:
        inputs, labels = augmented(task, held_out, jax.random.fold_in(key, 2**31 - 1))
        balanced = Batch(inputs, labels, jnp.ones(labels.shape))
    method = with_steps(stage.method, facts.steps)
    method = method if not method.needs_held_out else method.at_rate(rate)
    grads, method_state, info = method.gradient(losses, state.params, state.method, seen, balanced)
    updates, trace = optimizer(stage, rate).update(grads, state.trace, state.params)
    updates = frozen(task, stage, updates, jnp.zeros_like)  # weight decay and old momentum move frozen parts too
    metrics = Metrics(
        loss=jnp.mean(info.losses),
        risk=info.risk,
        sample_size=absgd_jax.effective_sample_size(info.weights) / info.weights.size,
        largest_weight=jnp.max(info.weights) / jnp.mean(info.weights),
        weight_of_wrong=jnp.sum(info.weights, where=facts.wrong[indices]) / jnp.sum(info.weights),
        temperature=info.temperature,
        rate=rate,
    )
    params = optax.apply_updates(state.params, updates)
    return State(params, info.aux.rest, trace, method_state, state.key, state.step + 1, state.begun), metrics


def frozen(task: Task, stage: Stage, params: Any, freeze: Callable[[jax.Array], jax.Array]) -> Any:
    """A pytree like the parameters, changed by ``freeze`` in the parts that a stage does not train."""
    first = task.PARTS.index(stage.trained)
    keep = lambda path, x: x if task.part(keystr(path[:1], simple=True)) >= first else freeze(x)  # noqa: E731
    return jax.tree_util.tree_map_with_path(keep, params)


def losses_of(task: Task, stage: Stage, rest: Any, counts: jax.Array):
    """The losses of a batch as methods get them: see methods/."""

    def losses(params, batch):
        params = frozen(task, stage, params, jax.lax.stop_gradient)  # so no gradient of them is computed
        module = module_of(task, stage.loss, params, rest)
        logits = module(batch.inputs, train=True)
        after = nnx.state(module, nnx.Not(nnx.Param))
        return LOSSES[stage.loss](logits, batch.labels, counts), Outputs(logits, after)

    return losses


def augmented(task: Task, batch: Split, key: jax.Array) -> Split:
    """Raw examples as the network sees them in training."""
    return Split(task.prepare(task.augment(batch.inputs, key)), batch.labels)
