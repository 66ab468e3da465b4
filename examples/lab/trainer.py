"""Trains what a plan asks for, stage by stage: restore or begin, epochs, evaluation, checkpoint."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from rich.console import Console

from examples.lab import checkpoint, classifiers, evaluate, plan, processes
from examples.lab.config import Run, each, stack
from examples.lab.errors import OutOfTimeError, UsageError
from examples.lab.input_pipeline import (
    HELD_OUT,
    STEPS,
    by_length,
    class_balanced,
    epoch_key,
    shuffled,
    steps_per_epoch,
    stream,
    take,
)
from examples.lab.task import Data, Split, Task
from examples.lab.train_step import Facts, Metrics, State, first_state, take_over, train_step

CHECKPOINT_SECONDS = 10  # at least, from one to the next; on a GPU an epoch takes less than its checkpoint
TIPPING = 5  # times the mean weight; second stages with larger ones, averaged over an epoch, lost what they began with


class Settings(NamedTuple):
    """Where and how to train; nothing here changes a result."""

    data_dir: Path
    work: Path
    evaluate_every: int  # epochs, counted from the beginning of a run; the last epoch of a run is always evaluated
    together: int = 1
    devices: int = 1
    deadline: float = float("inf")  # of time.monotonic(); training stops after the epoch


@lru_cache(maxsize=2)
def load(task: Task, data_dir: Path) -> Data:
    return processes.first_then_others(lambda: task.load(data_dir))


def check(run: Run, data_dir: Path) -> None:
    """That the data have what the methods of a run need, before anything is trained."""
    for method in (stage.method for stage in run.stages):
        if method.needs_held_out and load(run.task, data_dir).held_out is None:
            raise UsageError(f"{type(method).__name__} needs held-out examples, and {run.task} has none.")


def train(
    runs: Sequence[Run],
    settings: Settings,
    console: Console,
    finished: Callable[[Run], None],
    title: Callable[[Run], str],
) -> None:
    """Trains the runs as far as their states are not in ``settings.work``; ``finished`` is called for each of them.

    ``title`` says what is trained, of a run or of the first stages of one.
    """

    def is_done(run):
        return checkpoint.is_finished(folder_of(run, settings))

    with checkpoint.locked(settings.work):
        for run in filter(is_done, runs):
            finished(run)
        for run in runs:
            check(run, settings.data_dir)
        groups = list(plan.groups(runs, is_done, settings.together))
        epochs = [len(members) * members[0].stages[-1].epochs for members in groups]
        began = time.monotonic()
        for i, members in enumerate(groups):
            left = ""
            if done := sum(epochs[:i]):
                minutes = (time.monotonic() - began) / 60 / done * sum(epochs[i:])
                left = f", about {minutes:.0f} min left"
            console.print(f"[bold]{i + 1} of {len(groups)}[/bold]{left}: {title(members[0])}", soft_wrap=True)
            _train_stage(members, settings, console)
            for run in members:
                if run in runs:
                    finished(run)


def folder_of(run: Run, settings: Settings) -> Path:
    return settings.work / plan.key(run)


def size_of(run: Run, data_dir: Path) -> tuple[int, int]:
    """The number of training examples and of classes."""
    return len(load(run.task, data_dir).train.labels), run.task.classes


def shape_of(run: Run, settings: Settings) -> State:
    """The state that a run leaves, without its numbers."""
    return jax.eval_shape(lambda: first_state(run.task, run.stages[-1], size_of(run, settings.data_dir), 0))


def left_by(run: Run, settings: Settings) -> tuple[State, list[dict[str, Any]]]:
    """The state that a run has left, and its metrics, epoch by epoch."""
    return checkpoint.load(folder_of(run, settings), shape_of(run, settings))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _step(task, stages, states, batch, indices, held_out, facts):
    """A step of one run on a batch that was made on the host."""
    return each(lambda stage, state: train_step(task, stage, state, batch, indices, held_out, facts), stages, states)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _steps(task, count, stages, states, i, train, orders, held_out, held_orders, facts):
    """``count`` steps of every run from step ``i`` of the epoch on."""

    def one(stage, state, order, held_order):
        def step(state, i):
            held = held_out and take(held_out, held_order[i])
            return train_step(task, stage, state, take(train, order[i]), order[i], held, facts)

        if count == 1:  # on the CPU the gradients of convolutions are 50 times slower in a loop
            state, metrics = step(state, i)
            return state, jax.tree.map(lambda x: x[None], metrics)
        return jax.lax.scan(step, state, i + jnp.arange(count))

    return each(one, stages, states, orders, held_orders)


def _train_stage(members: Sequence[Run], settings: Settings, console: Console) -> None:
    """The last stage of some runs that share a program, and what they leave."""
    first, stage = members[0], members[0].stages[-1]
    data, stages = load(first.task, settings.data_dir), stack([run.stages[-1] for run in members])
    begin = first.epochs - stage.epochs
    folder = settings.work / f"together-{plan.fingerprint(*map(plan.key, members))}"
    with checkpoint.open_manager(folder / "checkpoints") as manager:
        if manager.latest_step() is None:
            states, done = _begin(members, data, settings), begin
        else:
            one = shape_of(first, settings)
            like = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(members), *x.shape), x.dtype), one)
            states, done = checkpoint.restore(manager, like), manager.latest_step()
        lines = checkpoint.read_lines(folder / "metrics.jsonl", done)
        batches = _Batches(first, data, settings)
        states, over = processes.spread(states, batches.sharding(P())), batches.sharding(P("data"))
        due = time.monotonic()
        for epoch in range(done, first.epochs):
            began = time.perf_counter()
            states, metrics = batches.epoch(stages, states)
            line = {"epoch": epoch + 1, "seconds": (time.perf_counter() - began) / len(members)}
            line |= {name: _summary(name, value).tolist() for name, value in metrics._asdict().items()}
            if (epoch + 1) % settings.evaluate_every == 0 or epoch + 1 == first.epochs:
                line |= _evaluated(first, data, states, over)
            lines.append(line)
            # The line first: one without a checkpoint is taken out again, a checkpoint without a line would be a gap.
            processes.by_first(lambda line=line: checkpoint.append_line(folder / "metrics.jsonl", line))
            stop = processes.agreed(time.monotonic() > settings.deadline)
            if stop or processes.agreed(time.monotonic() >= due):
                checkpoint.save(manager, epoch + 1, states)
                due = time.monotonic() + CHECKPOINT_SECONDS
            console.print(_shown(first, line), soft_wrap=True)
            if stop:
                raise OutOfTimeError
        if stage.classifier is not None:
            states = _fit_classifier(first, data, states, over)
            lines.append({"epoch": first.epochs, "seconds": 0.0, **_evaluated(first, data, states, over)})
    for i, run in enumerate(members):
        before = left_by(run.parent, settings)[1] if run.parent else []
        own = [{k: v[i] if isinstance(v, list) else v for k, v in line.items()} for line in lines]
        checkpoint.finish(folder_of(run, settings), jax.tree.map(lambda x, i=i: x[i], states), [*before, *own])
    processes.by_first(lambda: checkpoint.remove(folder))


def _begin(members: Sequence[Run], data: Data, settings: Settings) -> State:
    """The states with which a stage begins: new ones, or what the stage before has left."""
    begun, size = [], size_of(members[0], settings.data_dir)
    for run in members:
        stage = run.stages[-1]
        if run.parent is None:
            state = jax.jit(first_state, static_argnums=(0, 2))(run.task, stage, size, run.seed)
            params, rest = run.task.calibrate(state.params, state.rest, data)
            begun.append(state._replace(params=params, rest=rest))
        else:
            begun.append(take_over(stage, plan.carries_method(run), size, left_by(run.parent, settings)[0]))
    return stack(begun)


class _Batches:
    """The data on the devices, and the epochs of a stage over them."""

    def __init__(self, run: Run, data: Data, settings: Settings):
        self.task, self.stage = run.task, run.stages[-1]
        self.mesh = jax.make_mesh((settings.devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        labels = data.train.labels
        self.steps = steps_per_epoch(len(labels), self.stage.batch_size) if self.stage.epochs else 0
        wrong = np.zeros(len(labels), bool) if data.clean is None else data.clean != labels
        facts = Facts(np.bincount(labels, minlength=run.task.classes), self.steps, wrong)
        self.facts = processes.spread(facts, self.sharding(P()))
        self.train, self.held_out = data.train, data.held_out if self.stage.method.needs_held_out else None
        if not self.task.streamed:
            self.train, self.held_out = processes.spread((self.train, self.held_out), self.sharding(P()))
        self.lengths = self.task.lengths(data.train)
        self.together = 1 if jax.default_backend() == "cpu" else self.steps

    def sharding(self, spec: P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def orders(self, states: State, purpose: int, split: Split, *, balanced: bool) -> np.ndarray:
        """Indices of the batches of each run's coming epoch, shape (runs, steps, B)."""
        sizes = {"steps": self.steps, "batch_size": self.stage.batch_size}
        keys = [epoch_key(*at, purpose) for at in zip(states.key, states.step, strict=True)]
        draw, of = partial(class_balanced, classes=self.task.classes) if balanced else shuffled, split.labels
        if self.lengths is not None and not balanced:
            draw, of = by_length, self.lengths
        return np.stack([draw(key, of, **sizes) for key in keys])

    def _streamed(self, split: Split, order: np.ndarray) -> Iterator[tuple[Split, jax.Array]]:
        """Batches of one run, of which each process makes its part, and the indices of their examples."""
        over, size = self.sharding(P("data")), self.stage.batch_size
        mine = processes.rows(size, over)
        for batch, indices in zip(stream(self.task, split, order, mine), order[:, mine], strict=True):
            yield processes.gathered((batch, indices), over, size)

    def epoch(self, stages, states: State) -> tuple[State, Metrics]:
        """One epoch of every run; the metrics have the axes (run, step)."""
        orders = self.orders(states, STEPS, self.train, balanced=self.stage.balanced_batches)
        held_orders, seen = np.zeros(len(orders)), []
        if self.held_out is not None:
            held_orders = self.orders(states, HELD_OUT, self.held_out, balanced=True)
        if self.task.streamed:
            held = itertools.repeat((None, None))
            if self.held_out is not None:
                held = self._streamed(self.held_out, held_orders[0])
            for (batch, indices), (apart, _) in zip(self._streamed(self.train, orders[0]), held, strict=False):
                states, metrics = _step(self.task, stages, states, batch, indices, apart, self.facts)
                seen.append(jax.tree.map(lambda x: x[:, None], metrics))
        else:
            over = self.sharding(P(None, None, "data"))
            orders = processes.spread(orders, over)
            if self.held_out is not None:
                held_orders = processes.spread(held_orders, over)
            data = self.train, orders, self.held_out, held_orders, self.facts
            for i in range(0, self.steps, self.together):
                states, metrics = _steps(self.task, self.together, stages, states, i, *data)
                seen.append(metrics)
        return states, jax.tree.map(lambda *parts: np.concatenate(jax.device_get(parts), axis=1), *seen)


