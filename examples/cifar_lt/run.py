"""A run from its settings to its result: epochs, evaluations, checkpoints, metrics, a progress bar."""

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from examples.cifar_lt import checkpoint
from examples.cifar_lt.config import Config, jsonable
from examples.cifar_lt.environment import hardware, versions
from examples.cifar_lt.imbalance import groups
from examples.cifar_lt.schedule import steps_per_epoch, temperature_rules
from examples.cifar_lt.subsets import training_and_held_out
from examples.cifar_lt.train import Data, make_functions, take_over

COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(bar_width=20),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[shown]}"),
)


def run(config: Config, command: str, console: Console) -> dict[str, Any]:
    """Trains to the end, from the last checkpoint where there is one, and returns (and writes) the result."""
    folder = config.folder
    checkpoint.claim(folder, config.identity())
    done = folder / "result.json"
    if done.exists():
        return json.loads(done.read_text())

    train, held_out, counts = training_and_held_out(config)
    functions = make_functions(config, counts)
    train, held_out = (Data(*map(jnp.asarray, split)) for split in (train, held_out))
    held_out_counts = np.bincount(held_out.labels, minlength=config.classes)
    rules = [jax.tree.map(jnp.asarray, rule) for rule in temperature_rules(config, steps_per_epoch(config, counts))]
    compiled, compile_seconds = {}, 0.0

    def call(name, *arguments, **options):
        """Calls a function, compiled before, so that the time that takes is told apart."""
        nonlocal compile_seconds
        key = (name, jax.tree.structure(arguments))
        if key not in compiled:
            start = time.perf_counter()
            compiled[key] = jax.jit(getattr(functions, name), **options).lower(*arguments).compile()
            compile_seconds += time.perf_counter() - start
        return compiled[key](*arguments)

    with (
        checkpoint.open_manager(folder, max(config.second_stage, 1)) as manager,
        Progress(*COLUMNS, console=console) as progress,
    ):
        state = checkpoint.restore(manager, jax.jit(functions.init)(config.seed))
        first, log = int(state.epoch), folder / "metrics.jsonl"
        state = take_over(state, rules[first >= config.second_stage])
        lines = checkpoint.read_metrics(log, first)
        task = progress.add_task(folder.name, total=config.epochs, completed=first, shown="compiling")
        for epoch in range(first, config.epochs):
            rule = rules[epoch >= config.second_stage]
            call_start, compiled_before = time.perf_counter(), compile_seconds
            state, metrics = call("train_epoch", state, train, rule, donate_argnums=0)
            line: dict[str, Any] = {"epoch": epoch + 1}
            line |= {name: jsonable(float(value)) for name, value in metrics._asdict().items()}
            if (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs:
                per_class = 100 * np.asarray(call("evaluate", state, held_out)) / held_out_counts
                line |= {"top1": float(per_class.mean()), "per_class": per_class.tolist()}
            line["seconds"] = time.perf_counter() - call_start - (compile_seconds - compiled_before)
            checkpoint.append_metrics(log, line)
            checkpoint.save(manager, epoch + 1, state)
            lines.append(line)
            progress.update(task, advance=1, shown=_shown(line))

    per_class = np.array(lines[-1]["per_class"])
    split = "val_top1" if config.validation else "top1"
    result = config.identity() | {
        "method": config.method,
        "top1": None,
        "val_top1": None,
        split: round(lines[-1]["top1"], 3),
        "per_class": per_class.round(2).tolist(),
        **{name: round(float(per_class[mask].mean()), 3) for name, mask in groups(counts).items() if mask.any()},
        "class_counts": counts.tolist(),
        "ess_by_epoch": [round(line["ess"], 4) for line in lines],
        "loss_by_epoch": [round(line["loss"], 4) for line in lines],
        "seconds": round(sum(line["seconds"] for line in lines), 1),
        "compile_seconds": round(compile_seconds, 1),
        "hardware": hardware(),
        "versions": versions(),
        "command": command,
    }
    checkpoint.write_json(done, result)
    return result


def _shown(line: dict[str, Any]) -> str:
    accuracy = f"  top-1 {line['top1']:.1f} %" if "top1" in line else ""
    return (
        f"loss {float(line['loss']):.3f}  risk {float(line['risk']):.3f}  ess {float(line['ess']):.0%}  "
        f"lr {line['lr']:.2g}  λ {float(line['temperature']):.3g}{accuracy}"
    )
