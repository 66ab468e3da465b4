"""The settings, and the protocol: choose on the validation split, test once with other seeds."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from rich.progress import Progress

import absgd_jax
from examples.digits.data import CLASSES, Split, load, stream, wrong_labels
from examples.digits.train import Data, History, train_together

TUNING_SEEDS = range(1000, 1003)
TOGETHER = 15  # runs in one call, so that tuning and testing share a program


@dataclass(frozen=True)
class Setting:
    """A problem, and what is tried there."""

    title: str
    sizes: tuple[int, ...]
    batch_size: int
    passes: int
    rates: Sequence[float]
    methods: Mapping[str, tuple[Callable, Sequence[float]]]  # what makes a temperature of a value, and the values
    noise: float | None = None  # the fraction of wrong labels; None is the stream
    records_per_pass: int = 1


def fixed(lam):
    """The temperature itself."""
    return lam


def trust(fraction: float) -> tuple[Callable, Sequence[float]]:
    """Nothing to tune. Nobody trusts more than 99 %."""
    return absgd_jax.trust_fraction, (round(min(fraction, 0.99), 2),)


def noisy_labels(rate: float) -> Setting:
    """A fraction ``rate`` of the labels is wrong."""
    return Setting(
        title=f"{rate:.0%} wrong labels, MLP".replace("%", " %"),
        sizes=(64, 64, CLASSES),
        batch_size=32,
        passes=20,
        rates=(0.01, 0.03, 0.1, 0.3, 1.0),
        methods={
            "SGD": (fixed, (float("inf"),)),
            "ABSGD, λ tuned": (fixed, (-4.0, -2.0, -1.4, -1.0)),
            "ABSGD, fraction known": trust(1 - rate),
            "… 0.1 too small": trust(0.9 - rate),
            "… 0.1 too large": trust(1.1 - rate),
        },
        noise=rate,
    )


SETTINGS = (
    Setting(
        title="Long-tailed stream, linear model",
        sizes=(64, CLASSES),
        batch_size=128,
        passes=1,
        rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
        methods={
            "SGD": (fixed, (float("inf"),)),
            "ABSGD, λ tuned": (fixed, (2.0, 1.0, 0.5, 0.25)),
            "ABSGD, ρ tuned": (absgd_jax.kl_radius, (0.6, 1.0, 2.0, 3.0)),
        },
        records_per_pass=20,
    ),
    *map(noisy_labels, (0.0, 0.2, 0.4, 0.6)),
)


def draw(setting: Setting, train: Split, evaluation: Split, seed: int, *, noisy: bool) -> tuple[Data, Split]:
    """The training set of a seed, and the split on which it is evaluated, with as many wrong labels if ``noisy``."""
    rng = np.random.default_rng(seed)
    if setting.noise is None:
        drawn = stream(train, rng)
        return Data(*drawn, (drawn.y >= CLASSES // 2).astype(np.float32)), evaluation
    drawn = wrong_labels(train, rng, rate=setting.noise)
    evaluation = wrong_labels(evaluation, rng, rate=setting.noise) if noisy else evaluation
    return Data(*drawn, (drawn.y != train.y).astype(np.float32)), evaluation


def every(setting: Setting, rule: Callable, choices: Sequence[tuple], problems: Mapping[int, tuple]) -> History:
    """The History, with axes (choice, seed, record), of every choice (learning rate, value) with every seed."""
    runs = [(*problems[seed], seed, *map(np.float32, choice)) for choice in choices for seed in problems]
    parts = []
    for begin in range(0, len(runs), TOGETHER):
        part = runs[begin : begin + TOGETHER]
        part += part[-1:] * (TOGETHER - len(part))  # the last one is filled up
        stacked = jax.tree.map(lambda *a: np.stack(a), *part)
        schedule = {name: getattr(setting, name) for name in ("batch_size", "passes", "records_per_pass")}
        parts.append(train_together(*stacked, rule=rule, sizes=setting.sizes, **schedule))
    shape = len(choices), len(problems)
    return jax.tree.map(lambda *a: np.concatenate(a)[: len(runs)].reshape(*shape, *a[0].shape[1:]), *parts)


def run(setting: Setting, seeds: Sequence[int], progress: Progress) -> dict[str, Any]:
    """Every method of a setting: learning rate and temperature from the validation split, then tested once.

    All choose from the same learning rates. Tuning and testing have different seeds and training sets.
    """
    train, validation, test = load()
    tuning = {seed: draw(setting, train, validation, seed, noisy=True) for seed in TUNING_SEEDS}
    final = {seed: draw(setting, train, test, seed, noisy=False) for seed in seeds}
    methods = {}
    for name, (rule, values) in progress.track(setting.methods.items(), description=setting.title):
        choices = list(itertools.product(setting.rates, values))
        scores = every(setting, rule, choices, tuning).accuracy[:, :, -1].mean((-1, -2)).tolist()
        score, (rate, value) = max(zip(scores, choices, strict=True))
        tested = every(setting, rule, [(rate, value)], final)
        accuracy = tested.accuracy[0].astype(float)  # seed, record, class
        last = accuracy[:, -1]
        methods[name] = {
            "learning_rate": rate,
            "value": str(value) if np.isinf(value) else value,
            "validation_accuracy": round(score, 2),
            "validation_grid": [[*map(str, c), round(s, 2)] for c, s in zip(choices, scores, strict=True)],
            "accuracy": _mean_std(last.mean(-1)),
            "worst_class": _mean_std(last.min(-1)),
            "gain": _mean_std(last.mean(-1) - methods["SGD"]["accuracy_per_seed"]) if methods else None,
            "accuracy_per_seed": last.mean(-1).round(3).tolist(),
            "per_class": last.mean(0).round(2).tolist(),
            "accuracy_by_record": accuracy.mean((0, 2)).round(2).tolist(),
            "weight_by_record": tested.weight[0].astype(float).mean(0).round(4).tolist(),
        }
    return {
        "title": setting.title,
        "noise": setting.noise,
        "passes": setting.passes,
        "records_per_pass": setting.records_per_pass,
        "batch_size": setting.batch_size,
        "methods": methods,
    }


def _mean_std(x: ArrayLike) -> list[float]:
    return [round(float(np.mean(x)), 3), round(float(np.std(x, ddof=1)) if np.size(x) > 1 else 0.0, 3)]
