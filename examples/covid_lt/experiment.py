"""The paper's Table 6: X-rays of four classes, of which COVID-19 is the rarest.

python -m examples.covid_lt sweep --data-dir data
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.covid_lt.task import CovidLt
from examples.lab.config import Run
from examples.lab.experiment import Experiment, absgd
from examples.lab.recipe import Recipe
from examples.lab.schedule import thirds, two_stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class CovidRecipe(Recipe):
    """Fine-tunes the last stage of a ResNet-50."""

    dataset: str = "covid-lt-10"
    """covid-lt-<ratio>, or the stand-in xray64-<ratio>."""
    epochs: int = 90
    begin: float = 0.0
    """Part of the epochs before λ and class weights apply; the tables begin class weights after a third."""
    rate: float = 0.1
    """Learning rate; divided by 100 after a third of the epochs, and by 10,000 after two thirds."""
    weight_decay: float = 5e-4
    batch_size: int = 256
    test_per_class: int = 100
    """Test images of each class."""

    def rules(self):
        return super().rules() | {
            f"--test-per-class {self.test_per_class}: it must be at least 1": self.test_per_class >= 1,
        }


def make_run(recipe: CovidRecipe) -> Run:
    """The pretrained network takes the place of a first stage, unless ``begin`` cuts the epochs in two."""
    stages = two_stages(recipe, thirds(recipe.epochs, recipe.rate))
    task = recipe.make_task(CovidLt)
    task.parsed  # noqa: B018  a name that is wrong is found before anything is trained
    return Run(task=task, seed=recipe.seed, stages=stages)


def rows(losses: Sequence[str], changes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Some methods on some losses; class weights, and the method with them, begin when the rate falls."""
    return [
        {"loss": loss, "begin": 1 / 3 if loss.startswith("cb-") else 0.0, **change}
        for loss in losses
        for change in changes
    ]


TABLES = {
    "6": rows(("ce", "cb-ce", "focal", "cb-focal"), [{}, *absgd((1.0, 5.0, 10.0))]),
    # The bounded form.
    "bounded": rows(("ce", "cb-ce"), absgd((0.5, 1.0, 2.0), max_weight=3.0)),
}
PAPER = CovidRecipe(preset="paper")
PRESETS = {
    # The stand-in has a sixth of the images, so batches and rate are a quarter.
    "xray": dataclasses.replace(
        PAPER, preset="xray", dataset="xray64-10", epochs=30, batch_size=64, rate=0.025, test_per_class=50
    ),
    "paper": PAPER,
}
EXPERIMENT = Experiment(
    folder=Path(__file__).parent,
    presets=PRESETS,
    tables=lambda base: TABLES,
    make_run=make_run,
    evaluate_every={"paper": 10, "xray": 10},
)
