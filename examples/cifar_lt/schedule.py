"""What changes in the course of training: the learning rate and λ."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import absgd_jax
from examples.cifar_lt.config import Config
from examples.cifar_lt.errors import UserError


def steps_per_epoch(config: Config, class_counts: np.ndarray) -> int:
    """Whole batches in the training set."""
    examples = int(np.sum(class_counts))
    if examples < config.batch_size:
        raise UserError(f"--batch-size {config.batch_size} is more than the {examples} training images.")
    return examples // config.batch_size


def make_learning_rate(config: Config, steps: int) -> optax.Schedule:
    """By the epoch: rising in equal parts over the warm-up, then constant but for two decays."""

    def learning_rate(count):
        epoch = count // steps
        warm = jnp.minimum((epoch + 1) / max(config.warmup, 1), 1)
        decays = jnp.where(epoch >= config.second_stage, 1, 0) + jnp.where(epoch >= config.second_decay, 1, 0)
        return config.learning_rate * warm * config.decay**decays

    return learning_rate


def temperature_rules(config: Config, steps: int) -> tuple[Any, Any]:
    """What ABSGD takes for its temperature in the first and in the second stage, each a pytree.

    λ is ∞ in the first stage. A fixed λ is one schedule over both; a KL radius takes over from λ = ∞.
    """
    if config.kl_radius is not None:
        return math.inf, absgd_jax.kl_radius(config.kl_radius, batch_size=config.batch_size)
    rule = jax.tree_util.Partial(_two_stages, config.temperature, config.second_stage * steps)
    return rule, rule


def _two_stages(temperature, start, count):
    return jnp.where(count < start, jnp.inf, temperature)
