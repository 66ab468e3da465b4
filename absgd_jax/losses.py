"""Per-example losses and class weights for long-tailed data. None of them reduces; all compose with ABSGD.

Logits have shape (..., C), labels are integers of shape (...), and the losses have the shape of the labels.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from absgd_jax import _validate

_cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def focal(logits: ArrayLike, labels: ArrayLike, *, focusing: float = 2.0) -> jax.Array:
    r"""Focal loss of the softmax: cross entropy, less for examples that are already classified well.

    .. math:: L = -(1 - p_y)^\varphi \log p_y

    Args:
      logits: shape (..., C).
      labels: integers in [0, C), shape (...).
      focusing: φ ≥ 0; 0 is cross entropy. (The paper calls it γ, which here is ABSGD's.)

    Returns:
      Losses in nats, shape (...).

    Raises:
      ValueError: if ``focusing`` is a negative Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import losses
      >>> print(losses.focal(jnp.array([[0., 0.]]), jnp.array([1])).tolist())  # (1/2)^2 log 2
      [0.1733]

    References:
      Lin et al., `Focal Loss for Dense Object Detection <https://arxiv.org/abs/1708.02002>`_, 2017.
    """
    if isinstance(focusing, (int, float)) and not focusing >= 0:
        raise ValueError(f"focusing={focusing!r}: it must be at least 0.")
    loss = _cross_entropy(logits, labels)
    return (-jnp.expm1(-loss)) ** focusing * loss


def ldam(
    logits: ArrayLike,
    labels: ArrayLike,
    class_counts: ArrayLike,
    *,
    max_margin: float = 0.5,
    exponent: float = 0.25,
    scale: float = 30.0,
) -> jax.Array:
    r"""Label-distribution-aware margin loss: the rarer a class, the larger the margin it must win by.

    .. math:: L = \mathrm{CE}\big(s\,(z - \Delta_y e_y),\, y\big), \qquad \Delta_j = m\, (n_j / n_{\min})^{-a}

    Args:
      logits: z, shape (..., C): cosines in [-1, 1] of a normalised classifier.
      labels: integers in [0, C), shape (...).
      class_counts: n, the training examples of each class, positive, shape (C,).
      max_margin: m, the margin of the rarest class, in units of logits.
      exponent: a. The LDAM paper derives 1/4; the ABSGD paper's text says 2/5.
      scale: s, by which margins and logits are multiplied before the softmax.

    Returns:
      Losses in nats, shape (...).

    Raises:
      ValueError: if ``max_margin``, ``exponent`` or ``scale`` is not a positive finite number.

    Example:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import losses
      >>> loss = losses.ldam(jnp.zeros((2, 2)), jnp.array([0, 1]), jnp.array([16, 1]), scale=1.0)
      >>> print(loss.tolist())  # margins 0.25 and 0.5
      [0.8259, 0.9741]

    References:
      Cao et al., `Learning Imbalanced Datasets with LDAM <https://arxiv.org/abs/1906.07413>`_, 2019.
    """
    _validate.check_positive("max_margin", max_margin)
    _validate.check_positive("exponent", exponent)
    _validate.check_positive("scale", scale)
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    counts = jnp.asarray(class_counts, logits.dtype)
    margins = max_margin * (counts / jnp.min(counts)) ** -exponent
    target = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return _cross_entropy(scale * (logits - margins * target), labels)


def balanced_softmax(logits: ArrayLike, labels: ArrayLike, class_counts: ArrayLike) -> jax.Array:
    r"""Balanced softmax: cross entropy whose softmax knows how frequent each class is.

    .. math:: L = -\log \frac{n_y e^{z_y}}{\sum_j n_j e^{z_j}}

    Args:
      logits: z, shape (..., C).
      labels: integers in [0, C), shape (...).
      class_counts: n, the training examples of each class, positive, shape (C,).

    Returns:
      Losses in nats, shape (...).

    Example:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import losses
      >>> loss = losses.balanced_softmax(jnp.zeros((2, 2)), jnp.array([0, 1]), jnp.array([3, 1]))
      >>> print(loss.tolist())  # -log(3/4), -log(1/4)
      [0.2877, 1.3863]

    References:
      Ren et al., `Balanced Meta-Softmax <https://arxiv.org/abs/2007.10740>`_, 2020.
    """
    return logit_adjustment(logits, labels, class_counts, tau=1.0)


def logit_adjustment(logits: ArrayLike, labels: ArrayLike, class_counts: ArrayLike, *, tau: float = 1.0) -> jax.Array:
    r"""Logit-adjusted cross entropy: the class prior is added to the logits in training, so they need not learn it.

    .. math:: L = \mathrm{CE}\big(z + \tau \log \pi,\, y\big), \qquad \pi_j = n_j / \textstyle\sum_i n_i

    At τ = 1 it is :func:`balanced_softmax`.

    Args:
      logits: z, shape (..., C).
      labels: integers in [0, C), shape (...).
      class_counts: n, the training examples of each class, positive, shape (C,).
      tau: τ, the strength of the adjustment; 0 is cross entropy.

    Returns:
      Losses in nats, shape (...).

    Raises:
      ValueError: if ``tau`` is a Python number that is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import losses
      >>> loss = losses.logit_adjustment(jnp.zeros((2, 2)), jnp.array([0, 1]), jnp.array([3, 1]), tau=2.0)
      >>> print(loss.tolist())  # -log(9/10), -log(1/10)
      [0.1054, 2.3026]

    References:
      Menon et al., `Long-tail learning via logit adjustment <https://arxiv.org/abs/2007.07314>`_, 2021.
    """
    _validate.check_finite("tau", tau)
    logits = jnp.asarray(logits)
    counts = jnp.asarray(class_counts, logits.dtype)
    return _cross_entropy(logits + tau * jnp.log(counts / jnp.sum(counts)), labels)


def class_balanced_weights(class_counts: ArrayLike, *, beta: float = 0.9999) -> jax.Array:
    r"""Class weights by the effective number of examples, normalised to sum to the number of classes.

    .. math:: w_j \propto \frac{1 - \beta}{1 - \beta^{n_j}}, \qquad \sum_j w_j = C

    Multiply a loss by ``weights[labels]``, or pass that as ``weights=`` of :func:`absgd_jax.entropic_risk`.

    Args:
      class_counts: n, the training examples of each class, positive, shape (C,).
      beta: β in [0, 1); 0 weighs all classes alike, towards 1 the weight becomes 1/n.

    Returns:
      Weights, dimensionless, shape (C,).

    Raises:
      ValueError: if ``beta`` is a Python number outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import losses
      >>> print(losses.class_balanced_weights(jnp.array([2, 1]), beta=0.5).tolist())  # 1/1.5 : 1/1
      [0.8, 1.2]

    References:
      Cui et al., `Class-Balanced Loss Based on Effective Number of Samples <https://arxiv.org/abs/1901.05555>`_, 2019.
    """
    if isinstance(beta, (int, float)) and not 0 <= beta < 1:
        raise ValueError(f"beta={beta!r}: it must be at least 0 and less than 1; 0.9999 is usual.")
    counts = jnp.asarray(class_counts, jnp.result_type(float))
    weights = 1 / -jnp.expm1(counts * jnp.log1p(beta - 1))  # 1 - β^n without cancellation
    return weights / jnp.sum(weights) * counts.shape[0]


def deferred_reweighting(class_weights: ArrayLike, start: int) -> Callable[[ArrayLike], jax.Array]:
    """Deferred re-weighting (DRW): all classes alike for the first steps, the class weights after.

    Args:
      class_weights: weights to defer, shape (C,), for example :func:`class_balanced_weights`.
      start: the step (or epoch, as you count) from which they hold.

    Returns:
      A schedule: step -> class weights, shape (C,).

    Raises:
      ValueError: if ``start`` is a negative Python number.

    Example:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import losses
      >>> schedule = losses.deferred_reweighting(jnp.array([0.8, 1.2]), start=160)
      >>> print(schedule(159).tolist(), schedule(160).tolist())
      [1., 1.] [0.8, 1.2]

    References:
      Cao et al., `Learning Imbalanced Datasets with LDAM <https://arxiv.org/abs/1906.07413>`_, 2019.
    """
    if isinstance(start, (int, float)) and not start >= 0:
        raise ValueError(f"start={start!r}: it must be at least 0.")
    class_weights = jnp.asarray(class_weights)
    return lambda step: jnp.where(jnp.asarray(step) < start, jnp.ones_like(class_weights), class_weights)