def _summary(name: str, values: np.ndarray) -> np.ndarray:
    """Of an epoch, for each run: the last of what goes on from step to step, the mean of what each batch has."""
    return values[:, -1] if name in ("risk", "temperature", "rate") else values.mean(axis=1, dtype=np.float64)


def _evaluated(run: Run, data: Data, states: State, over: NamedSharding) -> dict[str, Any]:
    found = {}
    for name, split in (("test", data.test), ("validation", data.validation)):
        if split is not None and len(split.labels):
            right = evaluate.right(run.task, run.stages[-1].loss, states, split, over)
            found[f"{name}_accuracy"] = (100 * right.mean(axis=1)).tolist()
            per_class = [evaluate.by_class(each, split.labels, run.task.classes) for each in right]
            found[f"{name}_per_class"] = [each.tolist() for each in per_class]
    return found


def _fit_classifier(run: Run, data: Data, states: State, over: NamedSharding) -> State:
    """The states with a classifier fitted to the features of the training set."""
    stage, labels = run.stages[-1], jnp.asarray(data.train.labels)
    fit = jax.jit(classifiers.CLASSIFIERS[str(stage.classifier)])
    fitted = []
    for i, features in enumerate(evaluate.features(run.task, stage.loss, states, data.train, over)):
        state = jax.tree.map(lambda x, i=i: x[i], states)
        layer = state.params["classifier"]
        linear = classifiers.Linear(layer["kernel"][...], layer["bias"][...])
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        linear = fit(jnp.asarray(features), labels, linear, key)
        layer["kernel"][...], layer["bias"][...] = linear
        fitted.append(state)
    return stack(fitted)


def _shown(run: Run, line: dict[str, Any]) -> str:
    """The first of the runs that train together, for all."""
    numbers = {name: values[0] for name, values in line.items() if isinstance(values, list)}
    lam = "∞" if abs(numbers["temperature"]) > 1e38 else f"{numbers['temperature']:.3g}"
    accuracy = f"  test {numbers['test_accuracy']:.2f} %" if "test_accuracy" in numbers else ""
    warning = ""
    if numbers["largest_weight"] > TIPPING:
        hint = ": bound it with --max-weight 3" if hasattr(run.stages[-1].method, "max_weight") else ""
        warning = f"  [yellow]the largest weights are over {TIPPING:g} times the mean{hint}[/]"
    return (
        f"epoch {line['epoch']}/{run.epochs}  loss {numbers['loss']:.4f}  rate {numbers['rate']:.3g}  "
        f"λ {lam}  sample size {numbers['sample_size']:.0%}  "
        f"largest weight {numbers['largest_weight']:.3g}  {line['seconds']:.1f} s{accuracy}{warning}"
    )
