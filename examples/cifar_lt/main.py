"""Trains a CIFAR ResNet on an imbalanced subset with SGD or ABSGD.

python -m examples.cifar_lt.main --preset mini --loss ce --temperature 1.0 --seed 0
"""

import argparse
import sys
from collections.abc import Sequence

import tyro
from rich.console import Console

from examples.cifar_lt.config import Config
from examples.cifar_lt.configs import CONFIGS
from examples.cifar_lt.errors import UserError
from examples.cifar_lt.run import run


def parse(argv: Sequence[str]) -> Config:
    """The settings: those of ``--preset`` (mini where none is named), and what the command line says otherwise."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--preset", nargs="?", default="mini")
    name = finder.parse_known_args(argv)[0].preset
    # An unknown name is reported by tyro, which knows them all.
    return tyro.cli(
        Config, args=argv, default=CONFIGS.get(name, CONFIGS["mini"]), prog="python -m examples.cifar_lt.main"
    )


def main(argv: Sequence[str]) -> int:
    """Runs; returns the exit code: 0, 1 where the run fails, 2 where the command line is at fault."""
    errors = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    try:
        config = parse(argv)
    except UserError as error:
        errors.print(f"Error: {error}")
        return 2
    try:
        result = run(config, " ".join(["python -m examples.cifar_lt.main", *argv]))
    except UserError as error:
        errors.print(f"Error: {error}")
        return 1
    except KeyboardInterrupt:
        errors.print("Stopped. The same command goes on from the last whole epoch.")
        return 1
    print(
        f"top-1 {result['top1']:.2f}% (head {result['head']:.2f}%, tail {result['tail']:.2f}%) after "
        f"{result['epochs']} epochs in {result['seconds']:.0f} s; see {config.folder}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
