"""python -m examples.cifar_lt train | sweep | search | profile | report."""

import sys

from examples.cifar_lt.experiment import EXPERIMENT
from examples.lab import cli

sys.exit(cli.main(EXPERIMENT))
