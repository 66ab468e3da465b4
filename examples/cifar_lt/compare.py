"""SGD, ABSGD and a KL radius side by side: λ and ρ chosen on a validation split, then tested with three seeds.

python -m examples.cifar_lt.compare --preset mini --data-dir data

Can be stopped and started again; what is done is not done twice.
"""

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from examples.cifar_lt import checkpoint
from examples.cifar_lt.config import Preset
from examples.cifar_lt.configs import CONFIGS
from examples.cifar_lt.errors import UserError
from examples.cifar_lt.run import run

TEMPERATURES = (0.3, 1.0, 3.0)
RADII = (0.3, 1.0, 2.0)
TUNING_SEED = 1000
SGD = {"temperature": float("inf"), "kl_radius": None}
RESULTS = Path(__file__).parent / "results"


def compare(preset: Preset = "mini", data_dir: Path = Path("data"), seeds: int = 3, out: Path = RESULTS) -> None:
    """Compares SGD, ABSGD and a KL radius.

    Args:
        preset: the settings that they have in common.
        data_dir: folder that holds the unpacked official archives, or is to hold them.
        seeds: number of seeds to test with.
        out: folder of the results; a subfolder is made for the preset.
    """
    console, folder = Console(), out / preset
    folder.mkdir(parents=True, exist_ok=True)

    def result(name: str, changes: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
        """One run. Its first stage is taken over from that of SGD, with which it is the same."""
        config = dataclasses.replace(CONFIGS[preset], data_dir=data_dir, **common, **changes)
        options = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in {**common, **changes}.items())
        checkpoint.branch(dataclasses.replace(config, **SGD).folder, config.folder, config.second_stage)
        done = run(config, f"python -m examples.cifar_lt.main --preset {preset} {options}", console)
        shutil.copy(config.folder / "result.json", folder / f"{name}.json")
        return done

    def best(field: str, values: tuple[float, ...]) -> dict[str, float]:
        """The value with the highest validation accuracy, one seed."""
        scores = {v: result(f"validation-{field}{v:g}", {field: v}, tuning)["val_top1"] for v in values}
        return {field: max(scores, key=lambda value: scores[value])}

    tuning = {"validation": 0.1, "seed": TUNING_SEED}
    result("validation-sgd", {}, tuning)
    methods = {"sgd": {}, "absgd": best("temperature", TEMPERATURES), "kl-radius": best("kl_radius", RADII)}
    for seed in range(seeds):
        for name, changes in methods.items():
            result(f"{name}-s{seed}", changes, {"seed": seed})


if __name__ == "__main__":
    try:
        tyro.cli(compare)
    except UserError as error:
        sys.exit(str(error))
