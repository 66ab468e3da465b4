"""Tabular data, clean and with wrong labels: do weights by loss help, also where nobody asks for robustness?

python -m examples.tabular sweep --data-dir data
"""

import dataclasses
from pathlib import Path
from typing import Any

from examples.lab.config import Run
from examples.lab.experiment import Experiment, absgd, wrong_labels
from examples.lab.recipe import Recipe
from examples.lab.schedule import two_stages
from examples.tabular.task import Tabular


@dataclasses.dataclass(frozen=True, kw_only=True)
class TabularRecipe(Recipe):
    """Trains a perceptron; the method is at work from the first step to the last."""

    dataset: str = "adult"
    """adult, breast-cancer or digits; with wrong labels such as adult-sym0.2."""
    epochs: int = 10
    """All epochs; the learning rate falls linearly to 0."""
    rate: float = 0.03
    """The learning rate of the first step."""
    weight_decay: float = 1e-4
    batch_size: int = 128


def make_run(recipe: TabularRecipe) -> Run:
    """The second stage alone."""
    task = recipe.make_task(Tabular)
    task.classes  # noqa: B018  a name that is wrong is found before anything is trained
    stages = two_stages(recipe, [(recipe.epochs, (recipe.rate, 0.0))])
    return Run(task=task, seed=recipe.seed, stages=stages)


ROWS = [
    {},
    *absgd((0.5, 1.0, 2.0, 5.0), max_weight=3.0),
    *absgd((-0.5, -1.0, -2.0, -5.0)),
    *({"method": "focus", "fraction": f, "max_weight": 3.0} for f in (0.3, 0.5, 0.7, 0.9)),
    *({"method": "trust", "fraction": f} for f in (0.7, 0.8, 0.9, 0.95)),
    *({"method": "rgd", "parameter": tau} for tau in (0.5, 1.0, 2.0, 5.0)),
    {"loss": "focal"},
]


def tables(base: TabularRecipe) -> dict[str, list[dict[str, Any]]]:
    """The rows of a dataset, by whether labels are wrong."""
    _, rate = Tabular(dataset=base.dataset).parsed
    return {"noise": wrong_labels(round(1 - rate, 4))} if rate else {"1": ROWS}


ADULT = TabularRecipe(preset="adult")
EXPERIMENT = Experiment(
    folder=Path(__file__).parent,
    presets={
        "adult": ADULT,
        # What scikit-learn ships: a few hundred rows.
        "small": dataclasses.replace(ADULT, preset="small", dataset="digits", epochs=50, batch_size=32),
    },
    tables=tables,
    make_run=make_run,
    evaluate_every={"adult": 10, "small": 50},
)
