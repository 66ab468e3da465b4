"""Runs from their settings to their results: segments in groups, checkpoints, metrics, a progress bar."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from examples.cifar_lt import checkpoint, plan
from examples.cifar_lt.config import Config, jsonable
from examples.cifar_lt.errors import OutOfTimeError
from examples.cifar_lt.imbalance import groups
from examples.cifar_lt.plan import Segment
from examples.cifar_lt.programs import Images, all_functions, call, images_of, kind, over_runs, stack
from examples.cifar_lt.schedule import Hyper, make_hyper
from examples.cifar_lt.train import Data, Functions, State, precision
from examples.environment import hardware, versions

COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(bar_width=20),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[shown]}"),
)
FEATURES_PER_CLASS = 100


def run(
    results: dict[Config, Path],
    work: Path,
    command: Callable[[Config], str],
    console: Console,
    *,
    runs_together: int = 1,
    deadline: float = math.inf,
) -> dict[Config, dict[str, Any]]:
    """Trains all runs to the end, from the last checkpoints where there are any; those with a result are finished.

    Args:
      results: the file for the result of each run.
      work: folder of the checkpoints.
      command: makes the command that gives a run.
      console: where the progress is shown.
      runs_together: how many runs are trained in one program at most.
      deadline: ``time.monotonic()`` after which no epoch is begun.

    Returns:
      The result of each run.

    Raises:
      OutOfTimeError: when the deadline has passed; all finished epochs are kept.
    """
    for config, path in results.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.claim(path, config.identity())
    ends = plan.segments(results)
    unfinished = [ends[config] for config, path in results.items() if not path.exists()]
    chunks = plan.together(unfinished, kind, runs_together)
    total = sum((s.until - s.first) for chunk in chunks for s in chunk)
    with Progress(*COLUMNS, console=console) as progress:
        task = progress.add_task("epochs", total=total, shown="")
        for chunk in chunks:
            if not all(checkpoint.is_finished(work / s.name) for s in chunk):
                _train(chunk, work, progress, task, deadline)
            else:
                progress.advance(task, sum(s.until - s.first for s in chunk))
            for config, segment in ends.items():
                if segment in chunk and not results[config].exists():
                    _finish(config, segment, work, results[config], command(config))
    return {config: json.loads(path.read_text()) for config, path in results.items()}


def _train(chunk: Sequence[Segment], work: Path, progress: Progress, task: Any, deadline: float) -> None:
    """Trains segments together and leaves the state and the metrics of each."""
    config, first, until = chunk[0].config, chunk[0].first, chunk[0].until
    images = images_of(config)
    functions, network = all_functions(config, images.counts)
    hyper = stack([make_hyper(s.config, images.counts, first) for s in chunk])
    label = chunk[0].config.name if len(chunk) == 1 else f"{len(chunk)} runs"
    progress.update(task, description=label, shown="compiling")
    if chunk[0].parent is None:
        state, _ = call(network.init, hyper)
    else:
        state = stack([checkpoint.load(work / s.parent.name, _shapes(network, hyper)) for s in chunk if s.parent])
        state = over_runs(functions.take_over, (state, hyper), len(chunk))(state, hyper)

    folder = work / checkpoint.name_of([s.name for s in chunk])
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "metrics.jsonl"
    with checkpoint.open_manager(folder) as manager:
        state = checkpoint.restore(manager, state)
        done = int(np.asarray(state.epoch)[0])
        lines = checkpoint.read_metrics(log, done)
        progress.advance(task, len(chunk) * (done - first))
        for epoch in range(done, until):
            if time.monotonic() > deadline:
                raise OutOfTimeError
            began = time.perf_counter()
            arguments = state, images.data["train"], images.data["held_out"], hyper
            (state, metrics), compiling = call(functions.train_epoch, *arguments, donate=True)
            line: dict[str, Any] = {"epoch": epoch + 1}
            line |= {name: np.asarray(value, float).tolist() for name, value in metrics._asdict().items()}
            if (epoch + 1) % config.eval_every == 0 or epoch + 1 == until:
                accuracies, evaluating = _evaluate(network, state, images)
                line, compiling = line | accuracies, compiling + evaluating
            line["compile_seconds"] = compiling
            line["seconds"] = (time.perf_counter() - began - compiling) / len(chunk)
            line = _finite_json(line)
            checkpoint.append_metrics(log, line)
            checkpoint.save(manager, epoch + 1, state)
            lines.append(line)
            progress.update(task, advance=len(chunk), shown=_shown(line))
    if config.classifier != "joint":
        began = time.perf_counter()
        state, compiling = call(network.refit[config.classifier], state, images.data["train"])
        accuracies, evaluating = _evaluate(network, state, images)
        compiling += evaluating
        seconds = (time.perf_counter() - began - compiling) / len(chunk)
        lines = [{"epoch": until, "compile_seconds": compiling, "seconds": seconds} | accuracies]
    for i, segment in enumerate(chunk):
        own = [{k: v[i] if isinstance(v, list) else v for k, v in line.items()} for line in lines]
        checkpoint.finish(work / segment.name, jax.tree.map(lambda x, i=i: x[i], state), own)
    checkpoint.remove(folder)


def _shapes(network: Functions, hyper: Hyper) -> State:
    """The shape of one run's state as its parent left it."""
    return jax.eval_shape(network.init, jax.tree.map(lambda x: x[0], hyper))


