"""The compiled programs: which runs share one, with what images, and how several runs are computed by one call."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from examples.cifar_lt.config import Config
from examples.cifar_lt.plan import Segment
from examples.cifar_lt.schedule import Hyper, make_hyper
from examples.cifar_lt.subsets import Splits, prepare
from examples.cifar_lt.train import Data, Functions, State, make_functions


def kind(segment: Segment) -> str:
    """What segments that train together have in common: the program, its inputs' structure and the images."""
    config, hyper = segment.config, make_hyper(segment.config, np.array([segment.config.batch_size]), segment.first)
    return f"{_program(config)} {config.classifier} {jax.tree.structure(hyper)}"


def _program(config: Config) -> Config:
    """The settings that a program depends on; the others are its inputs."""
    return dataclasses.replace(
        config,
        seed=0,
        loss="ldam" if config.cosine else "ce",
        temperature=1.0 if config.algorithm == "recover" else math.inf,
        kl_radius=None,
        gamma=0.9,
        log_alpha=None,
        start=None,
        balanced_batches=False,
        classifier="joint",
        label_smoothing=0.0,
        mixup=False,
        cutout=0,
        trained="all",
        learning_rate=0.1,
        decay=0.1,
        momentum=0.9,
        weight_decay=0.0,
        out=None,
    )


class Images(NamedTuple):
    """The images of a run, on the host and on the device, and how many of each class are trained on."""

    splits: Splits
    data: dict[str, Data]
    counts: np.ndarray


def images_of(config: Config) -> Images:
    return _load(dataclasses.replace(_program(config), loss="ce", algorithm="absgd", temperature=math.inf))


@cache
def _load(source: Config) -> Images:
    splits = prepare(source)
    on_device = {name: Data(*map(jnp.asarray, split)) for name, split in splits._asdict().items()}
    return Images(splits, on_device, np.bincount(splits.train.labels, minlength=source.classes))


@cache
def _functions(program: Config, counts: tuple[int, ...]) -> Functions:
    return make_functions(program, np.array(counts))


def all_functions(config: Config, counts: np.ndarray) -> tuple[Functions, Functions]:
    """The functions of a run, and those that do not depend on its algorithm, which are not compiled for each."""
    network = dataclasses.replace(_program(config), algorithm="absgd", temperature=math.inf)
    return _functions(_program(config), tuple(counts)), _functions(network, tuple(counts))


_compiled: dict[Any, Any] = {}


def call(function: Callable, *arguments: Any, donate: bool = False) -> tuple[Any, float]:
    """Calls a function over stacked runs, compiled once for each structure of its arguments, and that time."""
    leaves, structure = jax.tree.flatten(arguments)
    key, began = (function, structure, tuple((x.shape, x.dtype) for x in leaves)), time.perf_counter()
    if key not in _compiled:
        over = over_runs(function, arguments, len(jax.tree.leaves(arguments[0])[0]))
        _compiled[key] = jax.jit(over, donate_argnums=0 if donate else ()).lower(*arguments).compile()
    seconds = time.perf_counter() - began
    return _compiled[key](*arguments), seconds


def over_runs(function: Callable, arguments: Sequence[Any], runs: int) -> Callable:
    """A function of stacked states and hypers, made of one of a single run; images are the same for all."""
    axes = tuple(0 if isinstance(a, (State, Hyper)) else None for a in arguments)
    if runs > 1:
        return jax.vmap(function, axes)

    # XLA's CPU backend is slow with the convolutions of several networks at once, and even of a batch of one.
    def alone(*arguments):
        pairs = zip(arguments, axes, strict=True)
        first = [a if axis is None else jax.tree.map(lambda x: x[0], a) for a, axis in pairs]
        return jax.tree.map(lambda x: x[None], function(*first))

    return alone


def stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
