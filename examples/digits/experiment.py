"""The three settings, and the protocol: choose on the validation split, test once with other seeds."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

import absgd_jax
from examples.digits.data import CLASSES, Split, load, long_tail, stream, wrong_labels
from examples.digits.train import Data, make_run

TUNING_SEEDS = range(1000, 1003)
RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
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
        radii=(0.1, 0.3, 0.6, 1.0),
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
    return Data(*(jnp.stack(field) for field in zip(*sets, strict=True)))


def run(setting: Setting, seeds: Sequence[int], rates: Sequence[float] = RATES) -> dict[str, Any]:
    """Every method of a setting: learning rate and temperature from the validation split, then tested once.

    SGD chooses from the same learning rates as ABSGD. Tuning and testing have different seeds and training subsets.
    """
    train, *held_out = load()
    validation, test = (Split(*map(jnp.asarray, split)) for split in held_out)
    data = draw(setting, train, seeds)
    tuning_data = draw(setting, train, TUNING_SEEDS)

    families = [(lambda value: value, {"SGD": INFINITE, "ABSGD λ": setting.temperatures})]
    if setting.radii:
        families.append((absgd_jax.kl_radius, {"ABSGD KL radius": setting.radii}))
    methods = {}
    for rule, members in families:
        choices = {name: list(itertools.product(rates, values)) for name, values in members.items()}
        tuning = make_run(setting, validation, rule)
        history = tuning(jnp.array(TUNING_SEEDS), tuning_data, *jnp.array([*itertools.chain(*choices.values())]).T)
        scores = iter(np.asarray(history.accuracy[:, :, -1].mean((-1, -2))).tolist())
        graded = {name: [(next(scores), choice) for choice in tried] for name, tried in choices.items()}
        best = {name: max(grades) for name, grades in graded.items()}
        tested = make_run(setting, test, rule)(
            jnp.array(seeds), data, *jnp.array([choice for _, choice in best.values()]).T
        )
        for i, (name, (score, (rate, value))) in enumerate(best.items()):
            accuracy = np.asarray(tested.accuracy[i])  # seed, record, class
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
                "sample_size_by_record": np.asarray(tested.sample_size[i].mean(0)).round(4).tolist(),
                "weight_by_record": np.asarray(tested.weight[i].mean(0)).round(4).tolist(),
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


def _mean_std(x: np.ndarray) -> list[float]:
    return [round(float(np.mean(x)), 3), round(float(np.std(x, ddof=1)) if len(x) > 1 else 0.0, 3)]
