"""What runs leave on disk, so that they can be killed at any moment and continued by the same command.

States are saved by the names of their leaves, never by their order. A file is complete or absent.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from examples.lab import files, processes
from examples.lab.errors import UserError

Tree = TypeVar("Tree")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other commands out of a folder of checkpoints; the first process does it for those that train with it."""
    with ExitStack() as opened:

        def lock():
            folder.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context((folder / "lock").open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"Another process trains in {folder}. Wait for it, or choose another --work.") from None

        processes.by_first(lock)
        yield


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def open_manager(folder: Path) -> ocp.CheckpointManager:
    """The checkpoints in a folder; the last two are kept."""
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder.absolute(), options=options)


def save(manager: ocp.CheckpointManager, epoch: int, state: Any) -> None:
    manager.save(epoch, args=ocp.args.StandardSave(named(state)))


def restore(manager: ocp.CheckpointManager, like: Tree) -> Tree:
    """The last state saved, as NumPy arrays, with the structure and shapes of ``like``, whose leaves may be abstract.

    As NumPy arrays, because it may have been saved from other devices than there are now.
    """
    leaves = named(like)
    arrays = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    try:
        found = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(arrays))
    except (ValueError, OSError, KeyError) as error:
        raise _damaged(Path(manager.directory), error) from None
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in leaves])


def finish(folder: Path, state: Any, metrics: list[dict[str, Any]]) -> None:
    """Leaves the last state and the metrics of one run in a folder of its own."""
    aside = folder.with_name(folder.name + ".tmp")

    def put_in_place():
        files.write(aside / "metrics.json", json.dumps(metrics).encode())
        remove(folder)
        aside.replace(folder)

    processes.by_first(lambda: remove(aside))
    with open_manager(aside) as manager:
        save(manager, 0, state)
    processes.by_first(put_in_place)


def is_finished(folder: Path) -> bool:
    return (folder / "metrics.json").exists()


def load(folder: Path, like: Tree) -> tuple[Tree, list[dict[str, Any]]]:
    """The state and the metrics that :func:`finish` has left."""
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
    except ValueError as error:
        raise _damaged(folder, error) from None
    with open_manager(folder) as manager:
        return restore(manager, like), metrics


def _damaged(folder: Path, error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0]
    return UserError(f"{folder} is damaged ({reason}). Delete it: the same command trains what is missing again.")


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def read_lines(path: Path, epochs: int) -> list[dict[str, Any]]:
    """The lines of the first ``epochs`` epochs. What a killed run wrote beyond its checkpoint is taken out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            metrics = json.loads(line)
        except json.JSONDecodeError:  # torn by the kill, so the last
            break
        if metrics["epoch"] <= epochs:
            lines.append(metrics)
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    processes.by_first(lambda: files.write(path, content))
    return lines


def append_line(path: Path, metrics: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(metrics) + "\n")
        file.flush()
        os.fsync(file.fileno())
