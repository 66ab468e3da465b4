"""The batch's risk and its gradient in one pass: the whole batch, in micro-batches, or over devices."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from optax.microbatching import AccumulationType

from absgd_jax import _devices
from absgd_jax._merge import AxisName, merge_parts
from absgd_jax._recursion import settle
from absgd_jax._risk import reduce, with_slopes
from absgd_jax._state import ScaleByAbsgdState, keep_finite
from absgd_jax._tilt import wide
from absgd_jax._validate import check_not_negative, check_temperature

MEANS = (AccumulationType.MEAN, AccumulationType.RUNNING_MEAN)
OWN_KEYWORDS = ("state", "temperature", "where", "weights")


def value_and_grad(
    per_example_loss: Callable[..., Any],
    *,
    has_aux: bool = False,
    with_kl: bool = False,
    num_microbatches: int = 1,
    aux_accumulator: Any = None,
    axis_name: AxisName | None = None,
    sharded: Any = False,
) -> Callable[..., Any]:
    r"""The robust risk of a batch and its gradient, as :func:`jax.value_and_grad` of a mean would give them.

    .. math:: \hat R = \lambda \log \sum_i w_i e^{L_i/\lambda}, \qquad \nabla\hat R = \sum_i \hat p_i \nabla L_i

    It is ``jax.value_and_grad`` of :func:`absgd_jax.entropic_risk` with three conveniences: λ and the bound on the
    weights are read from the optimizer's state, so they are written once; micro-batches are merged exactly (see
    :func:`absgd_jax.merge_risks`), where averaging would change the result; over devices the gradients are summed.

    *Micro-batches.* ``num_microbatches=k`` processes k equal slices of the batch in turn, in the memory of one. Slices
    are strided, so that a batch sharded along its first axis stays where it is. Every positional argument is sliced;
    keyword arguments are passed on whole, but keys of :func:`jax.random.key` among them are folded with the index of
    the slice, so that no two slices share a dropout mask.

    *Devices.* With ``axis_name`` the result is that of the global batch, and a loss may communicate over the axis.
    Where types say which arrays vary over it (``shard_map`` with check_vma), gradients have the types of their
    parameters, as with :func:`jax.grad`: those of replicated parameters come back summed; those of parameters that vary
    over the axis (shards that the loss gathers, or copies that you made varying) are derivatives with respect to this
    device's own. Elsewhere parameters are assumed replicated unless ``sharded`` says otherwise. This costs one
    collective of a few numbers between the passes of each micro-batch, and one of gradients at the end. Under ``jit``
    with sharded arrays nothing is needed.

    Args:
      per_example_loss: ``per_example_loss(params, *args, **kwargs)`` returns one loss per example, not reduced; with
        ``has_aux`` the pair (losses, aux). To log the losses, return them as aux.
      has_aux: whether ``per_example_loss`` returns aux. Over devices aux stays local.
      with_kl: whether to also return KL̂ = -∂R̂/∂λ, for rules such as :func:`absgd_jax.trust_fraction`.
      num_microbatches: k ≥ 1, which must divide the number of examples.
      aux_accumulator: how to combine the micro-batches' aux, needed where there are both: a member of
        :class:`optax.microbatching.AccumulationType` or a prefix tree of them. ``CONCAT`` joins leaves whose first axis
        is that of the examples, in order; ``MEAN`` is the plain mean over the slices, right for scalars and for batch
        statistics (a mean over the batch is exact, a variance lacks that between the slices); ``SUM`` adds.
      axis_name: under ``shard_map``, ``pmap`` or ``vmap``, the axis (or axes) over which the batch is spread.
      sharded: which parameters are shards of larger ones: their :class:`jax.sharding.PartitionSpec`, as in the
        ``in_specs`` of ``shard_map``, or True for a shard on every device of the axes, False for a copy on each; or a
        prefix tree of these. Needed only under ``pmap``, ``vmap`` and ``shard_map(check_vma=False)``.

    Returns:
      ``f(params, *args, state=None, temperature=None, where=None, weights=None, **kwargs)``, which returns
      ``(R̂, grads)`` or, with ``has_aux``, ``((R̂, aux), grads)``; with ``with_kl``, R̂ becomes the pair (R̂, KL̂).
      ``state`` is the optimizer's state, in which λ and the bound are found (injected ones too); ``temperature`` is λ
      itself (without a bound), if there is no state or several λ. ``where`` and ``weights`` are those of
      :func:`absgd_jax.entropic_risk`; fill padded examples with finite numbers. If ``per_example_loss`` itself has a
      parameter with one of these four names, and it is not filled by position, the keyword is passed on to
      ``per_example_loss``.

    Raises:
      TypeError: if neither ``state`` nor ``temperature`` is given, ``per_example_loss`` does not return an array, or
        aux of micro-batches has no accumulator.
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
    if not isinstance(num_microbatches, (int, np.integer)) or num_microbatches < 1:
        raise ValueError(f"num_microbatches={num_microbatches!r}: it must be an integer of at least 1.")
    if has_aux and num_microbatches > 1 and aux_accumulator is None:
        raise TypeError(
            f"num_microbatches={num_microbatches} with has_aux=True: say how aux leaves the micro-batches with "
            "aux_accumulator=, a member of optax.microbatching.AccumulationType (CONCAT for what each example has, "
            "MEAN for batch statistics and scalars) or a prefix tree of them."
        )

    def f(params, *args, **kwargs):
        theirs = _names_left(per_example_loss, 1 + len(args)) & set(OWN_KEYWORDS)
        own = {name: kwargs.pop(name, None) for name in OWN_KEYWORDS if name not in theirs}
        temperature, limit = _find_temperature(own.get("state"), own.get("temperature"), theirs)

        def risk_of(params, batch, kwargs):
            args, where, weights = batch
            losses, aux = _losses_and_aux(per_example_loss(params, *args, **kwargs), has_aux)
            options = {"weights": weights, "where": where, "threshold": limit, "axis_name": axis_name}
            risk, part = reduce(losses, temperature, **options)
            return risk, (part, aux)

        def part_and_grads(params, batch, kwargs):
            (risk, (part, aux)), grads = jax.value_and_grad(risk_of, has_aux=True)(params, batch, kwargs)
            return (risk, part), grads, aux

        batch = (args, own.get("where"), own.get("weights"))
        typed, untyped = _devices.split(axis_name)
        if num_microbatches == 1:
            (risk, part), grads, aux = part_and_grads(_devices.make_varying(params, typed), batch, kwargs)
        else:
            if own.get("weights") is not None:
                check_not_negative("weights", own["weights"])  # before they are sliced, which makes them JAX arrays
            slice_at, examples = _slices(batch, kwargs, num_microbatches)
            risk, _ = jax.eval_shape(lambda i: risk_of(params, *slice_at(i)), 0)
            typed |= _devices.varying(jnp.zeros_like(risk))  # each device has shares of its own
            local = _devices.make_varying(params, typed)
            part_at = lambda i: part_and_grads(local, *slice_at(i))  # noqa: E731
            (risk, part), grads, aux = _merge_slices(part_at, num_microbatches, temperature)
            grads = jax.tree.map(lambda g, p: g.astype(jnp.result_type(p)), grads, params)
            aux = _leave(aux_accumulator, aux, examples)
        grads = _devices.sum_gradients(grads, params, typed, untyped, sharded)
        value = (risk, part.kl) if with_kl else risk
        return ((value, aux) if has_aux else value), grads

    return f


