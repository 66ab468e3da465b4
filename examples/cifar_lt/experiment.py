"""The paper's CIFAR tables, and wrong labels: presets and tables, and how a recipe becomes a run.

python -m examples.cifar_lt train --preset fast --method absgd --temperature 1
python -m examples.cifar_lt sweep --preset fast --tables 1 --datasets cifar10-lt-100
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar

from examples.cifar_lt.task import Cifar
from examples.lab.config import Run
from examples.lab.experiment import TUNING_VALIDATION, Experiment, absgd, wrong_labels
from examples.lab.losses import NEEDS_COSINES
from examples.lab.recipe import Recipe
from examples.lab.schedule import Line, two_stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class CifarRecipe(Recipe):
    """Trains a network on an imbalanced subset of CIFAR, or on wrong labels."""

    COSINES: ClassVar[bool] = True

    dataset: str = "cifar10-lt-100"
    """cifar10 or cifar100, long tail (lt) or step (st), imbalance ratio; for wrong labels see the README."""
    network: str = "shallow"
    """shallow, or resnet-<depth>-<channels of the first stage>."""
    epochs: int = 18
    begin: float = 0.8
    """Part of the epochs before the second stage: λ, class weights, batches and trained layers change there."""
    rate: float = 0.05
    """Peak of the learning rate."""
    second_rate: float = 1.0
    """Factor on the learning rate in the second stage."""
    weight_decay: float = 1e-3
    batch_size: int = 64
    n_max: int | None = None
    """The most training images of the largest class. None takes all there are."""
    test_per_class: int | None = None
    """Test images of each class. None takes all there are."""

    @property
    def title(self):
        ending = "" if self.momentum else "-no-momentum"
        at_once = self.begin == 0 and self.method == "absgd" and self.anneal_from is None
        ending += "-one-stage" if at_once else ""
        ending += "" if self.second_rate == 1 else f"-rate{self.second_rate:g}"
        return super().title + ending

    def rules(self):
        parts = self.network.split("-")
        resnet = parts[0] == "resnet" and len(parts) == 3 and all(part.isdigit() for part in parts[1:])
        depth = int(parts[1]) if resnet else 0
        return super().rules() | {
            f"--network {self.network}: shallow, or resnet-<depth>-<channels> with a depth of 6n + 2": self.network
            == "shallow"
            or (depth >= 8 and depth % 6 == 2 and int(parts[2]) >= 1),
            f"--second-rate {self.second_rate}: it must be above 0 and finite": 0 < self.second_rate < math.inf,
            f"--n-max {self.n_max}: it must be at least 1": self.n_max is None or self.n_max >= 1,
            f"--test-per-class {self.test_per_class}: it must be from 1 to 1000": (
                self.test_per_class is None or 1 <= self.test_per_class <= 1000
            ),
            "--classifier replaces a linear classifier, and LDAM's is none": self.classifier is None
            or self.losses[1] not in NEEDS_COSINES,
            f"--loss {self.loss}: its classifier is another than that of cross entropy": (
                (self.losses[0] in NEEDS_COSINES) == (self.losses[1] in NEEDS_COSINES)
            ),
        }


def make_run(recipe: CifarRecipe) -> Run:
    """The paper's two stages, or those of the shallow network."""
    shallow = recipe.network == "shallow"
    stages = two_stages(
        recipe, _lines(recipe), second_rate=recipe.second_rate, nesterov=shallow, rate_by_epoch=not shallow
    )
    task = recipe.make_task(Cifar, network_name=recipe.network, shift=2 if shallow else 4, flipped_test=shallow)
    task.parsed  # noqa: B018  a name that is wrong is found before anything is trained
    return Run(task=task, seed=recipe.seed, stages=stages)


