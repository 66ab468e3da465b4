r"""Per-example losses and class weights for long-tailed data. None of them reduces; all compose with ABSGD.

**Softmax losses** take logits of shape (..., C) and integer labels in [0, C) of shape (...), the losses' shape. Some
also take soft labels (mixup, distillation): floating probabilities of the shape of the logits.

**Sigmoid losses**, for binary and multi-label data, take logits and labels of one shape, which is the losses' shape.
Labels are 0 and 1, booleans, or probabilities.

**Ignored labels.** An invalid label is an integer outside [0, C) such as 255 or -100, soft labels that are not a
distribution, or a sigmoid label outside [0, 1] (up to 0.01 counts as rounding). Its loss is NaN, so that it cannot go
unnoticed. Leave it out with ``where``; its gradient is then 0, whatever its logits are:

>>> import absgd_jax
>>> import jax.numpy as jnp
>>> labels = jnp.array([0, 255])
>>> print(absgd_jax.entropic_risk(absgd_jax.losses.focal(jnp.zeros((2, 2)), labels), 1.0, where=labels != 255))
0.1733

**Classes that do not occur**, whose count is 0, have the weight 0, do not affect the margins of the others, and are
left out of a softmax that uses the counts, where the loss of such a label is inf. Counts need not be integers.

Losses are computed and returned in float32, those of float64 logits in float64.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from absgd_jax import _tilt, _validate


def focal(logits: ArrayLike, labels: ArrayLike, *, focusing: float = 2.0) -> jax.Array:
    r"""Focal loss of the softmax: cross entropy, reduced for examples that are already classified well.

    .. math:: L = -(1 - p_y)^\varphi \log p_y, \qquad \text{soft: } L = -\sum_j q_j (1 - p_j)^\varphi \log p_j

    Args:
      logits: shape (..., C).
      labels: integers y in [0, C), shape (...), or probabilities q, shape (..., C).
      focusing: φ ≥ 0; 0 is cross entropy. (The paper calls it γ, which here is ABSGD's.)

    Returns:
      Losses in nats, shape (...), float32 or wider.

    Raises:
      ValueError: if ``labels`` do not fit, or ``focusing`` is negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import losses
      >>> print(losses.focal(jnp.array([[0., 0.]]), jnp.array([1])).tolist())  # (1/2)^2 log 2
      [0.1733]

    References:
      Lin et al., `Focal Loss for Dense Object Detection <https://arxiv.org/abs/1708.02002>`_, 2017.
    """
    _validate.check_finite("focusing", focusing, at_least=0)
    return _softmax_loss(*_operands(logits, labels), focusing)


def sigmoid_focal(logits: ArrayLike, labels: ArrayLike, *, focusing: float = 2.0) -> jax.Array:
    r"""Focal loss of the sigmoid, for binary and multi-label data.

    .. math:: L = -y (1 - p)^\varphi \log p - (1 - y)\, p^\varphi \log(1 - p), \qquad p = \sigma(z)

    Args:
      logits: z, any shape.
      labels: y in [0, 1], of the shape of the logits.
      focusing: φ ≥ 0; 0 is cross entropy.

    Returns:
      Losses in nats, of the shape of the logits, float32 or wider.

    Raises:
      ValueError: if ``labels`` do not fit, or ``focusing`` is negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import losses
      >>> print(losses.sigmoid_focal(jnp.log(jnp.array([3., 3.])), jnp.array([1, 0])).tolist())  # p = 3/4
      [0.0180, 0.7798]

    References:
      Lin et al., `Focal Loss for Dense Object Detection <https://arxiv.org/abs/1708.02002>`_, 2017.
    """
    _validate.check_finite("focusing", focusing, at_least=0)
    return _sigmoid_loss(logits, labels, focusing=focusing)


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
      class_counts: n, the training examples of each class, shape (C,); n_min is that of the rarest class that occurs.
      max_margin: m, the margin of the rarest class, in units of logits.
      exponent: a. The LDAM paper derives 1/4; the ABSGD paper's text says 2/5.
      scale: s, by which margins and logits are multiplied before the softmax.

    Returns:
      Losses in nats, shape (...), float32 or wider.

    Raises:
      ValueError: if ``labels`` or ``class_counts`` do not fit, a count is negative or not finite, or ``max_margin``,
        ``exponent`` or ``scale`` is not a positive finite number.

    Example:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import losses
      >>> loss = losses.ldam(jnp.zeros((2, 2)), jnp.array([0, 1]), jnp.array([16, 1]), scale=1.0)
      >>> print(loss.tolist())  # margins 0.25 and 0.5
      [0.8259, 0.9741]

    References:
      Cao et al., `Learning Imbalanced Datasets with LDAM <https://arxiv.org/abs/1906.07413>`_, 2019.
    """
    logits, labels = _operands(logits, labels, soft=False)
    counts = _counts(class_counts, logits, logits.shape[-1:])
    m = _scalar("max_margin", max_margin, logits.dtype, _validate.check_positive)
    a = _scalar("exponent", exponent, logits.dtype, _validate.check_positive)
    s = _scalar("scale", scale, logits.dtype, _validate.check_positive)
    rarest = jnp.min(jnp.where(counts > 0, counts, jnp.inf))
    margins = m * (jnp.maximum(counts, rarest) / rarest) ** -a
    return _softmax_loss(s * (logits - jnp.where(labels, jnp.broadcast_to(margins, labels.shape), 0)), labels)


def balanced_softmax(logits: ArrayLike, labels: ArrayLike, class_counts: ArrayLike) -> jax.Array:
    r"""Balanced softmax: cross entropy whose softmax knows how frequent each class is.

    .. math:: L = -\log \frac{n_y e^{z_y}}{\sum_j n_j e^{z_j}}

    Args:
      logits: z, shape (..., C).
      labels: integers in [0, C), shape (...), or probabilities, shape (..., C).
      class_counts: n, the training examples of each class, shape (C,).

    Returns:
      Losses in nats, shape (...), float32 or wider.

    Raises:
      ValueError: if ``labels`` or ``class_counts`` do not fit, or a count is negative or not finite.

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


def logit_adjustment(logits: ArrayLike, labels: ArrayLike, class_counts: ArrayLike, *, tau: ArrayLike = 1) -> jax.Array:
    r"""Logit-adjusted cross entropy: the class prior is added to the logits in training, so they need not learn it.

    .. math:: L = \mathrm{CE}\big(z + \tau \log \pi,\, y\big), \qquad \pi_j = n_j / \textstyle\sum_i n_i

    Args:
      logits: z, shape (..., C).
      labels: integers in [0, C), shape (...), or probabilities, shape (..., C).
      class_counts: n, the training examples of each class, shape (C,).
      tau: τ, the strength of the adjustment: 0 is cross entropy, 1 is :func:`balanced_softmax`.

    Returns:
      Losses in nats, shape (...), float32 or wider.

    Raises:
      ValueError: if ``labels`` or ``class_counts`` do not fit, a count is negative or not finite, or ``tau`` is not.

    Example:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import losses
      >>> loss = losses.logit_adjustment(jnp.zeros((2, 2)), jnp.array([0, 1]), jnp.array([3, 1]), tau=2.0)
      >>> print(loss.tolist())  # -log(9/10), -log(1/10)
      [0.1054, 2.3026]

    References:
      Menon et al., `Long-tail learning via logit adjustment <https://arxiv.org/abs/2007.07314>`_, 2021.
    """
    logits, labels = _operands(logits, labels)
    counts = _counts(class_counts, logits, logits.shape[-1:])
    return _softmax_loss(logits + jnp.broadcast_to(_adjustment(counts, tau), logits.shape), labels)


def sigmoid_logit_adjustment(
    logits: ArrayLike, labels: ArrayLike, class_counts: ArrayLike, *, tau: ArrayLike = 1.0
) -> jax.Array:
    r"""Logit-adjusted cross entropy of the sigmoid, for binary and multi-label data.

    .. math:: L = -y \log p - (1 - y) \log(1 - p), \qquad p = \sigma\Big(z + \tau \log \frac{\pi}{1 - \pi}\Big)

    Args:
      logits: z, shape (..., C), or any shape where all share one prior.
      labels: y in [0, 1], of the shape of the logits.
      class_counts: negatives and positives of each label, shape (C, 2), or of all, (2,). π is the share of positives.
      tau: τ, the strength of the adjustment; 0 is cross entropy.

    Returns:
      Losses in nats, of the shape of the logits, float32 or wider.

    Raises:
      ValueError: if ``labels`` or ``class_counts`` do not fit, a count is negative or not finite, or ``tau`` is not.

    Example:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import losses
      >>> loss = losses.sigmoid_logit_adjustment(jnp.zeros(2), jnp.array([0, 1]), jnp.array([3, 1]))
      >>> print(loss.tolist())  # π = 1/4: -log(3/4), -log(1/4)
      [0.2877, 1.3863]

    References:
      Menon et al., `Long-tail learning via logit adjustment <https://arxiv.org/abs/2007.07314>`_, 2021.
    """
    adjustment = _adjustment(_counts(class_counts, logits, (*jnp.shape(logits)[-1:], 2), (2,)), tau)
    return _sigmoid_loss(logits, labels, adjustment[..., 1] - adjustment[..., 0])


def class_balanced_weights(class_counts: ArrayLike, *, beta: float = 0.9999) -> jax.Array:
    r"""Class weights by the effective number of examples, normalised to sum to the number of classes that occur.

    .. math:: w_j \propto \frac{1 - \beta}{1 - \beta^{n_j}}, \qquad \sum_j w_j = C

    Multiply a loss by ``weights[labels]``, or pass this as ``weights=`` of :func:`absgd_jax.entropic_risk`. For
    multi-label data, use ``jnp.where(labels == 1, weights[:, 1], weights[:, 0])``.

    Args:
      class_counts: n, the training examples of each class, shape (..., C); for multi-label data the negatives and
        positives of each label, shape (C, 2).
      beta: β in [0, 1); 0 weighs all classes alike; towards 1 the weight becomes 1/n.

    Returns:
      Weights, dimensionless, of the shape of ``class_counts``, normalised over its last axis.

    Raises:
      ValueError: if a count is negative or not finite, or ``beta`` is a number outside [0, 1).

    Example:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import losses
      >>> print(losses.class_balanced_weights(jnp.array([2, 1, 0]), beta=0.5).tolist())  # 1/1.5 : 1/1 : 0
      [0.8, 1.2, 0.0]

    References:
      Cui et al., `Class-Balanced Loss Based on Effective Number of Samples <https://arxiv.org/abs/1901.05555>`_, 2019.
    """
    _validate.check_scalar("beta", beta, "Use jax.vmap for several values.")
    if not 0 <= (_validate.concrete(beta) or 0) < 1:
        raise ValueError(f"beta={beta!r}: it must be at least 0 and less than 1; 0.9999 is usual.")
    counts = _counts(class_counts)
    if counts.ndim == 0:
        raise ValueError("class_counts has shape (): give one count per class, shape (..., C).")
    present = counts > 0
    log_beta = jnp.log1p(jnp.asarray(beta - 1, counts.dtype))
    effective = -jnp.expm1(jnp.where(present, counts, 1) * log_beta)  # 1 - β^n without cancellation
    weights = jnp.where(present, 1 / effective, 0)
    total = jnp.maximum(jnp.sum(weights, -1, keepdims=True), 1)  # it is at least 1, unless no class occurs
    return weights / total * jnp.sum(present, -1, keepdims=True, dtype=counts.dtype)


def deferred_reweighting(class_weights: ArrayLike, start: int) -> Callable[[ArrayLike], jax.Array]:
    """Deferred re-weighting (DRW): all classes alike for the first steps, the class weights after.

    Args:
      class_weights: weights to defer, any shape, for example :func:`class_balanced_weights`.
      start: the step or epoch from which the class weights hold.

    Returns:
      A schedule: step -> class weights, of the shape of ``class_weights``.

    Raises:
      ValueError: if ``start`` is a negative number.

    Example:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import losses
      >>> schedule = losses.deferred_reweighting(jnp.array([0.8, 1.2]), start=160)
      >>> print(schedule(159).tolist(), schedule(160).tolist())
      [1., 1.] [0.8, 1.2]

    References:
      Cao et al., `Learning Imbalanced Datasets with LDAM <https://arxiv.org/abs/1906.07413>`_, 2019.
    """
    _validate.check_finite("start", start, at_least=0)
    return lambda step: jnp.where(jnp.asarray(step) < start, 1, jnp.asarray(class_weights))


def _adjustment(counts: jax.Array, tau: ArrayLike) -> jax.Array:
    """τ log π; -inf for a class that does not occur, unless τ = 0."""
    tau, present = _scalar("tau", tau, counts.dtype), counts > 0
    prior = jnp.where(present, counts / jnp.sum(counts, -1, keepdims=True), 1)
    return jnp.where(present | (tau == 0), tau * jnp.log(prior), -jnp.inf)


def _softmax_loss(logits: jax.Array, labels: jax.Array, focusing: ArrayLike | None = None) -> jax.Array:
    """Cross entropy or focal loss of the label, or its mean over soft labels; NaN where there is no label."""
    lowest, hard = jnp.finfo(logits.dtype).min, labels.dtype == bool
    exists = jnp.any(labels, -1) if hard else (jnp.min(labels, -1) > -0.01) & (jnp.abs(jnp.sum(labels, -1) - 1) < 0.01)
    logits, labels = (jnp.where(exists[..., None], x, jnp.zeros_like(x)) for x in (logits, labels))
    # Where p may be near 1, of the label or the largest logit, 1 - p has to be the sum of the others.
    alone = labels if hard else _mark(jnp.argmax(logits, -1), logits.shape[-1])
    others = jnp.where(alone, lowest, logits)  # not -inf: with no others at all the gradient would be 0/0
    odds = jax.nn.logsumexp(others, -1, keepdims=True) - jnp.sum(logits, -1, keepdims=True, where=alone)
    surprise, log_miss = jax.nn.softplus(odds), -jax.nn.softplus(-odds)  # -log p and log(1 - p)
    if hard:
        return jnp.where(exists, _focal(surprise, log_miss, focusing)[..., 0], jnp.nan)
    log_total = jax.nn.logsumexp(logits, -1, keepdims=True)
    surprise = jnp.where(alone, surprise, log_total - logits)
    log_miss = jnp.where(alone, log_miss, jnp.log1p(-jnp.exp(others - log_total)))
    return jnp.where(exists, jnp.sum(_share(labels, surprise, log_miss, focusing), -1), jnp.nan)


def _sigmoid_loss(logits: ArrayLike, labels: ArrayLike, shift: ArrayLike = 0.0, focusing=None) -> jax.Array:
    """The same of a label that has two values."""
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if labels.shape != logits.shape:
        raise ValueError(
            f"labels have shape {labels.shape}, logits have shape {logits.shape}: give each logit one label in [0, 1]."
        )
    logits, labels = (x.astype(_tilt.wide(logits.dtype)) for x in (logits, labels))
    exists = jnp.abs(labels - 0.5) < 0.51
    logits = jnp.where(exists, logits + jnp.broadcast_to(shift, logits.shape), 0)
    labels = jnp.where(exists, labels, 0)
    of_one, of_zero = jax.nn.softplus(-logits), jax.nn.softplus(logits)
    loss = _share(labels, of_one, -of_zero, focusing) + _share(1 - labels, of_zero, -of_one, focusing)
    return jnp.where(exists, loss, jnp.nan)


def _share(probability: jax.Array, surprise: jax.Array, log_miss: jax.Array, focusing: ArrayLike | None) -> jax.Array:
    """Probability times loss, with 0 · ∞ = 0: a class that is left out costs nothing where it is not wanted."""
    surprise = jnp.where((probability == 0) & (surprise == jnp.inf), 0, surprise)
    return probability * _focal(surprise, log_miss, focusing)


def _focal(surprise: jax.Array, log_miss: jax.Array, focusing: ArrayLike | None) -> jax.Array:
    """(1 - p)^φ (-log p), of -log p and log(1 - p): a power may have no derivative at p = 1, this has."""
    if focusing is None:
        return surprise
    log_miss = jnp.maximum(log_miss, jnp.finfo(log_miss.dtype).min)  # 0 · log 0 = 0
    return jnp.exp(_scalar("focusing", focusing, log_miss.dtype) * log_miss) * surprise


def _operands(logits: ArrayLike, labels: ArrayLike, *, soft: bool = True) -> tuple[jax.Array, jax.Array]:
    """Logits in the dtype of the loss, and labels of their shape: booleans that mark the class, or probabilities."""
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    whole = jnp.issubdtype(labels.dtype, jnp.integer) and labels.shape == logits.shape[:-1]
    probable = soft and jnp.issubdtype(labels.dtype, jnp.floating) and labels.shape == logits.shape
    if not (whole or probable):
        other = f" or floating probabilities of shape {logits.shape}" if soft else "; soft labels have no margin"
        raise ValueError(
            f"labels ({labels.dtype}) have shape {labels.shape}, logits have shape {logits.shape}: give integers of "
            f"shape {logits.shape[:-1]}{other}."
        )
    logits = logits.astype(_tilt.wide(logits.dtype))
    # Relative to the largest, so that large logits do not take the digits of priors and logarithms added to them.
    logits = logits - jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    return logits, _mark(labels, logits.shape[-1]) if whole else labels.astype(logits.dtype)


def _mark(labels: jax.Array, classes: int) -> jax.Array:
    """True at the label, shape (..., C), where any integers can be compared and shapes are equal."""
    each = jax.lax.broadcasted_iota(jnp.int32, (*labels.shape, classes), labels.ndim)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.expand_dims(labels, -1) == each


def _counts(class_counts: ArrayLike, logits: ArrayLike = 0.0, *shapes: tuple[int, ...]) -> jax.Array:
    """Counts in the dtype of the loss; ValueError if Python's or NumPy's are none, or none of the shapes is theirs."""
    if _validate.check_not_negative("class_counts", class_counts) and 0 in np.any(np.atleast_2d(class_counts), -1):
        raise ValueError(f"class_counts={class_counts!r}: no class occurs. Count the labels of the training data.")
    counts = jnp.asarray(class_counts, _tilt.wide(jnp.result_type(logits)))
    if shapes and counts.shape not in shapes:
        raise ValueError(
            f"class_counts has shape {counts.shape}, logits have shape {jnp.shape(logits)}: give one count per class, "
            f"shape {' or '.join(map(str, shapes))}."
        )
    return counts


def _scalar(name: str, value: ArrayLike, dtype, check=_validate.check_finite) -> jax.Array:
    """A hyper-parameter that neither widens the losses nor broadcasts them."""
    _validate.check_scalar(name, value, "Use jax.vmap for several values.")
    check(name, value)
    return jnp.asarray(value, dtype)
