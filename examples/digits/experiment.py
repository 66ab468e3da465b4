"""The three settings, and the protocol: choose on the validation split, test once with other seeds."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from rich.progress import Progress

import absgd_jax
from examples.digits.data import CLASSES, Split, load, long_tail, stream, wrong_labels
from examples.digits.train import Data, History, make_run

TUNING_SEEDS = range(1000, 1003)
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
TOGETHER = 20  # runs in one call; one program for tuning and testing, since compiling takes longer than training
INFINITE = (float("inf"),)


@dataclass(frozen=True)
class Setting:
    """A problem, and what is tried there."""

    name: str
    title: str
    sizes: Sequence[int]
    passes: int
    corrupt: Callable[..., Split]
    watched: str  # the examples whose weights are shown
    temperatures: Sequence[float]
    radii: Sequence[float] = ()
    batch_size: int = 32
    records_per_pass: int = 1
    first_passes: int = 0  # passes with SGD that all methods have in common
    first_learning_rate: float = 0.1


LINEAR, MLP = (64, CLASSES), (64, 64, CLASSES)
SETTINGS = (
    Setting(
        name="stream",
        title="Long-tailed stream, linear model",
        sizes=LINEAR,
        batch_size=128,
        passes=1,
        records_per_pass=20,
        corrupt=stream,
        watched="rare classes",
        temperatures=(4.0, 2.0, 1.0, 0.5),
        radii=(0.3, 0.6, 1.0, 2.0),
    ),
    Setting(
        name="noise",
        title="40 % wrong labels, MLP",
        sizes=MLP,
        passes=20,
        corrupt=wrong_labels,
        watched="wrong labels",
        temperatures=(-4.0, -2.0, -1.4, -1.0),
    ),
    Setting(
        name="fitted",
        title="Fitted long tail, MLP, 2nd stage",
        sizes=MLP,
        first_passes=20,
        passes=10,
        corrupt=long_tail,
        watched="rare classes",
        temperatures=(10.0, 1.0, 0.1, 0.01),
        radii=(0.3, 0.6, 1.0, 2.0),
    ),
)


def draw(setting: Setting, train: Split, seeds: Sequence[int]) -> Data:
    """A corrupted training set for each seed, stacked."""
    sets = []
    for seed in seeds:
        split = setting.corrupt(train, np.random.default_rng(seed))
        special = split.y >= CLASSES // 2 if setting.corrupt is not wrong_labels else split.y != train.y
        sets.append(Data(split.x, split.y, special.astype(np.float32)))
    return Data(*map(np.stack, zip(*sets, strict=True)))


def every(program, evaluation: Split, seeds: Sequence[int], data: Data, choices: Sequence[tuple], track) -> History:
    """The History, with axes (choice, seed, record), of every choice (learning rate, value) with every seed."""
    runs = np.array([(i, *choice) for choice in choices for i in range(len(seeds))])
    parts = []
    for begin in track(range(0, len(runs), TOGETHER)):
        part = runs[np.minimum(np.arange(begin, begin + TOGETHER), len(runs) - 1)]  # the last one is filled up
        i = part[:, 0].astype(int)
        own_data = jax.tree.map(lambda field, i=i: field[i], data)
        parts.append(program(evaluation, np.asarray(seeds)[i], own_data, *part[:, 1:].T.astype(np.float32)))
    shape = len(choices), len(seeds)
    return jax.tree.map(lambda *a: np.concatenate(a)[: len(runs)].reshape(*shape, *a[0].shape[1:]), *parts)


def run(setting: Setting, seeds: Sequence[int], rates: Sequence[float], progress: Progress) -> dict[str, Any]:
    """Every method of a setting: learning rate and temperature from the validation split, then tested once.

    SGD chooses from the same learning rates as ABSGD. Tuning and testing have different seeds and training subsets.
    """
    train, validation, test = load()
    data, tuning_data = (draw(setting, train, of) for of in (seeds, TUNING_SEEDS))

    families: list[tuple[Callable, dict]] = [(lambda lam: lam, {"SGD": INFINITE, "ABSGD λ": setting.temperatures})]
    if setting.radii:
        families.append((absgd_jax.kl_radius, {"ABSGD KL radius": setting.radii}))
    methods = {}
    for rule, members in families:
        program = make_run(setting, rule)
        tune, final = (partial(progress.track, description=f"{setting.title}: {step}") for step in ("tune", "test"))
        choices = {name: list(itertools.product(rates, values)) for name, values in members.items()}
        tuning = every(program, validation, TUNING_SEEDS, tuning_data, list(itertools.chain(*choices.values())), tune)
        scores = iter(tuning.accuracy[:, :, -1].mean((-1, -2)).tolist())
        graded = {name: [(next(scores), choice) for choice in tried] for name, tried in choices.items()}
        best = {name: max(grades) for name, grades in graded.items()}
        tested = every(program, test, seeds, data, [choice for _, choice in best.values()], final)
        for i, (name, (score, (rate, value))) in enumerate(best.items()):
            accuracy = tested.accuracy[i]  # seed, record, class
            final = accuracy[:, -1]
            methods[name] = {
                "learning_rate": rate,
                "value": str(value) if np.isinf(value) else value,
                "validation_accuracy": round(score, 2),
                "validation_grid": [[*map(str, choice), round(grade, 2)] for grade, choice in graded[name]],
                "accuracy": _mean_std(final.mean(-1)),
                "head": _mean_std(final[:, : CLASSES // 2].mean(-1)),
                "tail": _mean_std(final[:, CLASSES // 2 :].mean(-1)),
                "gain": _mean_std(final.mean(-1) - methods["SGD"]["accuracy_per_seed"]) if methods else None,
                "accuracy_per_seed": final.mean(-1).round(3).tolist(),
                "per_class": final.mean(0).round(2).tolist(),
                "accuracy_by_record": accuracy.mean((0, 2)).round(2).tolist(),
                "sample_size_by_record": tested.sample_size[i].mean(0).round(4).tolist(),
                "weight_by_record": tested.weight[i].mean(0).round(4).tolist(),
            }
    return {
        "title": setting.title,
        "watched": setting.watched,
        "passes": setting.passes,
        "first_passes": setting.first_passes,
        "first_learning_rate": setting.first_learning_rate if setting.first_passes else None,
        "records_per_pass": setting.records_per_pass,
        "batch_size": setting.batch_size,
        "methods": methods,
    }


def _mean_std(x: ArrayLike) -> list[float]:
    return [round(float(np.mean(x)), 3), round(float(np.std(x, ddof=1)) if np.size(x) > 1 else 0.0, 3)]
