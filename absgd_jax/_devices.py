"""What differs between the ways of running over devices: whether types say which arrays vary over an axis.

Under ``shard_map`` with check_vma they do, and the derivative of a psum is the identity. Under ``pmap``, ``vmap`` and
``shard_map(check_vma=False)`` they do not; there the derivative of a psum is a psum, so that gradients of a value that
all n devices have come out n times too large, and are averaged instead of summed.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec

from absgd_jax._merge import AxisName


def varying(x) -> frozenset:
    """The axes over which the type of ``x`` says that it varies."""
    kind: Any = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    if hasattr(kind, "vma"):  # up to JAX 0.10
        return kind.vma or frozenset()
    return kind.manual_axis_type.varying if kind.manual_axis_type is not None else frozenset()


def split(axis_name: AxisName | None) -> tuple[frozenset, tuple]:
    """The axes over which types tell what varies, and the others."""
    names = () if axis_name is None else tuple(axis_name) if isinstance(axis_name, (tuple, list)) else (axis_name,)
    typed = frozenset(name for name in names if name in varying(jax.lax.axis_index(name)))
    return typed, tuple(name for name in names if name not in typed)


def make_varying(tree, axes: frozenset):
    """``tree`` as each device's own, so that its gradient is local and the sum over devices can wait for the end."""

    def cast(x):
        missing = tuple(axes - varying(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def sum_gradients(grads, params, typed: frozenset, untyped: tuple, sharded):
    """Sums the devices' gradients of what all of them hold; of shards the loss has gathered them already."""
    copies = jax.lax.psum(1, untyped) if untyped else 1

    def total(how, grad, param):
        over = jax.tree.leaves(tuple(how)) if isinstance(how, PartitionSpec) else untyped if how else ()
        axes = (*(typed - varying(param)), *(name for name in untyped if name not in over))
        grad = jax.lax.psum(grad, axes) if axes else grad
        return grad if copies == 1 else (grad / copies).astype(grad.dtype)

    is_leaf = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    below = lambda how, *trees: jax.tree.map(lambda *leaves: total(how, *leaves), *trees)  # noqa: E731
    return jax.tree.map(below, sharded, grads, params, is_leaf=is_leaf)
