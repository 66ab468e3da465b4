"""What a run is: a task, a seed and a tuple of stages.

Runs and stages are pytrees: the numbers in which runs of one program may differ are leaves, all else is static. So the
tree structure of a stage is the key of its compiled program, and stacking leaves makes a batch of runs that train
together. Two runs share exactly their equal first stages.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass

from examples.lab.methods.absgd import Absgd

SGD = Absgd()


def static(default: Any) -> Any:
    """A field that is part of the tree structure."""
    return dataclasses.field(default=default, metadata={"static": True})


@register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """Some epochs in which nothing changes but the learning rate, or none and a classifier fitted to the features."""

    epochs: int = static(0)
    rate: tuple[float, float] = (0.0, 0.0)  # linear learning rate: in the first step, and one step after the last
    rate_by_epoch: bool = static(False)  # whether the rate is constant in an epoch, and reaches its end in the last
    method: Any = SGD  # what makes a gradient of the losses: see methods/
    loss: str = static("ce")  # a name of losses.LOSSES
    class_weights: bool = static(False)  # whether losses are weighted by class (effective number)
    balanced_batches: bool = static(False)  # whether all classes are equally likely in a batch
    trained: str = static("all")  # a part of the network by the task's names: that one and all that come after it
    classifier: str | None = static(None)  # a name of classifiers.CLASSIFIERS, fitted at the end
    batch_size: int = static(128)
    nesterov: bool = static(False)
    momentum: float = 0.9
    weight_decay: float = 0.0

    def rate_at(self, step: jax.Array, steps_per_epoch: jax.Array) -> jax.Array:
        """The learning rate of a step of this stage."""
        first, last = self.rate
        if self.rate_by_epoch:
            part = jnp.floor(step / steps_per_epoch) / max(self.epochs - 1, 1)
        else:
            part = step / (self.epochs * steps_per_epoch)
        return first + (last - first) * part


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A task (hashable: see task.py), a seed, and stages one after another."""

    task: Any
    seed: int
    stages: tuple[Stage, ...]

    @property
    def epochs(self) -> int:
        return sum(stage.epochs for stage in self.stages)

    @property
    def parent(self) -> "Run | None":
        """The run without its last stage."""
        return dataclasses.replace(self, stages=self.stages[:-1]) if len(self.stages) > 1 else None


def describe(value: Any) -> Any:
    """A run, or anything in it, as JSON knows it. What is at its default is left out: new fields change no old run."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        defaults = {f.name: f.default for f in dataclasses.fields(value)}
        changed = {name: describe(v) for name, v in fields.items() if v != defaults[name]}
        return {"is": type(value).__name__} | changed
    if isinstance(value, (tuple, list)):
        return [describe(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


def fingerprint(*values: Any) -> str:
    """A checksum of what :func:`describe` says."""
    return hashlib.sha256(json.dumps([describe(v) for v in values], sort_keys=True).encode()).hexdigest()[:16]


def stack(trees: list[Any]) -> Any:
    """Trees of one structure as one tree, every leaf with a first axis of runs."""
    return jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *trees)


def each(function: Callable[..., Any], *trees: Any) -> Any:
    """A function of every run of stacked trees; one run is not vmapped, because a CPU is slow at such convolutions."""
    if jax.tree.leaves(trees)[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], trees)))
    return jax.vmap(function)(*trees)
