"""The numbers of a run that are inputs of the compiled programs, and how they change in the course of training."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import absgd_jax
from examples.cifar_lt.config import TRAINED, Config
from examples.cifar_lt.errors import UsageError
from examples.cifar_lt.objective import class_weights, index_of


class Hyper(NamedTuple):
    """The numbers in which runs of one program may differ; a pytree. Runs that train together have it stacked."""

    seed: Any  # of the training
    loss: Any  # index into objective.NAMES
    class_weights: Any  # of the second stage, shape (C,)
    balanced: Any  # whether batches are drawn class by class
    label_smoothing: Any
    mixup: Any  # whether images are mixed
    cutout: Any  # side of the square, in pixels
    trained: Any  # index into config.TRAINED
    learning_rate: Any  # between the warm-up and the first decay
    decay: Any
    momentum: Any
    weight_decay: Any
    temperature: Any  # ABSGD's: a schedule (as a pytree) or a KL radius
    gamma: Any  # ABSGD's: a number or SCENT's rule


def steps_per_epoch(config: Config, class_counts: np.ndarray) -> int:
    """Whole batches in the training set."""
    examples = int(np.sum(class_counts))
    if examples < config.batch_size:
        raise UsageError(f"--batch-size {config.batch_size} is more than the {examples} training images.")
    return examples // config.batch_size


def make_hyper(config: Config, class_counts: np.ndarray, epoch: int) -> Hyper:
    """The numbers of a run, from ``epoch`` on. Only a KL radius changes them: λ = ∞ is a schedule, as in SGD."""
    start = config.finite_from * steps_per_epoch(config, class_counts)
    temperature = jax.tree_util.Partial(_two_stages, jnp.float32(config.temperature), jnp.int32(start))
    if config.kl_radius is not None and epoch >= config.finite_from:
        rule = absgd_jax.kl_radius(config.kl_radius, batch_size=config.batch_size)
        temperature = jax.tree.map(jnp.float32, rule)
    weighed = "cb-ce" if config.algorithm == "meta" else config.loss  # META's weights start from those of the classes
    gamma = config.gamma if config.log_alpha is None else absgd_jax.adaptive_gamma(config.log_alpha)
    return Hyper(
        seed=jnp.int32(config.seed),
        loss=jnp.int32(index_of(config.loss)),
        class_weights=jnp.asarray(class_weights(weighed, class_counts)),
        balanced=jnp.asarray(config.balanced_batches),
        label_smoothing=jnp.float32(config.label_smoothing),
        mixup=jnp.asarray(config.mixup),
        cutout=jnp.int32(config.cutout),
        trained=jnp.int32(TRAINED.index(config.trained)),
        learning_rate=jnp.float32(config.learning_rate),
        decay=jnp.float32(config.decay),
        momentum=jnp.float32(config.momentum),
        weight_decay=jnp.float32(config.weight_decay),
        temperature=temperature,
        gamma=jax.tree.map(jnp.float32, gamma),
    )


def _two_stages(temperature, start, count):
    return jnp.where(count < start, jnp.inf, temperature)


def learning_rate(config: Config, hyper: Hyper, epoch: jax.Array) -> jax.Array:
    """Of an epoch: rising in equal parts over the warm-up, then constant but for two decays."""
    warm = jnp.minimum((epoch + 1) / max(config.warmup, 1), 1)
    decays = jnp.where(epoch >= config.second_stage, 1, 0) + jnp.where(epoch >= config.second_decay, 1, 0)
    return hyper.learning_rate * warm * hyper.decay**decays
