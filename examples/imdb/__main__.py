"""python -m examples.imdb train | sweep | search | profile | report."""

import sys

from examples.imdb.experiment import EXPERIMENT
from examples.lab import cli

sys.exit(cli.main(EXPERIMENT))
