"""Choosing on the validation split, then one run on the test split."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from examples.digits.config import LEARNING_RATES, SETTINGS, Method, Setting
from examples.digits.data import Digits
from examples.digits.train import History, train_all


class Result(NamedTuple):
    """One method in one setting."""

    learning_rate: float
    value: float  # the temperature, or the radius
    validation: list[tuple[float, float, float]]  # every choice: learning rate, value, mean accuracy in percent
    history: History  # on the test split, arrays of shape (seeds, passes, ...)


def balanced_accuracy(history: History) -> np.ndarray:
    """The mean over the classes after the last pass, in percent, shape (..., seeds)."""
    return 100 * np.asarray(history.accuracy)[..., -1, :].mean(-1)


def run(
    digits: Digits, settings: dict[str, Setting], seeds: Sequence[int], tuning_seeds: Sequence[int], done: Callable
) -> dict[str, dict[str, Result]]:
    """All methods in all settings; ``done`` is called after each."""
    results: dict[str, dict[str, Result]] = {}
    for name, setting in settings.items():
        first = setting.after and (SETTINGS[setting.after], results[setting.after]["SGD"].learning_rate)
        results[name] = {}
        for method in setting.methods:
            results[name][method.name] = tune_and_test(digits, setting, method, seeds, tuning_seeds, first)
            done()
    return results


def tune_and_test(digits: Digits, setting: Setting, method: Method, seeds, tuning_seeds, first) -> Result:
    """Every learning rate with every value on the validation split; the best one, with new seeds, on the test split."""
    choices = list(itertools.product(LEARNING_RATES, method.values))
    tuned = train_all(setting, method, choices, tuning_seeds, digits.train, digits.validation, first)
    accuracies = balanced_accuracy(tuned).mean(-1)
    best = choices[int(np.argmax(accuracies))]
    history = train_all(setting, method, [best], seeds, digits.train, digits.test, first)
    validation = [(*choice, float(accuracy)) for choice, accuracy in zip(choices, accuracies, strict=True)]
    return Result(*best, validation, jax.tree.map(lambda x: np.asarray(x[0]), history))
