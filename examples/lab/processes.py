"""Several processes, each with some of the devices, that train one run: all compute, the first one writes."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from examples.lab.errors import UserError

T = TypeVar("T")


def join() -> None:
    """Joins the other processes of a SLURM job or a TPU slice, as JAX finds them."""
    if jax.distributed.is_initialized():
        return
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--distributed finds no SLURM job and no TPU slice to join ({reason}).") from None


def is_first() -> bool:
    return jax.process_index() == 0


def by_first(act: Callable[[], T]) -> T | None:
    """What only the first process does; the others wait until it is done, and fail if it fails."""
    return _in_turn(act, mine=is_first())


def first_then_others(act: Callable[[], T]) -> T:
    """What the first process may prepare on disk for the others; where one fails, all fail."""
    first, others = _in_turn(act, mine=is_first()), _in_turn(act, mine=not is_first())
    return first if is_first() else others  # pyright: ignore[reportReturnType]


def _in_turn(act: Callable[[], T], *, mine: bool) -> T | None:
    """Does it where it is this process's turn. None goes on to a collective that one which failed would never reach."""
    found = failure = None
    if mine:
        try:
            found = act()
        except Exception as error:  # raised below, when the others know
            failure = error
    failed = failure is not None
    if jax.process_count() > 1:
        failed = bool(multihost_utils.process_allgather(np.bool_(failed)).any())
    if failed:
        raise failure or UserError("Another process has stopped; its message says why.")
    return found


def agreed(decision: bool) -> bool:
    """The decision of the first process."""
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(decision))) if jax.process_count() > 1 else decision


def spread(tree: T, sharding: Sharding) -> T:
    """Arrays that every process has whole, over the devices of all."""

    def one(x):
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda place: whole[place])

    return jax.tree.map(one, tree) if jax.process_count() > 1 else jax.device_put(tree, sharding)


def rows(size: int, sharding: Sharding) -> np.ndarray:
    """Which examples of a batch are for the devices of this process."""
    places = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[place] for place in places if place is not None]))


def gathered(parts: T, sharding: Sharding, size: int) -> T:
    """The batch, of which every process has its :func:`rows`."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x, (size, *x.shape[1:])), parts)


def whole(tree: T) -> T:
    """Arrays that may be spread over the devices of all, on every host."""
    return multihost_utils.process_allgather(tree, tiled=True) if jax.process_count() > 1 else jax.device_get(tree)
