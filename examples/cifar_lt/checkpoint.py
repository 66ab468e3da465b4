"""What a run leaves on disk, so that it can be killed at any moment and continued by the same command.

``config.json`` says whose folder it is, ``checkpoints/`` holds the state after the last epochs, ``metrics.jsonl`` has a
line for each epoch, ``result.json`` the end. A file is complete or absent: each is written aside and then renamed.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from examples.cifar_lt.errors import UserError

Tree = TypeVar("Tree")


def write_json(path: Path, content: Any) -> None:
    _write(path, json.dumps(content, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    aside = path.with_suffix(".tmp")
    with aside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def claim(folder: Path, identity: dict[str, Any]) -> None:
    """Makes the folder this run's, or refuses one that belongs to another."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    if not path.exists():
        write_json(path, identity)
        return
    owner = json.loads(path.read_text())
    changed = [k for k in sorted({*owner, *identity}) if owner.get(k) != identity.get(k)]
    if changed:
        differences = ", ".join(f"{k}: {owner.get(k)} there, {identity.get(k)} here" for k in changed)
        raise UserError(
            f"{folder} holds a run with other settings ({differences}). Choose another --out, or delete it."
        )


def branch(source: Path, folder: Path, epoch: int) -> None:
    """Makes ``folder`` a run that begins with the first epochs of ``source``, which kept its state after them."""
    step = Path("checkpoints") / str(epoch)
    if folder.exists() or not (source / step).exists():
        return
    aside = folder.with_suffix(".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source / step, aside / step)
    shutil.copy(source / "metrics.jsonl", aside)
    aside.replace(folder)


def open_manager(folder: Path, keep: int) -> ocp.CheckpointManager:
    """The checkpoints of a run; the last two are kept, and the one after ``keep`` epochs."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, keep_period=keep, enable_async_checkpointing=False)
    return ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options)


def save(manager: ocp.CheckpointManager, epoch: int, state: Any) -> None:
    """Saves the state after ``epoch`` epochs."""
    manager.save(epoch, args=ocp.args.StandardSave(_numbered(state)))


def restore(manager: ocp.CheckpointManager, state: Tree) -> Tree:
    """The last state saved, or ``state`` where there is none."""
    latest = manager.latest_step()
    if latest is None:
        return state
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _numbered(state))
    leaves = manager.restore(latest, args=ocp.args.StandardRestore(abstract))
    return jax.tree.unflatten(jax.tree.structure(state), [leaves[k] for k in _numbered(state)])


def _numbered(state: Any) -> dict[str, Any]:
    return {f"{i:04}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def read_metrics(path: Path, epochs: int) -> list[dict[str, Any]]:
    """The lines of the first ``epochs`` epochs. What a killed run wrote beyond its checkpoint is taken out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            metrics = json.loads(line)
        except json.JSONDecodeError:  # torn by the kill, so the last
            break
        if metrics["epoch"] <= epochs:
            lines.append(metrics)
    _write(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def append_metrics(path: Path, metrics: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(metrics) + "\n")
        file.flush()
        os.fsync(file.fileno())