def _lines(recipe: CifarRecipe) -> list[Line]:
    peak, epochs = recipe.rate, recipe.epochs
    if recipe.network == "shallow":
        rise = round(0.2 * epochs)
        return [(rise, (0.0, peak)), (epochs - rise, (peak, 0.0))]
    # As the published code: rising by epochs to the peak, divided after 80 % and again after 90 %.
    rise, first, second = min(5, epochs // 4), math.ceil(0.8 * epochs), math.ceil(0.9 * epochs)
    low, lowest = peak / 100, peak / 10_000
    parts = [(rise, (peak / max(rise, 1), peak)), (first - rise, (peak, peak))]
    return [*parts, (second - first, (low, low)), (epochs - second, (lowest, lowest))]


LOSSES = ("ce", "focal", "ldam", "cb-ce", "cb-focal", "cb-ldam", "deferred-balanced-softmax")
TEMPERATURES = (0.1, 1.0, 5.0, 10.0, 50.0)
ABSGD = absgd(TEMPERATURES)
BOUNDED = absgd((0.5, 1.0, 2.0), max_weight=3.0)
RADII = [
    {"method": "kl-radius", "kl_radius": radius, "max_weight": bound}
    for radius in (0.05, 0.1, 0.3, 1.0)
    for bound in (math.inf, 3.0)
]

LONG_TAIL = {
    # Weights of examples, on the losses of the paper.
    "1": [
        *({"loss": loss, **changes} for loss in LOSSES[:6] for changes in ({}, *ABSGD)),
        *({"loss": loss, "method": "meta"} for loss in LOSSES[:6]),
        {"balanced_batches": True},
    ],
    # Other routes to the same end, other rules for λ and γ, and what came after the paper.
    "2": [
        {},
        {"method": "l2rw"},
        {"method": "recover", "temperature": 1.0},
        {"method": "term", "temperature": 1.0},
        {"method": "adaptive-gamma", "temperature": 1.0, "log_alpha": -1.0},
        *({"loss": loss, **changes} for loss in ("ce", "cb-ce") for changes in RADII),
        *({"loss": loss, **changes} for loss in ("ce", "cb-ce", "deferred-balanced-softmax") for changes in BOUNDED),
        *({"classifier": name} for name in ("ncm", "crt", "tau-norm", "lws")),
        {"momentum": 0.0},
        {"momentum": 0.0, "method": "absgd", "temperature": 1.0},
        {"begin": 0.0, "method": "absgd", "temperature": 1.0},
        *({"loss": "deferred-balanced-softmax", **changes} for changes in ({}, *ABSGD)),
    ],
    # Where the second stage breaks: λ, the bound on the weights, and the learning rate, on the runs to choose by.
    "bounds": [
        *(
            {"second_rate": rate, "validation": TUNING_VALIDATION, **changes}
            for rate in (0.1, 1.0)
            for changes in (
                {},
                *absgd((0.5, 1.0, 2.0, 5.0, 10.0)),
                *absgd((0.5, 1.0, 2.0, 5.0, 10.0), max_weight=3.0),
            )
        ),
        *({"loss": loss, "validation": TUNING_VALIDATION} for loss in ("cb-ce", "deferred-balanced-softmax")),
    ],
}

# Nothing rare and nothing wrong, the method at work throughout: where RGD was published to gain.
BALANCED = [
    {},
    *({"begin": 0.0, "method": "rgd", "parameter": tau} for tau in (0.5, 1.0, 2.0)),
    *({"begin": 0.0, **row} for row in BOUNDED),
]


def long_tail_with_wrong_labels(right: float) -> list[dict[str, Any]]:
    """Rare examples and wrong ones both have large losses: λ of either sign, on cross entropy and on a better loss."""
    negative, rows = absgd((-1.0, -2.0, -5.0)), wrong_labels(right)
    positive = ({"begin": 0.25, **changes} for changes in BOUNDED)
    at_the_end = ({"loss": "deferred-balanced-softmax", **changes} for changes in ({}, *negative, *BOUNDED))
    compared = (row for row in rows if row.get("method") in (None, "absgd", "within-class", "trust", "gce"))
    return [*rows, *positive, *at_the_end, *({"loss": "balanced-softmax", **row} for row in compared)]


def misjudged(right: float, loss: str) -> list[dict[str, Any]]:
    """The part of right labels, given right and wrong, on the runs to choose by."""
    fractions = [round(right + by, 4) for by in (-0.3, -0.2, -0.1, 0.0, 0.1, 0.2, 0.3)]
    rows = [{}, *({"method": "trust", "fraction": f, "begin": 0.0} for f in fractions if 0.1 <= f < 1)]
    return [{"validation": TUNING_VALIDATION, "loss": loss, **row} for row in rows]


# Right labels of CIFAR-10N and CIFAR-100N, by its authors (Wei et al. 2022).
RIGHT = {"aggre": 0.91, "random1": 0.83, "random2": 0.82, "random3": 0.82, "worse": 0.6, "noisy": 0.6}


def tables(base: CifarRecipe) -> dict[str, list[dict[str, Any]]]:
    """The tables of a dataset."""
    name, _, ratio, kind, rate, people = Cifar(dataset=base.dataset, network_name="shallow", shift=2).parsed
    if kind is None and people is None:
        return LONG_TAIL if ratio > 1 else {"balanced": BALANCED}
    # Asymmetric noise replaces labels of half of CIFAR-10's classes.
    right = RIGHT[people] if people else 1 - rate * (0.5 if (name, kind) == ("cifar10", "asym") else 1)
    rows, loss = (wrong_labels, "ce") if ratio == 1 else (long_tail_with_wrong_labels, "balanced-softmax")
    return {"noise": rows(round(right, 4)), "fraction": misjudged(right, loss)}


FAST = CifarRecipe(preset="fast")
PRESETS = {
    # The network of minutes: see the README for its cost and result.
    "fast": FAST,
    # The same network on a part of the images, because wrong labels take more runs.
    "noise": dataclasses.replace(FAST, preset="noise", dataset="cifar10-lt-1-sym0.4", epochs=12, n_max=1000),
    # The paper's section 5, which is the schedule of LDAM; made for one GPU.
    "paper": dataclasses.replace(
        FAST, preset="paper", network="resnet-32-16", epochs=200, rate=0.1, weight_decay=2e-4, batch_size=128
    ),
    # Shows that everything works, in seconds; there is nothing to learn from its accuracy.
    "smoke": dataclasses.replace(
        FAST,
        preset="smoke",
        network="resnet-8-4",
        epochs=5,
        rate=0.1,
        batch_size=32,
        n_max=100,
        test_per_class=20,
    ),
}
EXPERIMENT = Experiment(
    folder=Path(__file__).parent,
    presets=PRESETS,
    tables=tables,
    make_run=make_run,
    evaluate_every={"fast": 4, "noise": 4, "paper": 10, "smoke": 1},
)
