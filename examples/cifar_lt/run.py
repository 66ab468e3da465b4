"""One run from the data to the result, which may be killed at any moment and started again."""

import json
import time
from typing import Any

import jax
import numpy as np

from examples.cifar_lt import data, imbalance
from examples.cifar_lt.checkpoint import Checkpoints
from examples.cifar_lt.config import Config, jsonable
from examples.cifar_lt.progress import make_progress
from examples.cifar_lt.record import Line, MetricsLog, accuracies, make_result, write_whole
from examples.cifar_lt.schedule import steps_per_epoch, temperature_rules
from examples.cifar_lt.train import Data, Functions, make_functions


class Compiled:
    """Compiles a function once for each structure of its arguments and keeps the time apart."""

    def __init__(self, function: Any, **options: Any):
        self._jitted = jax.jit(function, **options)
        self._programs: dict[Any, Any] = {}
        self.seconds = 0.0

    def __call__(self, *args: Any) -> Any:
        kind = jax.tree.structure(args)
        if kind not in self._programs:
            start = time.perf_counter()
            self._programs[kind] = self._jitted.lower(*args).compile()
            self.seconds += time.perf_counter() - start
        # A compiled program refuses arguments of other shapes: nothing can recompile unnoticed.
        return self._programs[kind](*args)


class Evaluation:
    """Evaluates states on one split."""

    def __init__(self, functions: Functions, split: data.Split):
        self._labels = split.labels
        self._data = Data(*jax.device_put(tuple(split)))
        self.program = Compiled(functions.evaluate)

    def __call__(self, state: Any) -> tuple[float, list[float]]:
        return accuracies(np.asarray(self.program(state, self._data)), self._labels)


def make_splits(config: Config) -> tuple[data.Split, data.Split | None, data.Split, np.ndarray]:
    """The training, validation (if any) and test split, and the training images of each class."""
    train, test = data.load(config.dataset, config.data_dir)
    validation = None
    if config.validation:
        held_out = np.floor(config.validation * np.bincount(train.labels)).astype(int)
        chosen = imbalance.subset(train.labels, held_out, config.subset_seed)
        validation = take(train, chosen)
        train = take(train, np.setdiff1d(np.arange(len(train.labels)), chosen))
    n_max = config.n_max or int(np.bincount(train.labels).min())
    counts = imbalance.class_counts(config.imbalance, config.ratio, config.classes, n_max)
    train = take(train, imbalance.subset(train.labels, counts, config.subset_seed))
    if config.test_per_class:
        few = np.full(config.classes, config.test_per_class)
        test = take(test, imbalance.subset(test.labels, few, config.subset_seed))
    return train, validation, test, counts


def take(split: data.Split, indices: np.ndarray) -> data.Split:
    return data.Split(split.images[indices], split.labels[indices])


def run(config: Config, command: str) -> dict[str, Any]:
    """Trains from the newest checkpoint, if there is one, to the end, and returns the result.

    Raises:
      UserError: for anything that the user can mend.
    """
    train, validation, test, counts = make_splits(config)
    functions = make_functions(config, counts)
    stages = temperature_rules(config, steps_per_epoch(config, counts))
    checkpoints = Checkpoints(config.folder / "checkpoints", config.identity())
    state = checkpoints.restore(jax.jit(functions.init)(config.seed))
    done = int(state.epoch)
    log = MetricsLog(config.folder / "metrics.jsonl", done)

    training = Data(*jax.device_put(tuple(train)))
    train_epoch = Compiled(functions.train_epoch, donate_argnums=0)
    evaluate_test = Evaluation(functions, test)
    evaluate_validation = Evaluation(functions, validation) if validation else None
    programs = [train_epoch, evaluate_test.program] + ([evaluate_validation.program] if evaluate_validation else [])

    with make_progress() as progress:
        task = progress.add_task(config.folder.name, total=config.epochs, completed=done, shown="compiling")
        for epoch in range(done, config.epochs):
            start, compiled = time.perf_counter(), sum(program.seconds for program in programs)
            state, metrics = train_epoch(state, training, stages[epoch >= config.second_stage])
            line: Line = {"epoch": epoch + 1}
            line |= {name: jsonable(float(value)) for name, value in metrics._asdict().items()}
            line |= {"top1": None, "per_class": None, "val_top1": None}
            if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
                line["top1"], line["per_class"] = evaluate_test(state)
                line["val_top1"] = evaluate_validation(state)[0] if evaluate_validation else None
            line["compile_seconds"] = sum(program.seconds for program in programs) - compiled
            line["seconds"] = time.perf_counter() - start - line["compile_seconds"]
            log.append(line)
            checkpoints.save(epoch + 1, state)
            progress.update(task, advance=1, shown=shown(line))
    checkpoints.close()

    result = make_result(config, counts, log.lines, command)
    write_whole(config.folder / "result.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


def shown(line: Line) -> str:
    """A line of metrics for the eye."""
    accuracy = "" if line["top1"] is None else f"  top-1 {line['top1']:.1f}%"
    return (
        f"loss {line['loss']:.3g}  risk {float(line['risk']):.3g}  ess {line['ess']:.0%}  lr {line['lr']:.2g}  "
        f"λ {float(line['temperature']):.3g}{accuracy}"
    )
