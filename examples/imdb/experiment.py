"""The paper's Table 5: movie reviews of which 90 % of the negative ones are removed from the training set.

python -m examples.imdb sweep --data-dir data
"""

import dataclasses
from pathlib import Path

from examples.imdb.task import Imdb
from examples.lab.config import Run
from examples.lab.experiment import Experiment, absgd
from examples.lab.recipe import Recipe
from examples.lab.schedule import thirds, two_stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImdbRecipe(Recipe):
    """Trains a bidirectional LSTM on movie reviews."""

    dataset: str = "imdb-10"
    """imdb-<percentage of the negative training reviews that are kept>."""
    epochs: int = 90
    begin: float = 2 / 3
    rate: float = 0.01
    """Learning rate; divided by 100 after a third of the epochs, and by 10,000 after two thirds."""
    falling: bool = False
    """The learning rate falls linearly to 0 instead."""
    weight_decay: float = 5e-4
    batch_size: int = 128
    words: int = 20_000
    """Size of the vocabulary."""
    length: int = 200
    """Words of a review that are read."""
    embedding: int = 100
    """Numbers of a word's vector."""
    hidden: int = 64
    """Units of the LSTM in each direction."""
    glove: str | None = None
    """A file in GloVe's format, whose vectors the words begin with; by default they are random."""

    def rules(self):
        sizes = ("words", "length", "embedding", "hidden")
        return super().rules() | {
            f"--{name} {getattr(self, name)}: it must be at least 1": getattr(self, name) >= 1 for name in sizes
        }


def make_run(recipe: ImdbRecipe) -> Run:
    """The paper's two stages."""
    epochs, rate = recipe.epochs, recipe.rate
    stages = two_stages(recipe, [(epochs, (rate, 0.0))] if recipe.falling else thirds(epochs, rate))
    task = recipe.make_task(Imdb)
    task.kept  # noqa: B018  a name that is wrong is found before anything is trained
    return Run(task=task, seed=recipe.seed, stages=stages)


LOSSES = ("ce", "focal", "cb-ce", "cb-focal")  # the paper's online setting, and its offline one with class weights
BOUNDED = absgd((0.2, 0.5), max_weight=3.0)
PAPER = ImdbRecipe(preset="paper")
PRESETS = {
    # Minutes a run: the rate moves the network to the end.
    "fast": dataclasses.replace(PAPER, preset="fast", epochs=6, rate=1.0, falling=True, weight_decay=1e-4),
    "paper": PAPER,
    # Shows that everything works.
    "smoke": dataclasses.replace(
        PAPER, preset="smoke", epochs=3, rate=0.3, falling=True, batch_size=16, length=20, embedding=8, hidden=4
    ),
}
EXPERIMENT = Experiment(
    folder=Path(__file__).parent,
    presets=PRESETS,
    tables=lambda base: {
        "5": [{"loss": loss, **changes} for loss in LOSSES for changes in ({}, *absgd((1.0, 5.0, 10.0)))],
        # The bounded form.
        "bounded": [{"loss": loss, **changes} for loss in LOSSES[::2] for changes in BOUNDED],
        # Does a loss that knows how rare the negative reviews are do the same?
        "prior": [{"loss": "deferred-logit-adjustment-1.5"}]
        + [{"loss": "deferred-balanced-softmax", **changes} for changes in ({}, *BOUNDED)],
    },
    make_run=make_run,
    evaluate_every={"fast": 6, "paper": 10, "smoke": 1},
)