def _evaluate(network: Functions, state: State, images: Images) -> tuple[dict[str, Any], float]:
    """Accuracies of each run in percent, and the seconds of compilation."""
    seen, seconds = {}, 0.0
    for split, prefix in (("test", ""), ("validation", "val_")):
        data = images.data[split]
        if data.labels.size:
            right, compiling = call(network.evaluate, state, data)
            per_class = 100 * np.asarray(right) / np.bincount(data.labels, minlength=right.shape[-1])
            seen |= {f"{prefix}top1": per_class.mean(-1).tolist(), f"{prefix}per_class": per_class.tolist()}
            seconds += compiling
    return seen, seconds


def _finite_json(line: dict[str, Any]) -> dict[str, Any]:
    return {k: [jsonable(x) for x in v] if isinstance(v, list) else v for k, v in line.items()}


def _finish(config: Config, segment: Segment, work: Path, path: Path, command: str) -> None:
    """Writes a run's result, of the metrics of all its segments."""
    lines = []
    for part in plan.chain(segment):
        lines += checkpoint.finished_metrics(work / part.name)
    trained = [line for line in lines if "loss" in line]
    images = images_of(config)
    per_class = np.array(lines[-1]["per_class"])
    result = {
        "preset": config.preset,
        "column": config.column,
        "method": config.method,
        "loss": config.loss,
        "temperature": jsonable(config.temperature),
        "kl_radius": config.kl_radius,
        "gamma": config.gamma,
        "seed": config.seed,
        "epochs": config.epochs,
        "second_stage": config.second_stage,
        "top1": round(lines[-1]["top1"], 3),
        "val_top1": round(lines[-1]["val_top1"], 3) if "val_top1" in lines[-1] else None,
        "per_class": per_class.round(2).tolist(),
        **{name: round(float(per_class[mask].mean()), 3) for name, mask in groups(images.counts).items() if mask.any()},
        "class_counts": images.counts.tolist(),
        "ess_by_epoch": [jsonable(round(float(line["ess"]), 4)) for line in trained],
        "loss_by_epoch": [jsonable(round(float(line["loss"]), 4)) for line in trained],
        "temperature_by_epoch": [line["temperature"] for line in trained],
        "top1_by_epoch": [[line["epoch"], round(line["top1"], 2)] for line in lines if "top1" in line],
        "seconds": round(sum(line["seconds"] for line in lines), 2),
        "compile_seconds": round(sum(line["compile_seconds"] for line in lines), 2),
        "hardware": hardware(),
        "precision": jnp.dtype(precision()).name,
        "versions": versions(),
        "command": command,
        "config": config.identity(),
    }
    if config.seed == 0 and config.loss == "ce" and config.method in ("sgd", "absgd", "kl-radius"):
        _write_features(segment, work, path, images)
    checkpoint.write_json(path, result)


def _write_features(segment: Segment, work: Path, path: Path, images: Images) -> None:
    """The features of some test images, for a picture of them."""
    (test_images, labels), counts = images.splits.test, images.counts
    _, network = all_functions(segment.config, counts)
    hyper = stack([make_hyper(segment.config, counts, segment.first)])
    state = checkpoint.load(work / segment.name, _shapes(network, hyper))
    chosen = np.concatenate([np.flatnonzero(labels == c)[:FEATURES_PER_CLASS] for c in range(len(counts))])
    data = Data(jnp.asarray(test_images[chosen]), jnp.asarray(labels[chosen]))
    features = np.asarray(call(network.features, stack([state]), data)[0][0], np.float16)
    np.savez_compressed(path.with_name(f"{path.stem}-features.npz"), features=features, labels=labels[chosen])


def _shown(line: dict[str, Any]) -> str:
    """The first run of those that train together, for all."""
    loss, risk, ess, temperature = (float(line[name][0]) for name in ("loss", "risk", "ess", "temperature"))
    accuracy = f"  top-1 {line['top1'][0]:.1f} %" if "top1" in line else ""
    return f"loss {loss:.3f}  risk {risk:.3f}  ess {ess:.0%}  lr {line['lr'][0]:.2g}  λ {temperature:.3g}{accuracy}"
