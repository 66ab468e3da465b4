"""Trains a CIFAR ResNet on an imbalanced subset: SGD, ABSGD, or ABSGD in a KL ball.

python -m examples.cifar_lt.main --preset smoke --data-dir data
python -m examples.cifar_lt.main --dataset cifar10 --imbalance lt --ratio 100 --loss ce --temperature 1.0 --preset mini

The same command continues a run that was stopped.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from examples.cifar_lt.config import PRESETS, Config
from examples.cifar_lt.configs import CONFIGS
from examples.cifar_lt.errors import exit_code
from examples.cifar_lt.run import run


def parse(arguments: Sequence[str]) -> Config:
    """The preset gives the defaults, the other options change them."""
    presets = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    presets.add_argument("--preset", choices=PRESETS, default="mini")
    preset = presets.parse_known_args(arguments)[0].preset
    return tyro.cli(Config, default=CONFIGS[preset], args=list(arguments))


def train(arguments: Sequence[str]) -> None:
    """One run, from the command line to its accuracy."""
    config = parse(arguments)
    console, folder = Console(), config.out or Path("runs") / f"{config.preset}-{config.column}-{config.name}"
    command = f"python -m examples.cifar_lt.main {shlex.join(arguments)}"
    result = run({config: folder / "result.json"}, folder, lambda _: command, console)[config]
    accuracy = f"test {result['top1']} %, head {result['head']} %, tail {result['tail']} %"
    if result["val_top1"] is not None:
        accuracy = f"validation {result['val_top1']} %, {accuracy}"
    console.print(f"{config.method}: {accuracy}; in {folder}")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: train(sys.argv[1:])))
