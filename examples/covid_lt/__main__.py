"""python -m examples.covid_lt train | sweep | search | profile | report."""

import sys

from examples.covid_lt.experiment import EXPERIMENT
from examples.lab import cli

sys.exit(cli.main(EXPERIMENT))
