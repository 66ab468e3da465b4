"""python -m examples.tabular train | sweep | search | profile | report."""

import sys

from examples.lab import cli
from examples.tabular.experiment import EXPERIMENT

sys.exit(cli.main(EXPERIMENT))
