"""What do many classes cost? The examples' training step with each loss, against a bare step of SGD with cross entropy.

python -m benchmarks.classes

The network is a linear classifier, so all that a step does grows with the classes; a step that computed its loss for
every label would grow with their square. Memory and FLOPs are the compiler's figures, times are ratios to the bare step
that ran in the same round.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import track

from benchmarks.harness import programs
from benchmarks.harness.records import Record, publish, table
from examples import style
from examples.lab.config import Stage
from examples.lab.errors import UserError
from examples.lab.losses import LOSSES
from examples.lab.methods.absgd import Absgd
from examples.lab.task import Split, Task
from examples.lab.train_step import Facts, first_state, optimizer, train_step

BARE = "bare SGD"
MEASURED = [name for name in LOSSES if not name.startswith("logit-adjustment")]  # balanced softmax with another τ
COSTS = {"flops": "FLOPs", "temporary_bytes": "temporary memory"}


@dataclasses.dataclass(frozen=True)
class Options:
    """Cost of classes."""

    classes: tuple[int, ...] = (10, 100, 1000, 10_000)
    """Numbers of classes."""
    features: int = 256
    """Inputs of the classifier."""
    batch_size: int = 128
    """Examples in a batch."""
    rounds: int = 30
    """Timings of each loss."""
    most_seconds: float = 5.0
    """Fewer timings, but at least three, where those of the bare step would take longer."""


class Classifier(nnx.Module):
    def __init__(self, features, classes, rngs):
        self.classifier = nnx.Linear(features, classes, rngs=rngs)

    def __call__(self, x, *, train):
        return self.classifier(x)


@dataclasses.dataclass(frozen=True)
class Linear(Task):
    """A linear classifier of features."""

    features: int
    classes: int

    def load(self, data_dir):
        raise UserError(f"{self} has no data: its batches are random.")

    def network(self, loss, rngs):
        return Classifier(self.features, self.classes, rngs)


def bare(stage: Stage):
    """SGD with cross entropy, without the examples' code and without ABSGD; on their state."""

    def step(state, batch, indices, facts):
        del indices

        def mean(params):
            logits = batch.inputs @ params["classifier"]["kernel"] + params["classifier"]["bias"]
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels))

        rate = stage.rate_at(state.step - state.begun, facts.steps)
        updates, trace = optimizer(stage, rate).update(jax.grad(mean)(state.params), state.trace, state.params)
        params = optax.apply_updates(state.params, updates)
        return state._replace(params=params, trace=trace, step=state.step + 1)

    return step


def ours(task: Task, stage: Stage):
    """The examples' training step."""

    def step(state, batch, indices, facts):
        return train_step(task, stage, state, batch, indices, None, facts)[0]

    return step


def measure(options: Options) -> list[Record]:
    """A record for each number of classes and each loss, under ABSGD."""
    records: list[Record] = []
    for classes in track(options.classes, "classes"):
        task = Linear(options.features, classes)
        keys = jax.random.split(jax.random.key(0), 2)
        inputs = jax.random.normal(keys[0], (options.batch_size, options.features))
        labels = jax.random.randint(keys[1], (options.batch_size,), 0, classes)
        facts = Facts(jnp.arange(classes, 0, -1), 100, jnp.zeros(options.batch_size, bool))
        arguments = Split(inputs, labels), jnp.arange(options.batch_size), facts
        alternatives = {}
        for name in (BARE, *MEASURED):
            stage = Stage(epochs=1, rate=(0.1, 0.0), loss=name, method=Absgd(1.0), batch_size=options.batch_size)
            init = partial(first_state, task, stage, (options.batch_size, classes), 0)
            step = bare(stage) if name == BARE else ours(task, stage)
            alternatives[name] = programs.compile_step(step, init, *arguments)
        _, ratios = programs.time_ratios(alternatives, arguments, options.rounds, most_seconds=options.most_seconds)
        base = programs.figures(alternatives[BARE].compiled)
        for name, program in alternatives.items():
            cost, (median, quartiles) = programs.figures(program.compiled), programs.quartiles(ratios[name])
            records.append(
                {"classes": classes, "loss": name, "time_ratio": median, "time_ratio_quartiles": quartiles}
                | {key: cost[key] for key in COSTS}
                | {f"{key}_ratio": cost[key] / base[key] for key in COSTS}
                | {"batch_size": options.batch_size, "features": options.features}
            )
    return records


def markdown(records: list[Record]) -> str:
    """Each loss's costs relative to the bare step, for growing numbers of classes."""
    rows = []
    for loss in dict.fromkeys(record["loss"] for record in records):
        if loss == BARE:
            continue
        for key, title in {"time_ratio": "time", **{f"{key}_ratio": title for key, title in COSTS.items()}}.items():
            numbers = {f"{r['classes']:,} classes": f"{r[key]:.2f}" for r in records if r["loss"] == loss}
            rows.append({"loss": loss, f"relative to {BARE}": title, **numbers})
    one = records[0]
    return f"{table(rows)}\n\nBatches of {one['batch_size']}, {one['features']} features, ABSGD at λ = 1."


def figure(records: list[Record]) -> Figure:
    """Time relative to the bare step against the number of classes."""
    fig, axis = plt.subplots(figsize=(5, 3), layout="constrained")
    for loss, colour in zip(MEASURED, (style.ABSGD, *style.RIVALS), strict=False):
        own = [record for record in records if record["loss"] == loss]
        axis.plot([r["classes"] for r in own], [r["time_ratio"] for r in own], ".-", color=colour, label=loss)
    axis.axhline(1, color=style.SGD, lw=1)
    axis.set_xscale("log")
    axis.set_ylim(0, 1.1 * np.max([record["time_ratio"] for record in records]))
    axis.set_xlabel("classes")
    axis.set_ylabel(f"time of a step relative to {BARE}")
    axis.legend()
    return fig


if __name__ == "__main__":
    publish("classes", partial(measure, tyro.cli(Options)), markdown, figure)
