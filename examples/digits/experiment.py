"""The three settings, and the protocol: choose on the validation split, test once with other seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

import absgd_jax
from examples.digits.data import CLASSES, Split, load, long_tail, wrong_labels
from examples.digits.train import Data, make_run

TUNING_SEEDS = range(1000, 1003)
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
INFINITE = (float("inf"),)


@dataclass(frozen=True)
class Setting:
    """A problem and the methods that meet there."""

    name: str
    title: str
    sizes: Sequence[int]
    batch_size: int
    passes: int
    corrupt: Callable[..., Split]
    watched: str  # the examples whose weights are shown
    methods: dict[str, tuple[Callable[[Any], Any], Sequence[float]]]  # name -> (temperature of a value, values)
    first_passes: int = 0  # passes with SGD that all methods have in common


def fixed(value):
    return value


def radius(value):
    return absgd_jax.kl_radius(value)


SETTINGS = (
    Setting(
        name="stream",
        title="Long tail, 5 passes, linear model",
        sizes=(64, CLASSES),
        batch_size=32,
        passes=5,
        corrupt=long_tail,
        watched="rare classes",
        methods={
            "SGD": (fixed, INFINITE),
            "ABSGD λ": (fixed, (4.0, 2.0, 1.0, 0.5, 0.25, 0.1)),
            "ABSGD KL radius": (radius, (0.1, 0.3, 0.6, 1.0, 1.5)),
        },
    ),
    Setting(
        name="noise",
        title="40 % wrong labels, MLP",
        sizes=(64, 64, CLASSES),
        batch_size=32,
        passes=20,
        corrupt=wrong_labels,
        watched="wrong labels",
        methods={
            "SGD": (fixed, INFINITE),
            "ABSGD λ": (fixed, (-4.0, -2.8, -2.0, -1.4, -1.0, -0.7)),
        },
    ),
    Setting(
        name="fitted",
        title="Long tail, fitted MLP, second stage",
        sizes=(64, 64, CLASSES),
        batch_size=32,
        first_passes=30,
        passes=20,
        corrupt=long_tail,
        watched="rare classes",
        methods={
            "SGD": (fixed, INFINITE),
            "ABSGD λ": (fixed, (10.0, 3.0, 1.0, 0.3)),
            "ABSGD KL radius": (radius, (0.3, 0.6, 1.0, 1.5, 2.3)),
        },
    ),
)


def draw(setting: Setting, train: Split, seeds: Sequence[int]) -> Data:
    """A corrupted training set for each seed, stacked."""
    sets = []
    for seed in seeds:
        split = setting.corrupt(train, np.random.default_rng(seed))
        rare = split.y >= CLASSES // 2 if setting.corrupt is long_tail else split.y != train.y
        sets.append(Data(split.x, split.y, rare.astype(np.float32)))
    return Data(*(jnp.stack(field) for field in zip(*sets, strict=True)))


def run(
    setting: Setting, seeds: Sequence[int], rates: Sequence[float] = RATES, advance=lambda text: None
) -> dict[str, Any]:
    """Every method of a setting: learning rate and temperature from the validation split, then tested once.

    SGD chooses from the same learning rates as ABSGD. The first stage's learning rate is the one with which SGD does
    best by itself. Tuning and testing use different seeds and different subsets.
    """
    train, validation, test = (Split(*map(jnp.asarray, split)) for split in load())
    train = Split(np.asarray(train.x), np.asarray(train.y))
    tuning_seeds, seeds = jnp.array(TUNING_SEEDS), jnp.array(seeds)
    tuning_data, data = draw(setting, train, TUNING_SEEDS), draw(setting, train, list(map(int, seeds)))
    all_rates, first_rate, methods = jnp.array(rates), rates[0], {}
    if setting.first_passes:
        advance(f"{setting.name}: first stage")
        alone = make_run(setting, validation, fixed, grid=True)
        by_rate = [alone(tuning_seeds, tuning_data, rate, jnp.array([0.0]), jnp.array(INFINITE)) for rate in rates]
        first_rate = rates[int(np.argmax([h.accuracy[..., -1, :].mean() for h in by_rate]))]

    for name, (rule, values) in setting.methods.items():
        advance(f"{setting.name}: {name}")
        tuning = make_run(setting, validation, rule, grid=True)
        history = tuning(tuning_seeds, tuning_data, first_rate, all_rates, jnp.array(values))
        grid = np.asarray(history.accuracy[..., -1, :].mean((-1, -2)))  # rate, value
        best_rate, best_value = np.unravel_index(np.argmax(grid), grid.shape)
        rate, value = rates[best_rate], values[best_value]
        tested = make_run(setting, test, rule, grid=False)(seeds, data, first_rate, rate, value)
        per_class = np.asarray(tested.accuracy)  # seed, pass, class
        methods[name] = {
            "learning_rate": rate,
            "value": str(value) if np.isinf(value) else value,
            "validation_grid": grid.round(2).tolist(),
            "accuracy_per_seed": per_class[:, -1].mean(-1).round(3).tolist(),
            "per_class": per_class[:, -1].mean(0).round(3).tolist(),
            "head": _mean_std(per_class[:, -1, : CLASSES // 2].mean(-1)),
            "tail": _mean_std(per_class[:, -1, CLASSES // 2 :].mean(-1)),
            "accuracy": _mean_std(per_class[:, -1].mean(-1)),
            "gain": _mean_std(per_class[:, -1].mean(-1) - methods["SGD"]["accuracy_per_seed"]) if methods else None,
            "accuracy_by_pass": per_class.mean((0, 2)).round(3).tolist(),
            "sample_size_by_pass": np.asarray(tested.sample_size.mean(0)).round(4).tolist(),
            "weight_by_pass": np.asarray(tested.weight.mean(0)).round(4).tolist(),
        }
    return {
        "title": setting.title,
        "watched": setting.watched,
        "first_passes": setting.first_passes,
        "passes": setting.passes,
        "batch_size": setting.batch_size,
        "first_learning_rate": first_rate if setting.first_passes else None,
        "learning_rates_tried": list(rates),
        "values_tried": {name: list(map(str, values)) for name, (_, values) in setting.methods.items()},
        "methods": methods,
    }


def _mean_std(x) -> list[float]:
    return [round(float(np.mean(x)), 3), round(float(np.std(x, ddof=1)) if len(x) > 1 else 0.0, 3)]
