"""The entropic risk of a batch, differentiable, on one device or over many."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from absgd_jax._merge import AxisName, Part, merge_devices
from absgd_jax._tilt import Axis, clip_losses, is_infinite, reduction_inputs, tilt
from absgd_jax._validate import check_scalar, check_temperature


@partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _reduce(losses, temperature, weights, threshold, axis: Axis, axis_name: AxisName | None) -> tuple[jax.Array, Part]:
    """The batch's risk, which is differentiable, and the batch as a part, of which nothing is."""
    return _reduce_jvp(axis, axis_name, (losses, temperature, weights, threshold), None)[0]


@_reduce.defjvp
def _reduce_jvp(axis, axis_name, primals, tangents):
    losses, temperature, weights, threshold = primals
    clipped = clip_losses(losses, temperature, threshold)
    batch = tilt(clipped, temperature, weights, axis)
    part, share, log_ratio = Part(batch.risk, batch.weight, batch.kl), 1, 0
    if axis_name is not None:
        part, share, log_ratio = merge_devices(part, temperature, axis_name)

    def along(x):
        return x if axis is None or jnp.ndim(x) == 0 else jnp.expand_dims(x, axis)

    beyond = jnp.where(clipped == losses, 0, along(share) * batch.shares)
    risk = with_slopes(axis, axis_name, part.risk, beyond, losses)
    if tangents is None:
        return (risk, part), None

    d_losses, d_temperature, d_weights, _ = tangents
    # A padded example may carry any tangent, NaN included.
    d_losses = jnp.where(weights > 0, d_losses, 0)

    # ∂R/∂w_i = λ (p̂_i/ŵ_i - 1) / Σ w, whose limit at λ = ∞ is (L_i - R) / Σ w.
    plain = is_infinite(temperature)
    slopes = jnp.where(plain, 1, temperature) * jnp.expm1(batch.log_ratios + along(log_ratio))
    slopes = jnp.where(plain, clipped - along(part.risk), slopes)
    slopes = jnp.where(weights > 0, slopes, 0) / jnp.where(along(part.weight) > 0, along(part.weight), 1)
    d_risk = jnp.sum(along(share) * batch.shares * d_losses + slopes * d_weights, axis)
    d_risk = d_risk - share * (batch.kl + jnp.where(share == 0, 0, log_ratio)) * d_temperature
    if axis_name is not None:
        d_risk = jax.lax.psum(d_risk, axis_name)
    return (risk, part), (d_risk, jax.tree.map(jnp.zeros_like, part))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def with_slopes(axis: Axis, axis_name: AxisName | None, risk, slopes, losses):
    """The risk, which beside its gradient can be differentiated again: clipping took the slopes of some losses."""
    del axis, axis_name, slopes, losses
    return risk


@with_slopes.defjvp
def _with_slopes_jvp(axis, axis_name, primals, tangents):
    (risk, slopes, _), (d_risk, _, d_losses) = primals, tangents
    taken = jnp.sum(slopes * jnp.where(slopes == 0, 0, d_losses), axis)
    return risk, d_risk + (taken if axis_name is None else jax.lax.psum(taken, axis_name))


def reduce(
    losses, temperature, *, weights=None, where=None, threshold=None, axis=None, axis_name=None
) -> tuple[jax.Array, Part]:
    """The risk of the batch (with ``axis_name`` of the global batch), and what has to be known to merge it."""
    losses, temperature, weights = reduction_inputs(losses, temperature, weights, where)
    axis = tuple(axis) if isinstance(axis, Sequence) else axis  # a list has no hash
    return _reduce(losses, temperature, weights, threshold, axis, axis_name)


