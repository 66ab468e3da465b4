"""What runs leave on disk, so that they can be killed at any moment and continued by the same command.

While runs train together their folder holds ``checkpoints/``, the state after the last epochs, and ``metrics.jsonl``, a
line for each epoch. Then each leaves a folder of its own with its state and ``metrics.json``, and at the end a result.
A file is complete or absent.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from examples.cifar_lt import files
from examples.cifar_lt.errors import UserError

Tree = TypeVar("Tree")


def write_json(path: Path, content: Any) -> None:
    files.write(path, f"{json.dumps(content, indent=1)}\n".encode())


def claim(path: Path, identity: dict[str, Any]) -> None:
    """Refuses the file of a result that belongs to a run with other settings."""
    if not path.exists():
        return
    try:
        owner = json.loads(path.read_text())["config"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not the result of a run. Choose another --out, or delete it.") from None
    changed = [k for k in sorted({*owner, *identity}) if owner.get(k) != identity.get(k)]
    if changed:
        differences = ", ".join(f"{k}: {owner.get(k)} there, {identity.get(k)} here" for k in changed)
        raise UserError(f"{path} is of a run with other settings ({differences}). Choose another --out, or delete it.")


def name_of(names: Sequence[str]) -> str:
    """The name of the folder of runs while they train together."""
    return "together-" + hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def open_manager(folder: Path) -> ocp.CheckpointManager:
    """The checkpoints in a folder; the last two are kept."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
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


def finish(folder: Path, state: Any, metrics: list[dict[str, Any]]) -> None:
    """Leaves the last state and the metrics of one run in a folder of its own."""
    aside = folder.with_name(folder.name + ".tmp")
    remove(aside)
    with open_manager(aside) as manager:
        save(manager, 0, state)
    write_json(aside / "metrics.json", metrics)
    remove(folder)
    aside.replace(folder)


def is_finished(folder: Path) -> bool:
    return (folder / "metrics.json").exists()


def finished_metrics(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "metrics.json").read_text())


def load(folder: Path, state: Tree) -> Tree:
    """The state that :func:`finish` has left, in the structure and with the shapes of ``state``."""
    with open_manager(folder) as manager:
        return restore(manager, state)


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


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
    files.write(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return lines


def append_metrics(path: Path, metrics: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(metrics) + "\n")
        file.flush()
        os.fsync(file.fileno())
