"""What an experiment provides: the data and a network. A task is a frozen dataclass whose fields identify both."""

import abc
import dataclasses
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

NUMBER = r"(\d+(?:\.\d+)?)"  # in the name of a dataset


class Split(NamedTuple):
    """Examples and their classes; as NumPy arrays, or on the device."""

    inputs: Any  # arrays with the examples as first axis, a pytree
    labels: Any  # shape=(N,), dtype=int32


class Data(NamedTuple):
    """What a task is trained and evaluated on; ``held_out`` and ``validation`` may be None."""

    train: Split
    test: Split
    validation: Split | None = None
    held_out: Split | None = None  # a few examples of each class, for methods that learn weights on them
    pretrained: Any = None  # what the network's first parameters are made of
    clean: np.ndarray | None = None  # the true labels of the training set, where the given ones may be wrong


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """Base of the tasks. Subclasses define ``load`` and ``network``, and what of the rest they need."""

    @abc.abstractmethod
    def load(self, data_dir: Path) -> Data:
        """The data in their official layout, or a :class:`examples.lab.errors.UserError` that says how to get them."""

    @abc.abstractmethod
    def network(self, loss: str, rngs: nnx.Rngs) -> nnx.Module:
        """A module that maps prepared inputs to logits as ``module(inputs, train=...)``.

        It keeps no keys of :mod:`jax.random`. For second-stage classifiers it has ``features`` and a linear layer
        ``classifier``.
        """

    def calibrate(self, params: nnx.State, rest: nnx.State, data: Data) -> tuple[nnx.State, nnx.State]:
        """Initial parameters, and what else the network keeps, where they depend on the training set."""
        del data
        return params, rest

    streamed = False  # whether batches are made on the host, by ``batch``, and not taken from data on the device

    def batch(self, split: Split, indices: np.ndarray, mine: Any = slice(None)) -> Split:
        """Those examples of a batch that this process needs, as arrays.

        Where batches are made on the host, their shape may depend on ``indices``, not on ``mine``.
        """
        return jax.tree.map(lambda x: x[indices[mine]], split)

    def lengths(self, split: Split) -> np.ndarray | None:
        """By what to sort examples, shape (N,), so that those of a batch are alike; None leaves them in any order."""
        del split
        return None

    def prepare(self, inputs: Any) -> Any:
        """Inputs as the network sees them."""
        return inputs

    def augment(self, inputs: Any, key: jax.Array) -> Any:
        """Raw training inputs, changed at random."""
        del key
        return inputs

    def predict(self, module: Any, inputs: Any) -> jax.Array:
        """Logits for the test."""
        return module(inputs, train=False)

    def part(self, module: str) -> int:
        """Where in ``PARTS`` a module of the network belongs; a stage trains from a part on."""
        return len(self.PARTS) - 1 if module == "classifier" else 0

    PARTS = ("all", "classifier")


@lru_cache(maxsize=32)
def graphdef(task: Task, loss: str):
    """The network's structure without its numbers."""
    module = nnx.eval_shape(lambda: task.network(loss, nnx.Rngs(0)))
    return nnx.split(module, nnx.Param, ...)[0]


def initial(task: Task, loss: str, key: jax.Array) -> tuple[nnx.State, nnx.State]:
    """Parameters, and all else that the network keeps (batch statistics)."""
    _, params, rest = nnx.split(task.network(loss, nnx.Rngs(key)), nnx.Param, ...)
    return params, rest


def module_of(task: Task, loss: str, params: nnx.State, rest: nnx.State) -> Any:
    return nnx.merge(graphdef(task, loss), params, rest, copy=True)
