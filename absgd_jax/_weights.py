"""The weights that ABSGD gives to examples, for logging and for weighting by hand."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from absgd_jax._tilt import is_infinite, wide
from absgd_jax._validate import check_max_weight, check_temperature


def attention_weights(
    losses: ArrayLike, risk: ArrayLike, temperature: ArrayLike, *, max_weight: ArrayLike = float("inf")
) -> jax.Array:
    r"""The weights of examples: how far each loss lies above the running risk, in units of λ, exponentiated.

    .. math:: \tilde p_i = \min\big(e^{(L_i - R)/\lambda},\, c\big)

    For the weights of an optimizer's step, in all cases, use :func:`absgd_jax.weight_by_absgd`.

    Args:
      losses: per-example losses, any shape, in units of loss.
      risk: R = λ log s, the running robust risk: ``state.risk`` after the batch's update, broadcast against ``losses``.
        With the paper's s_0 = 0, divide the result by that state's ``mass``, which is 1 after a few steps. With
        ``max_weight``, take the risk before the update, to which the losses are compared; the result is p̃ up to a
        common factor.
      temperature: λ, a scalar: that of the state before the update. At ±inf every weight is 1.
      max_weight: c, the largest weight, as for :func:`absgd_jax.scale_by_absgd`.

    Returns:
      p̃, of the broadcast shape, float32 or wider; 1 is the weight that SGD gives. What would overflow is as large
      as the dtype allows.

    Raises:
      ValueError: if ``temperature`` is NaN or 0, or ``max_weight`` is not above 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import attention_weights
      >>> print(attention_weights(jnp.array([0., 1., 2.]), risk=1.0, temperature=1.0).tolist())
      [0.368, 1., 2.718]

    References:
      Qi et al., `Attentional-Biased Stochastic Gradient Descent <https://arxiv.org/abs/2012.06951>`_, eq. (5).
    """
    check_temperature(temperature)
    check_max_weight(max_weight)
    losses = jnp.asarray(losses)
    losses = losses.astype(wide(losses.dtype))
    temperature = jnp.asarray(temperature, losses.dtype)
    exponents = jnp.where(is_infinite(temperature), 0, (losses - jnp.asarray(risk, losses.dtype)) / temperature)
    largest = 0.5 / jnp.finfo(exponents.dtype).tiny  # which still has a reciprocal, to be divided by
    largest = jnp.minimum(jnp.asarray(max_weight, exponents.dtype), largest)
    return jnp.minimum(jnp.exp(jnp.minimum(exponents, jnp.log(largest))), largest)


def effective_sample_size(weights: ArrayLike, *, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    r"""The number of equally weighted examples that weigh as much as these: (Σp)² / Σp².

    Args:
      weights: non-negative weights, any shape and scale.
      axis: the axes to reduce. Default: all.

    Returns:
      A value between 1 (one example has all the weight) and the number of examples (all are equal); 0 if every weight
      is 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import effective_sample_size
      >>> print(effective_sample_size(jnp.array([1., 1., 1., 1.])), effective_sample_size(jnp.array([1., 0., 0.])))
      4.0 1.0

    References:
      Kish, *Survey Sampling*, 1965.
    """
    weights = jnp.asarray(weights)
    weights = weights.astype(wide(weights.dtype)) / 8  # the largest number has no reciprocal, an eighth of it has
    largest = jnp.max(weights, axis, keepdims=True, initial=0)
    weights = weights / jnp.where(largest > 0, largest, 1)  # so that no square under- or overflows
    squares = jnp.sum(weights**2, axis)
    return jnp.sum(weights, axis) ** 2 / jnp.where(squares > 0, squares, 1)
