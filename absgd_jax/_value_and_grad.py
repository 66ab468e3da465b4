"""The batch's risk and its gradient in one pass: the whole batch, in micro-batches, or over devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from absgd_jax._merge import AxisName, Part, merge_devices, merge_parts
from absgd_jax._recursion import ScaleByAbsgdState
from absgd_jax._risk import entropic_risk, reduction_inputs
from absgd_jax._validate import check_temperature


def value_and_grad(
    per_example_loss: Callable[..., Any],
    *,
    has_aux: bool = False,
    with_kl: bool = False,
    num_microbatches: int = 1,
    axis_name: AxisName | None = None,
) -> Callable[..., Any]:
    r"""The robust risk of a batch and its gradient, as :func:`jax.value_and_grad` of a mean would give them.

    .. math:: \hat R = \lambda \log \sum_i w_i e^{L_i/\lambda}, \qquad \nabla\hat R = \sum_i \hat p_i \nabla L_i

    λ is read from the optimizer's state, so it is written once. Parts of a batch are merged exactly (see
    :func:`absgd_jax.merge_risks`), so neither micro-batches nor devices change the result, which averaging would.

    Args:
      per_example_loss: ``per_example_loss(params, *args, **kwargs)`` returns one loss per example, not reduced; with
        ``has_aux`` the pair (losses, aux). To log the losses, return them as aux.
      has_aux: whether ``per_example_loss`` returns aux.
      with_kl: whether to return also KL̂ = -∂R̂/∂λ, for :func:`absgd_jax.kl_radius`.
      num_microbatches: k splits the batch into k equal slices, taken one after another with the memory of one. Slices
        are strided, so that a batch sharded along its first axis stays where it is. Every leaf of aux must then have
        the examples as its first axis; it comes back whole and in order.
      axis_name: under ``shard_map`` or ``pmap``, the axis over which the batch is spread. The result is that of the
        global batch, from one collective of a few numbers and one of gradients, both after the backward pass. aux stays
        local. Under ``jit`` with sharded arrays nothing is needed.

    Returns:
      ``f(params, *args, state=None, temperature=None, where=None, weights=None, **kwargs)``, which returns
      ``(R̂, grads)``, with ``has_aux`` ``((R̂, aux), grads)``; with ``with_kl`` R̂ becomes the pair (R̂, KL̂).
      ``args`` have the examples as their first axis, ``kwargs`` are passed on whole. ``state`` is the optimizer's
      state, in which λ is found (an injected one too); ``temperature`` is λ itself, where there is no state or several
      λ. ``where`` and ``weights`` are those of :func:`absgd_jax.entropic_risk`; fill padded examples with finite
      numbers.

    Raises:
      TypeError: if neither ``state`` nor ``temperature`` is given.
      ValueError: if no or several λ are found, the losses are reduced, or the batch does not split evenly.

    Example:
      >>> import absgd_jax, jax.numpy as jnp
      >>> def per_example_loss(w, x, y):
      ...   return (x @ w - y) ** 2
      >>> optimizer = absgd_jax.absgd(0.1, temperature=2.0)
      >>> w, x, y = jnp.zeros(2), jnp.eye(2), jnp.array([1.0, 3.0])
      >>> f = absgd_jax.value_and_grad(per_example_loss, num_microbatches=2)
      >>> risk, grads = f(w, x, y, state=optimizer.init(w))
      >>> print(risk, grads.tolist())
      7.65 [-0.036, -5.892]
    """
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches={num_microbatches!r}: it must be at least 1.")

    def risk_of(variables, args, where, weights, kwargs):
        params, temperature = variables
        out = per_example_loss(params, *args, **kwargs)
        losses, aux = out if has_aux else (out, None)
        if jnp.ndim(losses) == 0:
            raise ValueError(
                "per_example_loss returned a scalar, one loss per example is needed: leave out the mean or sum over "
                "the batch."
            )
        weight = jnp.sum(reduction_inputs(losses, temperature, weights, where)[2])
        return entropic_risk(losses, temperature, weights=weights, where=where), (weight, aux)

    def part_of(variables, batch, kwargs):
        args, where, weights = batch
        (risk, (weight, aux)), grads = jax.value_and_grad(risk_of, has_aux=True)(
            variables, args, where, weights, kwargs
        )
        grads, risk_slope = grads
        return Part(risk, weight, -risk_slope.astype(risk.dtype)), grads, aux

    def vary(tree):
        return tree if axis_name is None else jax.lax.pcast(tree, axis_name, to="varying")

    def f(params, *args, state=None, temperature=None, where=None, weights=None, **kwargs):
        if temperature is None:
            temperature = _find_temperature(state)
        check_temperature(temperature, zero_allowed=True)
        temperature = jnp.asarray(temperature, jnp.result_type(float))
        # Were they not cast, the gradient of replicated parameters would be summed over the devices unmerged.
        variables = vary((params, temperature))
        batch = (args, where, weights)
        if num_microbatches == 1:
            part, grads, aux = part_of(variables, batch, kwargs)
        else:
            slices = _slices(batch, num_microbatches)
            part, grads, aux = _merge_slices(lambda b: part_of(variables, b, kwargs), variables[1], slices, vary)
        if axis_name is not None:
            part, grads = jax.lax.optimization_barrier((part, grads))  # the backward pass waits for no device
            part, share = merge_devices(part, temperature.astype(part.risk.dtype), axis_name)
            grads = jax.lax.psum(jax.tree.map(lambda g: (share * g).astype(g.dtype), grads), axis_name)
        value = (part.risk, part.kl) if with_kl else part.risk
        return ((value, aux) if has_aux else value), grads

    return f


def _slices(batch, k):
    """Reshapes (B, ...) to (B/k, k, ...): slice i is [:, i], which a sharding of the first axis divides evenly."""
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or () in sizes:
        lengths = sorted(str(*size) or "none (a scalar)" for size in sizes)
        raise ValueError(
            f"num_microbatches={k} slices the first axis of every positional argument, but these have first axes "
            f"{', '.join(lengths)}: give each an axis of examples, or pass by keyword what all examples share."
        )
    ((size,),) = sizes
    if size % k:
        raise ValueError(f"num_microbatches={k} does not divide the batch of {size} examples.")
    return jax.tree.map(lambda x: jnp.reshape(x, (size // k, k, *jnp.shape(x)[1:])), batch)


def _merge_slices(part_of, temperature, slices, vary):
    """Merges the parts of the slices one after another, in the memory of one slice and one more gradient."""
    examples, k = jax.tree.leaves(slices)[0].shape[:2]

    def part_at(i):
        return part_of(jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), slices))

    def wide(dtype):
        return jnp.promote_types(dtype, jnp.float32)

    def body(past, i):
        part, grads, aux = part_at(i)
        pair = jax.tree.map(lambda *x: jnp.stack(x), past[0], part)
        merged, (a, b) = merge_parts(pair, temperature.astype(part.risk.dtype))
        total = jax.tree.map(lambda g, h: (a * g + b * h.astype(g.dtype)).astype(g.dtype), past[1], grads)
        return (merged, total), aux

    shapes = jax.eval_shape(part_at, 0)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[0])
    no_grads = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), shapes[1])
    for leaf in jax.tree.leaves(shapes[2]):
        if leaf.shape[:1] != (examples,):
            raise ValueError(
                f"aux has a leaf of shape {leaf.shape}: with num_microbatches={k} every leaf needs the examples (here "
                f"{examples} a slice) as its first axis, so that it can be put together again."
            )
    (part, grads), aux = jax.lax.scan(body, vary((nothing, no_grads)), jnp.arange(k))
    grads = jax.tree.map(lambda g, x: g.astype(x.dtype), grads, shapes[1])
    aux = jax.tree.map(lambda x: jnp.reshape(jnp.swapaxes(x, 0, 1), (examples * k, *x.shape[2:])), aux)
    return part, grads, aux


def _find_temperature(state: optax.OptState | None) -> ArrayLike:
    """λ from an optimizer's state; one that inject_hyperparams holds goes before the one it was last built with."""
    if state is None:
        raise TypeError("Pass state=opt_state, from which λ is read, or temperature=λ.")

    def injects(node):
        return "temperature" in getattr(node, "hyperparams", ())

    def is_leaf(node):
        return isinstance(node, ScaleByAbsgdState) or injects(node)

    leaves = [leaf for leaf in jax.tree.leaves(state, is_leaf=is_leaf) if is_leaf(leaf)]
    found = [leaf.hyperparams["temperature"] if injects(leaf) else leaf.temperature for leaf in leaves]
    if len(found) != 1:
        raise ValueError(
            f"Found {len(found)} temperatures in the optimizer's state, needed one: pass temperature=λ, the one with "
            "which this batch is to be reduced."
        )
    return found[0]