def _names_left(function: Callable[..., Any], filled: int) -> set[str]:
    """The names of the parameters that are not filled by position."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature
        return set()
    left = (p for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY or i >= filled)
    return {p.name for p in left if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}


def _losses_and_aux(out: Any, has_aux: bool) -> tuple[Any, Any]:
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"per_example_loss returned a {type(out).__name__}: with has_aux=True return (losses, aux).")
    losses, aux = out if has_aux else (out, None)
    if not isinstance(losses, (jax.Array, np.ndarray, np.number, int, float)):
        raise TypeError(
            f"per_example_loss returned a {type(losses).__name__}, one array of losses is needed: add several losses "
            "up, and return what else you need as aux with has_aux=True."
        )
    if jnp.ndim(losses) == 0:
        raise ValueError(
            "per_example_loss returned a scalar, one loss per example is needed: leave out the mean or sum over "
            "the batch."
        )
    return losses, aux


def _slices(batch, kwargs, k: int):
    """Slice i of the batch and its keyword arguments, as a function of i, and the number of its examples.

    (B, ...) is reshaped to (B/k, k, ...), of which slice i is [:, i]: a sharding of the first axis divides it evenly.
    """
    args, *options = batch
    options = [x if x is None else jnp.atleast_1d(jnp.asarray(x)) for x in options]
    examples = _count_examples(args, k)
    # A mask or weight that all examples share is made as long as the examples before it is cut.
    options = [x if x is None or jnp.shape(x)[:1] != (1,) else jnp.repeat(x, examples, axis=0) for x in options]
    _count_examples((args, options), k)
    jax.tree.map(partial(_check_sharding, k), (args, options))
    split = jax.tree.map(lambda x: jnp.reshape(x, (examples // k, k, *jnp.shape(x)[1:])), (args, *options))

    def slice_at(i):
        fold = jnp.vectorize(lambda key: jax.random.fold_in(key, i))
        own = jax.tree.map(lambda x: fold(x) if _are_keys(x) else x, kwargs)
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), split), own

    return slice_at, examples // k


def _merge_slices(part_at, k: int, temperature):
    """Merges the parts of the slices one after another, in the memory of one slice and one more gradient."""

    def body(past, i):
        new, grads, aux = part_at(i)
        risks, parts = jax.tree.map(lambda *x: jnp.stack(x), past[0], new)
        merged, between = merge_parts(parts, temperature.astype(risks.dtype))
        risk = with_slopes(None, None, merged.risk, between.shares, risks - parts.risk)
        a, b = between.shares
        with jax.numpy_dtype_promotion("standard"):  # the shares are real where gradients are complex
            total = jax.tree.map(lambda g, h: (a * g + b * h.astype(g.dtype)).astype(g.dtype), past[1], grads)
        return ((risk, merged), total), aux

    *sums, _ = jax.eval_shape(part_at, 0)  # with types, so that the sums are sharded and vary as the parts do
    (whole, grads), aux = jax.lax.scan(body, jax.tree.map(_nothing_like, tuple(sums)), jnp.arange(k))
    return whole, grads, aux


def _nothing_like(x: jax.ShapeDtypeStruct) -> jax.Array:
    if x.sharding is not None:
        return jnp.zeros_like(x, dtype=wide(x.dtype))
    return _devices.make_varying(jnp.zeros(x.shape, wide(x.dtype)), _devices.varying(x))


def _leave(accumulator, aux, examples: int):
    """What the micro-batches together make of aux, of which each leaf is stacked along its first axis."""

    def leave(how, x):
        if how is AccumulationType.CONCAT and x.shape[1:2] == (examples,):
            return jnp.reshape(jnp.swapaxes(x, 0, 1), (x.shape[0] * x.shape[1], *x.shape[2:]))
        if how is AccumulationType.SUM:
            return jnp.sum(x, axis=0)
        if how in MEANS and jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.mean(x, axis=0)
        raise ValueError(
            f"aux has a leaf of shape {x.shape[1:]} and dtype {x.dtype}, which cannot leave micro-batches by {how}: "
            f"CONCAT needs the examples (here {examples} a micro-batch) as first axis, MEAN needs floating point."
        )

    return jax.tree.map(lambda how, below: jax.tree.map(partial(leave, how), below), accumulator, aux)


def _count_examples(batch, k: int) -> int:
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if not sizes:
        raise ValueError(
            f"num_microbatches={k} slices the positional arguments after params, and there are none: pass the batch by "
            "position; keyword arguments are what all examples share."
        )
    if len(sizes) > 1 or () in sizes:
        lengths = ", ".join(sorted(str(*size) or "none (a scalar)" for size in sizes))
        raise ValueError(
            f"num_microbatches={k} slices the first axis of every positional argument, of where and of weights, but "
            f"these have first axes {lengths}: give each one of examples, or pass by keyword what all share."
        )
    ((size,),) = sizes
    if size % k:
        raise ValueError(f"num_microbatches={k} does not divide the batch of {size} examples.")
    return size


def _check_sharding(k: int, x: Any) -> None:
    """Raises ValueError if a slice of an array whose type says how it is sharded has no equal parts on all devices."""
    sharding: Any = jax.typeof(x).sharding
    axes = jax.tree.leaves(sharding.spec[:1])  # none, one or several names
    devices = math.prod(sharding.mesh.shape[name] for name in axes)
    if (size := jnp.shape(x)[0] // k) % devices:
        raise ValueError(
            f"num_microbatches={k} makes slices of {size} examples, which {devices} devices do not divide: take fewer "
            "micro-batches or a larger batch."
        )


def _are_keys(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _find_temperature(state: optax.OptState | None, temperature: ArrayLike | None, theirs: set[str]):
    """λ and the threshold of the weights; what inject_hyperparams holds goes before what was last used."""
    if state is None and temperature is None:
        taken = "".join(f" per_example_loss has a parameter {name!r} of its own." for name in sorted(theirs))
        raise TypeError(f"Pass state=opt_state, from which λ is read, or temperature=λ.{taken}")
    if temperature is not None:
        check_temperature(temperature, zero_allowed=True)
        return jnp.asarray(temperature, jnp.result_type(float)), None

    def injected_by(node):
        return {k: v for k, v in getattr(node, "hyperparams", {}).items() if k in ("temperature", "max_weight")}

    def holders(tree):
        is_holder = lambda node: isinstance(node, ScaleByAbsgdState) or bool(injected_by(node))  # noqa: E731
        return [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_holder) if is_holder(leaf)]

    found, injected = holders(state), {}
    if len(found) == 1 and (injected := injected_by(found[0])):
        found = holders(found[0].inner_state)
    if len(found) != 1:
        raise ValueError(
            f"Found {len(found)} temperatures in the optimizer's state, needed one: pass temperature=λ, the one with "
            "which this batch is to be reduced. (A checkpoint is restored with the optimizer's state as its template.)"
        )
    (node,) = found
    node = settle(node._replace(**{name: keep_finite(x, node.risk.dtype) for name, x in injected.items()}))
    return node.temperature, node.threshold
