"""An experiment of a few lines from outside: two clouds of points, one of them rare."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
from flax import nnx

from examples.lab import cli, processes
from examples.lab.config import Run
from examples.lab.errors import UserError
from examples.lab.experiment import Experiment
from examples.lab.recipe import Recipe
from examples.lab.schedule import two_stages
from examples.lab.task import Data, Split, Task


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.norm = nnx.Linear(2, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.classifier = nnx.Linear(8, 2, rngs=rngs)

    def features(self, x, *, train):
        return nnx.relu(self.norm(self.hidden(x), use_running_average=not train))

    def __call__(self, x, *, train):
        return self.classifier(self.features(x, train=train))


@dataclasses.dataclass(frozen=True)
class Clouds(Task):
    rare: int = 20
    validation: float = 0.0
    classes = 2

    def load(self, data_dir):
        rng = np.random.default_rng(0)
        draw = lambda *counts: Split(  # noqa: E731
            np.concatenate([rng.normal(2 * c, 1, (n, 2)) for c, n in enumerate(counts)]).astype(np.float32),
            np.repeat(np.arange(2), counts).astype(np.int32),
        )
        return Data(draw(180, self.rare), draw(50, 50), draw(30, 30) if self.validation else None, draw(10, 10))

    def network(self, loss, rngs):
        return Network(rngs)


class Streamed(Clouds):
    """The same points, their batches made on the host."""

    streamed = True


class Sorted(Streamed):
    """The same points as sums of one or two terms; a batch has as many as the longest of them."""

    def load(self, data_dir):
        return Data(*(split and self.in_terms(split) for split in super().load(data_dir)[:4]))

    def in_terms(self, split):
        terms = np.random.default_rng(1).integers(1, 3, len(split.labels)).astype(np.float32)[:, None, None]
        return split._replace(inputs=np.where(np.arange(2)[:, None] < terms, split.inputs[:, None] / terms, 0))

    def lengths(self, split):
        return np.any(split.inputs != 0, axis=-1).sum(axis=-1)

    def batch(self, split, indices, mine=slice(None)):
        whole = super().batch(split, indices)
        return Split(whole.inputs[mine, : self.lengths(whole).max()], whole.labels[mine])

    def prepare(self, inputs):
        return inputs.sum(axis=1)


class Missing(Clouds):
    """Where the first process finds no data."""

    def load(self, data_dir):
        if processes.is_first():
            raise UserError(f"{data_dir} is empty.")
        return super().load(data_dir)


def make_run(recipe):
    kind = {"clouds": Clouds, "streamed": Streamed, "sorted": Sorted, "missing": Missing}[recipe.dataset]
    half, rate = recipe.epochs // 2, recipe.rate
    stages = two_stages(recipe, [(half, (rate, rate)), (half, (rate, 0.0))])
    return Run(task=kind(validation=recipe.validation), seed=recipe.seed, stages=stages)


STRONG = [{"method": "absgd", "temperature": t} for t in (1.0, 5.0)]
EXPERIMENT = Experiment(
    folder=Path(__file__).parent / "toy",
    presets={"tiny": Recipe(preset="tiny", dataset="clouds", epochs=4, begin=0.5, batch_size=40)},
    tables=lambda base: {"1": [{}, *STRONG, {"loss": "cb-ce"}, {"classifier": "ncm"}]},
    make_run=make_run,
    evaluate_every={"tiny": 1},
)

if __name__ == "__main__":
    sys.exit(cli.main(EXPERIMENT))
