"""A checkpoint after every epoch, whole or not there at all."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from examples.cifar_lt.errors import UserError


class Checkpoints:
    """The checkpoints of one run; the newest is kept.

    Orbax writes each into a temporary folder, which it renames when it is complete, so that a kill leaves the one before.

    Args:
      folder: where they lie.
      identity: the settings of the run, JSON-like. A checkpoint made with others is refused.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self._folder, self._identity = folder, identity
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, epoch: int, state: Any) -> None:
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), identity=ocp.args.JsonSave(self._identity))
        self._manager.save(epoch, args=items)

    def restore(self, like: Any) -> Any:
        """The newest state, or ``like``, a state of the same structure, where there is none.

        Raises:
          UserError: if the checkpoint is that of a run with other settings.
        """
        epoch = self._manager.latest_step()
        if epoch is None:
            return like
        made_with = self._manager.restore(epoch, args=ocp.args.Composite(identity=ocp.args.JsonRestore()))["identity"]
        names = sorted(made_with.keys() | self._identity.keys())
        others = [n for n in names if made_with.get(n) != self._identity.get(n)]
        if others:
            told = ", ".join(f"{n} = {made_with.get(n)} (now {self._identity.get(n)})" for n in others)
            raise UserError(
                f"{self._folder} holds a checkpoint made with other settings: {told}. Give the same settings to continue "
                "it, another folder with --out, or delete it to start again."
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(epoch, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))["state"]

    def close(self) -> None:
        self._manager.close()
