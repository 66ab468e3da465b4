"""python -m examples.imagenet_lt train | sweep | search | profile | report."""

import sys

from examples.imagenet_lt.experiment import EXPERIMENT
from examples.lab import cli

sys.exit(cli.main(EXPERIMENT))
