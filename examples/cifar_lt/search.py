"""Where does robust weighting pay? Random recipes, each with SGD and with ABSGD, compared on the validation split.

python -m examples.cifar_lt.search --recipes 40 --data-dir data

The budget is the number of recipes. The best of either method are run with more seeds. The test set plays no part.
Writes search.json and search.png; can be stopped and started again.
"""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tyro
from rich.console import Console

from examples.cifar_lt import checkpoint
from examples.cifar_lt.cells import TUNING_SEED, parse_column
from examples.cifar_lt.config import Config, Preset
from examples.cifar_lt.configs import CONFIGS
from examples.cifar_lt.errors import exit_code
from examples.cifar_lt.plan import Segment
from examples.cifar_lt.run import run
from examples.cifar_lt.sweep import command

matplotlib.use("Agg")

FACTORS: dict[str, dict[str, dict[str, Any]]] = {
    "loss": {
        **{name: {"loss": name} for name in ("ce", "cb-ce", "logit-adjustment")},
        "ce, resampled": {"balanced_batches": True},
    },
    "λ finite after": {f"{part:.0%}": {"start": part} for part in (0.0, 0.25, 0.5, 0.8)},
    "decay": {f"{decay:g}": {"decay": decay} for decay in (0.01, 0.1, 0.5)},
    "strength": {
        **{f"λ {t:g}": {"temperature": t} for t in (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)},
        **{f"ρ {r:g}": {"kl_radius": r} for r in (0.1, 0.3, 1.0)},
    },
    "γ": {f"{gamma:g}": {"gamma": gamma} for gamma in (0.1, 0.9)},
    "augmentation": {
        "crop, flip": {},
        "mixup": {"mixup": True},
        "cut-out": {"cutout": 16},
        "smoothing": {"label_smoothing": 0.1},
    },
    "trained": {name: {"trained": name} for name in ("all", "last-block", "classifier")},
}
WEIGHTING = ("temperature", "kl_radius", "gamma", "start")  # what SGD does not have


@dataclasses.dataclass(frozen=True)
class Options:
    """Searches for a recipe."""

    preset: Preset = "mini"
    """The network, the size of the training set and the schedule: see configs/."""
    column: str = "cifar10-lt-100"
    """The dataset, as in a sweep."""
    recipes: int = 40
    """The budget: so many recipes are drawn."""
    finalists: int = 3
    """Of these many recipes of SGD, and as many of ABSGD, the accuracy is a mean over seeds."""
    seeds: int = 3
    """Number of seeds of the finalists."""
    validation: float = 0.1
    """Fraction of each class held out to compare by."""
    out: Path = Path(__file__).parent / "results" / "search"
    """Folder of the results."""
    work: Path = Path("runs")
    """Folder of the checkpoints."""
    data_dir: Path = Path("data")
    """Folder that holds the unpacked official archives, or is to hold them."""


def draw(options: Options) -> Iterator[tuple[dict[str, str], Config, Config]]:
    """Recipes with the settings of SGD and of ABSGD."""
    rng = np.random.default_rng(TUNING_SEED)
    base = dataclasses.replace(CONFIGS[options.preset], **parse_column(options.column))
    base = dataclasses.replace(base, validation=options.validation, data_dir=options.data_dir, seed=TUNING_SEED)
    for _ in range(options.recipes):
        recipe = {factor: str(rng.choice(list(levels))) for factor, levels in FACTORS.items()}
        changes = {k: v for factor, level in recipe.items() for k, v in FACTORS[factor][level].items()}
        changes["start"] = int(changes["start"] * base.epochs)
        shared = {k: v for k, v in changes.items() if k not in WEIGHTING}
        yield recipe, dataclasses.replace(base, **shared), dataclasses.replace(base, **changes)


def search(options: Options, console: Console) -> dict[str, Any]:
    """Trains all recipes, then the best of either method with more seeds; returns what they gave on validation."""
    drawn = list(draw(options))
    sgds, absgds = (list(dict.fromkeys(configs)) for configs in zip(*(pair for _, *pair in drawn), strict=True))
    results = train([*sgds, *absgds], options, console)
    recipes = []
    for recipe, sgd, absgd in drawn:
        before, after = results[sgd], results[absgd]
        recipes.append(
            {
                "recipe": recipe,
                "sgd": before["val_top1"],
                "absgd": after["val_top1"],
                "gain": round(after["val_top1"] - before["val_top1"], 3),
                "ess": after["ess_by_epoch"][-1],
                "commands": [before["command"], after["command"]],
            }
        )
    leaders = []
    for configs in (sgds, absgds):
        leaders += sorted(configs, key=lambda config: -results[config]["val_top1"])[: options.finalists]
    with_seeds = {c: [dataclasses.replace(c, seed=c.seed + i) for i in range(options.seeds)] for c in leaders}
    results = train([config for configs in with_seeds.values() for config in configs], options, console)
    finalists = []
    for config, configs in with_seeds.items():
        accuracies = [results[config]["val_top1"] for config in configs]
        finalists.append({"weighting": config.weighting, "val_top1": accuracies, "command": command(config)})
    some = next(iter(results.values()))
    settings = {name: str(value) for name, value in dataclasses.asdict(options).items() if not isinstance(value, Path)}
    return {
        "command": "python -m examples.cifar_lt.search",
        "options": settings,
        "hardware": some["hardware"],
        "versions": some["versions"],
        "finalists": sorted(finalists, key=lambda finalist: -np.mean(finalist["val_top1"])),
        "recipes": sorted(recipes, key=lambda recipe: -recipe["absgd"]),
    }


def train(configs: Iterable[Config], options: Options, console: Console) -> dict[Config, dict[str, Any]]:
    """The results of the runs, each in a file of its own."""
    names = {config: Segment(config, 0, config.epochs, None).name for config in configs}
    paths = {config: options.work / "results" / f"{name}.json" for config, name in names.items()}
    return run(dict(sorted(paths.items(), key=lambda item: item[1])), options.work, command, console)


def figure(found: dict[str, Any], path: Path) -> None:
    """The gain over SGD against each factor, a point a recipe, and its median."""
    fig, axes = plt.subplots(2, 4, figsize=(12, 5.6), layout="constrained", sharey=True)
    for axis, (factor, levels) in zip(axes.flat, FACTORS.items(), strict=False):
        for i, level in enumerate(levels):
            gains = [r["gain"] for r in found["recipes"] if r["recipe"][factor] == level]
            if gains:
                axis.plot(i + np.linspace(-0.2, 0.2, len(gains)), gains, "o", ms=4, color="#0072B2", alpha=0.6)
                axis.hlines(np.median(gains), i - 0.3, i + 0.3, color="#D55E00", lw=2)
        axis.axhline(0, color="black", lw=0.8, ls=":")
        axis.set_xticks(range(len(levels)), list(levels), rotation=30, ha="right", fontsize=8)
        axis.set_title(factor, fontsize=9, loc="left")
    for axis in axes[:, 0]:
        axis.set_ylabel("gain over SGD, points")
    for axis in list(axes.flat)[len(FACTORS) :]:
        axis.set_visible(False)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main(options: Options) -> None:
    """Searches, writes and shows what was found."""
    console = Console()
    found = search(options, console)
    checkpoint.write_json(options.out / "search.json", found)
    figure(found, options.out / "search.png")
    for finalist in found["finalists"]:
        console.print(f"{np.mean(finalist['val_top1']):.2f} %  {finalist['command']}", soft_wrap=True)


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    sys.exit(exit_code(lambda: main(chosen)))
