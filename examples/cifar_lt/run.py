"""Runs from their settings to their results: segments in groups, checkpoints, metrics, a progress bar."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from examples.cifar_lt import checkpoint, plan
from examples.cifar_lt.config import Config, jsonable
from examples.cifar_lt.environment import hardware, versions
from examples.cifar_lt.imbalance import groups
from examples.cifar_lt.plan import Segment
from examples.cifar_lt.schedule import Hyper, make_hyper
from examples.cifar_lt.subsets import Splits, prepare
from examples.cifar_lt.train import Data, Functions, State, make_functions, precision

COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(bar_width=20),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[shown]}"),
)
FEATURES_PER_CLASS = 100


class OutOfTimeError(Exception):
    """The time that was given is over; the same command goes on."""


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
    of_segment = {segment: config for config, segment in ends.items()}
    with Progress(*COLUMNS, console=console) as progress:
        task = progress.add_task("epochs", total=total, shown="")
        for chunk in chunks:
            if not all(checkpoint.is_finished(work / s.name) for s in chunk):
                _train(chunk, work, progress, task, deadline)
            else:
                progress.advance(task, sum(s.until - s.first for s in chunk))
            for segment in chunk:
                config = of_segment.get(segment)
                if config is not None and not results[config].exists():
                    _finish(segment, work, results[config], command(config))
    return {config: json.loads(path.read_text()) for config, path in results.items()}


def kind(segment: Segment) -> str:
    """What segments that train together have in common: the program, its inputs' structure and the images."""
    config, hyper = segment.config, make_hyper(segment.config, np.array([segment.config.batch_size]), segment.first)
    return f"{_program(config)} {config.classifier} {jax.tree.structure(hyper)}"


def _program(config: Config) -> Config:
    """The settings that a program depends on; the others are its inputs."""
    return dataclasses.replace(
        config,
        seed=0,
        loss="ldam" if config.cosine else "ce",
        temperature=1.0 if config.algorithm == "recover" else math.inf,
        kl_radius=None,
        gamma=0.9,
        log_alpha=None,
        start=None,
        balanced_batches=False,
        classifier="joint",
        label_smoothing=0.0,
        mixup=False,
        cutout=0,
        trained="all",
        learning_rate=0.1,
        decay=0.1,
        momentum=0.9,
        weight_decay=0.0,
        out=None,
    )


class Images(NamedTuple):
    """The images of a run, on the host and on the device, and how many of each class are trained on."""

    splits: Splits
    data: dict[str, Data]
    counts: np.ndarray


def images_of(config: Config) -> Images:
    return _load(dataclasses.replace(_program(config), loss="ce", algorithm="absgd", temperature=math.inf))


@cache
def _load(source: Config) -> Images:
    splits = prepare(source)
    on_device = {name: Data(*map(jnp.asarray, split)) for name, split in splits._asdict().items()}
    return Images(splits, on_device, np.bincount(splits.train.labels, minlength=source.classes))


@cache
def _functions(program: Config, counts: tuple[int, ...]) -> Functions:
    return make_functions(program, np.array(counts))


def all_functions(config: Config, counts: np.ndarray) -> tuple[Functions, Functions]:
    """The functions of a run, and those that do not depend on its algorithm, which are not compiled for each."""
    network = dataclasses.replace(_program(config), algorithm="absgd", temperature=math.inf)
    return _functions(_program(config), tuple(counts)), _functions(network, tuple(counts))


_compiled: dict[Any, Any] = {}


def call(function: Callable, *arguments: Any, donate: bool = False) -> tuple[Any, float]:
    """Calls a function over stacked runs, compiled once for each structure of its arguments, and that time."""
    leaves, structure = jax.tree.flatten(arguments)
    key, began = (function, structure, tuple((x.shape, x.dtype) for x in leaves)), time.perf_counter()
    if key not in _compiled:
        over = over_runs(function, arguments, len(jax.tree.leaves(arguments[0])[0]))
        _compiled[key] = jax.jit(over, donate_argnums=0 if donate else ()).lower(*arguments).compile()
    seconds = time.perf_counter() - began
    return _compiled[key](*arguments), seconds


def over_runs(function: Callable, arguments: Sequence[Any], runs: int) -> Callable:
    """A function of stacked states and hypers, made of one of a single run; images are the same for all."""
    axes = tuple(0 if isinstance(a, (State, Hyper)) else None for a in arguments)
    if runs > 1:
        return jax.vmap(function, axes)

    # XLA's CPU backend is slow with the convolutions of several networks at once, and even of a batch of one.
    def alone(*arguments):
        pairs = zip(arguments, axes, strict=True)
        first = [a if axis is None else jax.tree.map(lambda x: x[0], a) for a, axis in pairs]
        return jax.tree.map(lambda x: x[None], function(*first))

    return alone


def stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


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


def _finish(segment: Segment, work: Path, path: Path, command: str) -> None:
    """Writes a run's result, of the metrics of all its segments."""
    config, lines = segment.config, []
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
