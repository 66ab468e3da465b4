"""The paper's Tables 3 and 8: photographs of many classes, and scenes as a stand-in that two CPU cores can train.

python -m examples.imagenet_lt sweep --preset scenes --data-dir data
"""

import dataclasses
from pathlib import Path
from typing import Any

from examples.imagenet_lt.resnet import BLOCKS
from examples.imagenet_lt.task import Photographs
from examples.lab.config import Run
from examples.lab.experiment import Experiment, absgd
from examples.lab.recipe import Recipe
from examples.lab.schedule import two_stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhotoRecipe(Recipe):
    """Trains a ResNet, or its last stage, on photographs with a long tail."""

    dataset: str = "scenes-100"
    """imagenet-lt, places-lt, inaturalist18, or scenes-<imbalance ratio>."""
    depth: int = 50
    """Layers of the network: 10, 50 or 152."""
    pretrained: str | None = "resnet50-imagenet/weights.npz"
    """A .pth file of torchvision or the .npz file of Keras's ResNet-50, in the data folder; None begins at random."""
    frozen: bool = True
    """Train the last stage and the classifier alone, on features that are computed once."""
    trained: str = "last-block"
    """What the second stage trains: all, last-block (with the classifier) or classifier."""
    size: int = 224
    """Pixels that the network sees; scenes have 128."""
    skip_broken: bool = False
    """Leave out images that are missing or broken, and say how many."""
    epochs: int = 10
    begin: float = 0.5
    """Part of the epochs before the second stage. A frozen network has its classifier trained there."""
    rate: float = 0.01
    """Learning rate at the beginning of each half; it falls to 0 in each."""
    weight_decay: float = 5e-4
    batch_size: int = 64

    @property
    def title(self):
        return super().title + ("-fc" if self.trained == "classifier" and self.classifier is None else "")

    def rules(self):
        return super().rules() | {
            f"--depth {self.depth}: choose from {', '.join(map(str, BLOCKS))}": self.depth in BLOCKS,
            f"--trained {self.trained}: choose from {', '.join(Photographs.PARTS)}": self.trained in Photographs.PARTS,
            f"--trained {self.trained}: --frozen has no more than the last stage": not (
                self.frozen and self.trained == "all"
            ),
            "--frozen needs the weights of a trained network, as --pretrained": bool(self.pretrained)
            or not self.frozen,
            f"--dataset {self.dataset}: scenes are small, so they need --frozen": self.frozen
            or not self.dataset.startswith("scenes"),
            f"--dataset {self.dataset}: --size and --skip-broken are for lists of photographs": not (
                self.dataset.startswith("scenes") and (self.size != PhotoRecipe.size or self.skip_broken)
            ),
            f"--size {self.size}: it must be a multiple of 32": self.size >= 32 and self.size % 32 == 0,
        }


def make_run(recipe: PhotoRecipe) -> Run:
    """Two stages, each with a learning rate that falls to 0."""
    turn = round(recipe.begin * recipe.epochs)
    lines = [(turn, (recipe.rate, 0.0)), (recipe.epochs - turn, (recipe.rate, 0.0))]
    first = "classifier" if recipe.frozen else "all"
    stages = two_stages(recipe, lines, second={"trained": recipe.trained}, trained=first)
    task = recipe.make_task(Photographs)
    task.classes  # noqa: B018  a name that is wrong is found before anything is trained
    return Run(task=task, seed=recipe.seed, stages=stages)


ABSGD = absgd((1.0, 5.0, 10.0))
BOUNDED = absgd((0.5, 1.0, 2.0), max_weight=3.0)
LOSSES = ("ce", "cb-ce", "deferred-balanced-softmax")
TABLES = {
    # One stage after the other over the whole network.
    "3": [{"loss": loss, **changes} for loss in ("ce", "cb-ce") for changes in ({}, *ABSGD)],
    # The lower layers stay; the classifier, or the last stage with it.
    "8": [
        *({"loss": loss, "trained": part} for loss in LOSSES for part in ("classifier", "last-block")),
        *({"loss": loss, **changes} for loss in LOSSES for changes in (*ABSGD, *BOUNDED)),
        *({"trained": part, "balanced_batches": True} for part in ("classifier", "last-block")),
        {"method": "meta", "loss": "cb-ce"},
        *({"classifier": name} for name in ("ncm", "crt", "tau-norm", "lws")),
    ],
}


def tables(base: PhotoRecipe) -> dict[str, list[dict[str, Any]]]:
    """The table of a preset. META needs held-out images of each class, which the official lists do not have."""
    name = "8" if base.frozen else "3"
    held_out = base.dataset.startswith("scenes")
    return {name: [row for row in TABLES[name] if held_out or row.get("method") != "meta"]}


SCENES = PhotoRecipe(preset="scenes")
PAPER = dataclasses.replace(SCENES, preset="paper", dataset="places-lt", epochs=60, rate=0.1, batch_size=256)
PRESETS = {
    "scenes": SCENES,
    # Tables 8, 4 and 9: a pretrained network, --depth 152 with its .pth file.
    "paper": dataclasses.replace(PAPER, pretrained="resnet50.pth"),
    # Table 3: the whole network from random numbers, 90 epochs.
    "whole": dataclasses.replace(
        PAPER, preset="whole", dataset="imagenet-lt", frozen=False, pretrained=None, trained="all", depth=10, epochs=90
    ),
}
EXPERIMENT = Experiment(
    folder=Path(__file__).parent,
    presets=PRESETS,
    tables=tables,
    make_run=make_run,
    evaluate_every={"scenes": 5, "paper": 10, "whole": 10},
)
