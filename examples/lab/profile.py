"""Where the time of a step goes: ``python -m examples.<experiment> profile``, with the options of ``train``."""

import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from examples.lab import trainer
from examples.lab.config import Run
from examples.lab.input_pipeline import stream, take
from examples.lab.methods import Batch
from examples.lab.task import Split, Task
from examples.lab.train_step import Facts, augmented, first_state, losses_of, train_step

ROUNDS, SIZE = 20, 1024


def profile(run: Run, data_dir: Path) -> str:
    """The parts of a step of the last stage that trains, on the first batch of the data, as a table in Markdown.

    Each row contains the one above it. Rows are timed in turns, after compilation; FLOPs are the compiler's. The floor
    is the time that the FLOPs would take at the speed of a product of two matrices, measured in the same run. Where
    batches are made on the host, ahead of the step, a first row says how fast: the slower of it and the step waits.
    """
    trainer.check(run, data_dir)
    task, data = run.task, trainer.load(run.task, data_dir)
    stage = next(stage for stage in reversed(run.stages) if stage.epochs)
    labels, size = data.train.labels, trainer.size_of(run, data_dir)
    state = jax.jit(first_state, static_argnums=(0, 2))(task, stage, size, run.seed)
    params, rest = task.calibrate(state.params, state.rest, data)
    state = state._replace(params=params, rest=rest)
    order = np.random.default_rng(0).permutation(len(labels))[: stage.batch_size]
    indices = jnp.arange(len(order)) if task.streamed else jnp.asarray(order)
    facts = Facts(jnp.bincount(labels, length=task.classes), 100, jnp.zeros(len(labels), bool))
    whole = jax.tree.map(jnp.asarray, task.batch(data.train, order) if task.streamed else data.train)
    held = data.held_out and jax.tree.map(lambda x: jnp.asarray(x[: stage.batch_size]), data.held_out)
    matrix = jnp.ones((SIZE, SIZE))

    def batch(state, whole):
        return augmented(task, take(whole, indices), jax.random.wrap_key_data(state.key))

    def forward(state, whole):
        seen = batch(state, whole)
        losses = losses_of(task, stage, state.rest, facts.counts)
        return losses(state.params, Batch(seen.inputs, seen.labels, jnp.ones(seen.labels.shape)))[0]

    def sgd(state, whole):
        return jax.grad(lambda params: jnp.mean(forward(state._replace(params=params), whole)))(state.params)

    def step(state, whole):
        return train_step(
            task, stage, state, take(whole, indices), indices, held if stage.method.needs_held_out else None, facts
        )

    parts = {"batch": batch, "and losses": forward, "and gradient of their mean": sgd, "whole step": step}
    programs = {name: jax.jit(part).lower(state, whole).compile() for name, part in parts.items()}
    calls = {name: (program, (state, whole)) for name, program in programs.items()}
    calls["product"] = jax.jit(jnp.matmul).lower(matrix, matrix).compile(), (matrix, matrix)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, (program, arguments) in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds[name].append(time.perf_counter() - began)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    speed = 2 * SIZE**3 / middle["product"]
    rows = [_row(name, middle[name], program, speed, stage.batch_size) for name, program in programs.items()]
    if task.streamed:
        made = _seconds_on_the_host(task, data.train, np.tile(order, (ROUNDS, 1)))
        rows.insert(0, {"part": "batch on the host", **_times(made, stage.batch_size)})
    table = pd.DataFrame(rows).fillna("–").to_markdown(index=False)
    return f"{table}\n\nA product of matrices: {speed / 1e9:.0f} GFLOP/s. The FLOPs of a loop are counted once."


def _seconds_on_the_host(task: Task, split: Split, order: np.ndarray) -> float:
    """For a batch, when nothing else is done."""
    began = time.perf_counter()
    for _ in stream(task, split, order):
        pass
    return (time.perf_counter() - began) / len(order)


def _times(seconds: float, batch_size: int) -> dict[str, str]:
    return {"time, ms": f"{1e3 * seconds:.1f}", "examples/s": f"{batch_size / seconds:,.0f}"}


def _row(name: str, seconds: float, program: Any, speed: float, batch_size: int) -> dict[str, str]:
    flops = (program.cost_analysis() or {}).get("flops", 0.0)
    return {
        "part": name,
        **_times(seconds, batch_size),
        "GFLOP": f"{flops / 1e9:.2f}",
        "floor, ms": f"{1e3 * flops / speed:.1f}",
        "of the floor's speed": f"{flops / speed / seconds:.0%}",
    }