def entropic_risk(
    losses: ArrayLike,
    temperature: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
    threshold: ArrayLike | None = None,
    axis: Axis = None,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""The KL-regularised robust loss of a batch, whose gradient is the softmax-weighted gradient.

    .. math::
        \hat R = \lambda \log \sum_i w_i e^{L_i/\lambda}, \qquad
        \nabla \hat R = \sum_i \hat p_i \nabla L_i, \qquad
        \hat p_i = \frac{w_i e^{L_i/\lambda}}{\sum_j w_j e^{L_j/\lambda}}, \qquad
        \frac{\partial \hat R}{\partial \lambda} = -\mathrm{KL}(\hat p \,\|\, w)

    It never overflows, and is exact to rounding from λ = 0 (the largest loss) to λ = ±inf (the mean). For λ < 0 it is a
    soft minimum: outliers lose their weight.

    With ``axis_name`` it is the risk of the batch that is spread over that axis, and it differentiates as
    :func:`jax.lax.pmean` of a mean does: under ``shard_map`` its gradient is that of the global batch; under ``pmap``,
    ``vmap(axis_name=)`` and ``shard_map(check_vma=False)`` average the gradients over the axis, as is usual there. The
    shares are pulled back through the loss, so a loss that itself communicates (synchronised BatchNorm, gathered
    negatives) has the right gradient. It costs one collective of a few numbers between the passes.

    Args:
      losses: per-example losses, any shape. Half precision is reduced in float32; float64 stays float64.
      temperature: λ, a scalar in units of loss: positive, negative, ±inf or 0; a Python number or a traced value.
      weights: non-negative weights of the examples, matched to ``losses`` from the first axis on, so that (B,) weighs
        the sequences of (B, T). They are normalised to sum to 1, and an example of weight 0 is left out, also from the
        gradient with respect to the weights. Default: all equal.
      where: boolean mask, matched likewise; False leaves a (padded) example out, whatever its loss, even NaN. With no
        losses left, the risk is -0. and its gradient 0; the sign of the zero tells :func:`absgd_jax.scale_by_absgd`
        that nothing was seen.
      threshold: θ, a loss beyond which (above it for λ > 0, below it for λ < 0) the weight grows no more:
        :math:`\hat p_i \propto w_i e^{\min(L_i/\lambda,\, \theta/\lambda)}` in the risk and in its gradient; ∇L_i
        itself is not clipped. Pass ``state.threshold`` where the optimizer has a ``max_weight``. It carries no
        gradient. Default: none.
      axis: the axes to reduce, as in :func:`jax.numpy.mean`. Default: all.
      axis_name: the name of a ``shard_map``, ``pmap`` or ``vmap`` axis, or several, over which the batch is spread.

    Returns:
      R̂ in units of loss, float32 or wider, of the shape that remains when ``axis`` is reduced.

    Raises:
      ValueError: if ``temperature`` is NaN, ``temperature`` or ``threshold`` is not a scalar, ``weights`` or ``where``
        do not fit the losses, or one of the ``weights`` is a negative or infinite number.
      TypeError: if ``losses`` are complex, or ``where`` is not boolean.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from absgd_jax import entropic_risk
      >>> losses = jnp.array([0., 1., 4.])
      >>> print(entropic_risk(losses, 1.0))
      2.967
      >>> print(jax.grad(entropic_risk)(losses, 1.0).tolist())  # the weights
      [0.017, 0.047, 0.936]
      >>> print(entropic_risk(losses, float("inf")))  # the mean
      1.667

    References:
      Qi et al., `Attentional-Biased Stochastic Gradient Descent <https://arxiv.org/abs/2012.06951>`_, eq. (2).
      Li et al., `Tilted Empirical Risk Minimization <https://arxiv.org/abs/2007.01162>`_, 2021.
    """
    check_temperature(temperature, zero_allowed=True)
    if threshold is not None:
        check_scalar("threshold", threshold, "Use jax.vmap for several thresholds.")
    options = {"weights": weights, "where": where, "threshold": threshold, "axis": axis, "axis_name": axis_name}
    return reduce(losses, temperature, **options)[0]
