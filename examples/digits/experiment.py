"""The settings, and the protocol: choose on the validation split, test once with other seeds."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from rich.progress import Progress

from absgd_jax import kl_radius, trust_fraction, weight_by_absgd, within_groups
from examples.digits.data import CLASSES, Split, load, long_tail, stream, wrong_labels
from examples.digits.train import Data, History, train_together
from examples.environment import hardware, versions

TUNING_SEEDS = range(1000, 1003)
TOGETHER = 15  # runs in one call, so that tuning and testing share a program


class Weighting(NamedTuple):
    """A pair of functions: init() -> state, and update(losses, state, labels) -> (weights, state)."""

    init: Callable
    update: Callable


def absgd(temperature, steps):
    """ABSGD, which does not look at the labels. With λ = ∞ it is SGD."""
    del steps
    weighting = weight_by_absgd(temperature)
    return Weighting(weighting.init, lambda losses, state, labels: weighting.update(losses, state))


def absgd_radius(rho, steps):
    """ABSGD with a KL radius."""
    return absgd(kl_radius(rho), steps)


def absgd_trust(fraction, steps):
    """ABSGD with λ < 0 for a fraction of right labels."""
    return absgd(trust_fraction(fraction), steps)


def annealed(temperature, steps):
    """λ that goes from -4, which is mild, to the given one in the first third of training."""
    return optax.linear_schedule(-4.0, temperature, steps // 3)


def absgd_annealed(temperature, steps):
    """ABSGD with an annealed λ < 0."""
    return absgd(annealed(temperature, steps), steps)


def absgd_within(temperature, steps):
    """ABSGD within classes."""
    del steps
    return within_groups(weight_by_absgd(temperature, gamma=0.1, bias_correction=True), CLASSES)


def absgd_within_annealed(temperature, steps):
    """ABSGD within classes with an annealed λ < 0."""
    return absgd_within(annealed(temperature, steps), steps)


def generalised(q, steps):
    """Generalised cross entropy, (1 - exp(-q L))/q, whose gradient is weighted by exp(-q L)."""
    del steps
    weights = lambda losses, state, labels: (jnp.exp(-q * jax.lax.stop_gradient(losses)), state)  # noqa: E731
    return Weighting(lambda: (), weights)


def generalised_annealed(temperature, steps):
    """The same with a q = -1/λ that rises as |λ| falls."""

    def update(losses, step, labels):
        return generalised(-1 / annealed(temperature, steps)(step), steps).update(losses, (), labels)[0], step + 1

    return Weighting(lambda: jnp.zeros((), int), update)


@dataclass(frozen=True)
class Method:
    """What weights the losses, and the values to choose from."""

    rule: Callable[[Any, int], Any]  # the pair of functions, of a value and of the number of steps
    values: Sequence[float] = (float("inf"),)
    balanced: bool = False  # whether the loss is balanced softmax, else cross entropy


@dataclass(frozen=True)
class Setting:
    """A problem, and what is tried there."""

    title: str
    sizes: tuple[int, ...]
    batch_size: int
    passes: int
    rates: Sequence[float]
    methods: Mapping[str, Method]
    noise: float | None = None  # the fraction of wrong labels; None is the stream
    imbalanced: bool = False  # whether classes with wrong labels have a long tail
    records_per_pass: int = 1


def trust(fraction: float) -> Method:
    """Nothing to tune. Nobody trusts more than 99 %."""
    return Method(absgd_trust, (round(min(fraction, 0.99), 2),))


NEGATIVE = (-4.0, -2.0, -1.4, -1.0)
ANNEALED = -0.7  # the last λ


def noisy_labels(rate: float) -> Setting:
    """A fraction ``rate`` of the labels is wrong."""
    return Setting(
        title=f"{rate:.0%} wrong labels, MLP".replace("%", " %"),
        sizes=(64, 64, CLASSES),
        batch_size=32,
        passes=20,
        rates=(0.01, 0.03, 0.1, 0.3, 1.0),
        methods={
            "SGD": Method(absgd),
            "ABSGD, λ tuned": Method(absgd, NEGATIVE),
            "ABSGD, λ annealed": Method(absgd_annealed, (ANNEALED,)),
            "ABSGD, fraction known": trust(1 - rate),
            "… 0.1 too small": trust(0.9 - rate),
            "… 0.1 too large": trust(1.1 - rate),
        },
        noise=rate,
    )


def noisy_long_tail(rate: float) -> Setting:
    """Rare examples and wrong labels both have large losses. All but SGD are on balanced softmax."""
    return dataclasses.replace(
        noisy_labels(rate),
        title=f"{rate:.0%} wrong labels, long tail, MLP".replace("%", " %"),
        methods={
            "SGD": Method(absgd),
            "Balanced softmax": Method(absgd, balanced=True),
            "Generalised CE": Method(generalised, (0.2, 0.3, 0.5, 0.7), balanced=True),
            "… q annealed": Method(generalised_annealed, (ANNEALED,), balanced=True),
            "ABSGD, λ tuned": Method(absgd, NEGATIVE, balanced=True),
            "ABSGD, λ annealed": Method(absgd_annealed, (ANNEALED,), balanced=True),
            "ABSGD within classes": Method(absgd_within, NEGATIVE, balanced=True),
            "… λ annealed": Method(absgd_within_annealed, (ANNEALED,), balanced=True),
        },
        imbalanced=True,
    )


SETTINGS = (
    Setting(
        title="Long-tailed stream, linear model",
        sizes=(64, CLASSES),
        batch_size=128,
        passes=1,
        rates=(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
        methods={
            "SGD": Method(absgd),
            "ABSGD, λ tuned": Method(absgd, (2.0, 1.0, 0.5, 0.25)),
            "ABSGD, ρ tuned": Method(absgd_radius, (0.6, 1.0, 2.0, 3.0)),
        },
        records_per_pass=20,
    ),
    *map(noisy_labels, (0.0, 0.2, 0.4, 0.6)),
    noisy_long_tail(0.3),
)


def draw(setting: Setting, train: Split, evaluation: Split, seed: int, *, noisy: bool) -> tuple[Data, Split]:
    """The training set of a seed, and the split on which it is evaluated, with as many wrong labels if ``noisy``."""
    rng = np.random.default_rng(seed)
    if setting.noise is None:
        drawn = stream(train, rng)
        return Data(*drawn, (drawn.y >= CLASSES // 2).astype(np.float32)), evaluation
    train = long_tail(train, rng) if setting.imbalanced else train
    drawn = wrong_labels(train, rng, rate=setting.noise)
    evaluation = wrong_labels(evaluation, rng, rate=setting.noise) if noisy else evaluation
    return Data(*drawn, (drawn.y != train.y).astype(np.float32)), evaluation


def every(setting: Setting, method: Method, choices: Sequence[tuple], problems: Mapping[int, tuple]) -> History:
    """The History, with axes (choice, seed, record), of every choice (learning rate, value) with every seed."""

    def counts(data):
        return np.bincount(data.y, minlength=CLASSES) if method.balanced else np.ones(CLASSES, int)

    runs = [
        (*problems[seed], counts(problems[seed][0]), seed, *map(np.float32, choice))
        for choice in choices
        for seed in problems
    ]
    parts = []
    for begin in range(0, len(runs), TOGETHER):
        part = runs[begin : begin + TOGETHER]
        part += part[-1:] * (TOGETHER - len(part))  # the last one is filled up
        stacked = jax.tree.map(lambda *a: np.stack(a), *part)
        schedule = {name: getattr(setting, name) for name in ("batch_size", "passes", "records_per_pass")}
        parts.append(train_together(*stacked, rule=method.rule, sizes=setting.sizes, **schedule))
    shape = len(choices), len(problems)
    return jax.tree.map(lambda *a: np.concatenate(a)[: len(runs)].reshape(*shape, *a[0].shape[1:]), *parts)


def run_all(settings: Iterable[Setting], seeds: Sequence[int], progress: Progress, command: str) -> dict[str, Any]:
    """What the settings gave, and what it depends on."""
    began = time.perf_counter()
    results = [run(setting, seeds, progress) for setting in settings]
    return {
        "command": command,
        "seconds": round(time.perf_counter() - began, 1),
        "hardware": hardware(),
        "versions": versions(),
        "seeds": list(seeds),
        "tuning_seeds": list(TUNING_SEEDS),
        "settings": results,
    }


def run(setting: Setting, seeds: Sequence[int], progress: Progress) -> dict[str, Any]:
    """Every method of a setting: learning rate and temperature from the validation split, then tested once.

    All choose from the same learning rates. Tuning and testing have different seeds and training sets.
    """
    train, validation, test = load()
    tuning = {seed: draw(setting, train, validation, seed, noisy=True) for seed in TUNING_SEEDS}
    final = {seed: draw(setting, train, test, seed, noisy=False) for seed in seeds}
    methods = {}
    for name, method in progress.track(setting.methods.items(), description=setting.title):
        choices = list(itertools.product(setting.rates, method.values))
        scores = every(setting, method, choices, tuning).accuracy[:, :, -1].mean((-1, -2)).tolist()
        score, (rate, value) = max(zip(scores, choices, strict=True))
        tested = every(setting, method, [(rate, value)], final)
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
        "imbalanced": setting.imbalanced,
        "passes": setting.passes,
        "records_per_pass": setting.records_per_pass,
        "batch_size": setting.batch_size,
        "methods": methods,
    }


def _mean_std(x: ArrayLike) -> list[float]:
    return [round(float(np.mean(x)), 3), round(float(np.std(x, ddof=1)) if np.size(x) > 1 else 0.0, 3)]
