"""Ready-made optimizers: ABSGD in front of momentum SGD and of Adam."""

import optax
from jax.typing import ArrayLike

from absgd_jax._rules import Gamma, Temperature
from absgd_jax._transform import scale_by_absgd
from absgd_jax._validate import concrete


def absgd(
    learning_rate: optax.ScalarOrSchedule,
    temperature: Temperature,
    gamma: Gamma = 0.9,
    momentum: float | None = 0.9,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    *,
    max_weight: ArrayLike = float("inf"),
    bias_correction: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""ABSGD with momentum and weight decay: Algorithm 1 as one Optax optimizer.

    .. math::
        v_{t+1} = \mu v_t + \tfrac1B \sum_i \tilde p_i \nabla L_i + \omega w_t, \qquad w_{t+1} = w_t - \eta v_{t+1}

    At ``temperature=float("inf")`` it is momentum SGD, bit for bit up to compiler fusion.

    Args:
      learning_rate: η, a number, an array or a schedule.
      temperature: λ, as for :func:`absgd_jax.scale_by_absgd`.
      gamma: γ, as there.
      momentum: μ; None is no momentum.
      weight_decay: ω, of the regulariser r(w) = ω‖w‖²/2, whose gradient is not weighted by p̃.
      nesterov: whether the momentum is Nesterov's.
      max_weight: c, the largest weight of an example, as for :func:`absgd_jax.scale_by_absgd`; inf is the paper's form.
      bias_correction: as for :func:`absgd_jax.scale_by_absgd`; True spares the first batches a weight of 1/γ, which
        matters where γ is small.

    Returns:
      An optimizer whose update takes ``value=``, the batch's :func:`absgd_jax.entropic_risk`.

    Raises:
      ValueError: if ``temperature`` is NaN or 0, ``gamma`` is outside (0, 1], or ``max_weight`` is not above 1.

    Example:
      >>> import absgd_jax, jax, jax.numpy as jnp, optax
      >>> x, y = jnp.array([0., 1., 2., 3.]), jnp.array([1., 3., 5., 12.])
      >>> def per_example_loss(w, x, y):
      ...   return (w[0] * x + w[1] - y) ** 2
      >>> optimizer = absgd_jax.absgd(0.05, temperature=-2.0, momentum=None)  # suppresses the outlier
      >>> loss_and_grad = absgd_jax.value_and_grad(per_example_loss)
      >>> @jax.jit
      ... def step(w, state):
      ...   risk, grads = loss_and_grad(w, x, y, state=state)
      ...   updates, state = optimizer.update(grads, state, w, value=risk)
      ...   return optax.apply_updates(w, updates), state
      >>> w = jnp.zeros(2)
      >>> state = optimizer.init(w)
      >>> for _ in range(500):
      ...   w, state = step(w, state)
      >>> print(w.tolist())  # y = 2x + 1
      [2., 1.]

    References:
      Qi et al., `Attentional-Biased Stochastic Gradient Descent <https://arxiv.org/abs/2012.06951>`_, Algorithm 1.
    """
    return optax.chain(
        scale_by_absgd(temperature, gamma, max_weight=max_weight, bias_correction=bias_correction),
        _decay(weight_decay),
        optax.identity() if momentum is None else optax.trace(momentum, nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )


def abadam(
    learning_rate: optax.ScalarOrSchedule,
    temperature: Temperature,
    gamma: Gamma = 0.9,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    max_weight: ArrayLike = float("inf"),
    bias_correction: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """ABSGD's weights in front of Adam, with decoupled weight decay (AdamW).

    Args:
      learning_rate: a number, an array or a schedule.
      temperature: λ, as for :func:`absgd_jax.scale_by_absgd`.
      gamma: γ, as there.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled weight decay, multiplied by the learning rate as in :func:`optax.adamw`.
      max_weight: c, the largest weight of an example, as for :func:`absgd_jax.scale_by_absgd`; inf is the paper's form.
      bias_correction: as for :func:`absgd_jax.scale_by_absgd`.

    Returns:
      An optimizer whose update takes ``value=``, the batch's :func:`absgd_jax.entropic_risk`.

    Raises:
      ValueError: if ``temperature`` is NaN or 0, ``gamma`` is outside (0, 1], or ``max_weight`` is not above 1.

    Example:
      >>> import absgd_jax
      >>> optimizer = absgd_jax.abadam(1e-3, temperature=1.0, weight_decay=1e-2)

    References:
      Kingma & Ba, `Adam <https://arxiv.org/abs/1412.6980>`_; Loshchilov & Hutter, `AdamW
      <https://arxiv.org/abs/1711.05101>`_.
    """
    return optax.chain(
        scale_by_absgd(temperature, gamma, max_weight=max_weight, bias_correction=bias_correction),
        optax.scale_by_adam(b1, b2, eps),
        _decay(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def _decay(weight_decay: float) -> optax.GradientTransformation:
    """Nothing for a concrete 0, so that it costs nothing and needs no parameters."""
    return optax.identity() if concrete(weight_decay) == 0 else optax.add_decayed_weights(weight_decay)
