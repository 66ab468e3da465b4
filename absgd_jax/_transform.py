"""The gradient-level API: ABSGD as an Optax gradient transformation."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from absgd_jax._recursion import recursion
from absgd_jax._rules import Gamma, Rule, Temperature
from absgd_jax._tilt import wide
from absgd_jax._validate import check_scalar


def scale_by_absgd(
    temperature: Temperature,
    gamma: Gamma = 0.9,
    *,
    max_weight: ArrayLike = float("inf"),
    bias_correction: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Turns the gradient of a batch's robust risk into that of Algorithm 1, by one scalar.

    .. math::
        s_{t+1} = (1-\gamma)\, s_t + \gamma \tilde g_t, \quad \tilde g_t = \tfrac1B \sum_i e^{L_i/\lambda}, \qquad
        \tfrac1B \sum_i \frac{e^{L_i/\lambda}}{s_{t+1}} \nabla L_i = \frac{\tilde g_t}{s_{t+1}} \nabla \hat R_t,
        \quad \hat R_t = \lambda \log \tilde g_t

    s is kept as R = λ log s, in units of loss, which is finite for every λ. The mean weight g̃/s of a batch is at most
    1/γ (1 where a rule sets λ). At λ = ±inf gradients pass through bit for bit. When λ leaves ∞, R starts afresh; any
    other change of λ keeps it.

    *Bounded weights.* A loss 10 λ above another weighs :math:`e^{10}` times as much: at a learning rate that still
    moves a trained network, a few such losses destroy it within an epoch. With ``max_weight`` c, the exponential
    becomes :math:`\min(e^{(L_i - R_t)/\lambda}, c)`, in g̃ and in the gradient alike, with R_t the running risk before
    the batch, so that parts still merge exactly. This is Algorithm 1 for a KL-regularised DRO in which no example has
    more than c times its share,

    .. math::
        F_{\lambda,c}(w) = \max_{0 \le q \le c,\ \mathbb{E} q = 1} \mathbb{E}[q L] - \lambda\, \mathbb{E}[q \log q]
        = \min_R\ R + \lambda\, \mathbb{E}\big[e_c\big(\tfrac{L - R}{\lambda}\big) - 1\big],

    where e_c is the exponential, continued by its tangent beyond log c (for λ < 0 max and min change places). c = ∞ is
    F_λ; λ → 0 is the conditional value at risk of level 1/c or, for λ < 0, the mean of the fraction 1/c of smallest
    losses. R then is the minimiser, not the objective. The first batch has no R yet and is taken at λ = ∞. The weight
    in the paper's normalisation is at most :math:`c\, s_t/s_{t+1}`.

    A value that is not finite leaves the running risk unchanged and lets the gradients pass, so that
    :func:`optax.apply_if_finite` around the whole chain discards the step and nothing is lost. The -0. that
    :func:`absgd_jax.entropic_risk` returns for a fully masked batch does the same.

    Do not put :class:`optax.MultiSteps` around this: it passes on the last micro-batch's value and averages gradients,
    neither of which is a merge. Use ``absgd_jax.value_and_grad(..., num_microbatches=k)``, which is exact. To schedule
    λ, pass the schedule here: :func:`optax.inject_hyperparams` keeps a schedule's *last* value in its state, so R̂
    would be computed with a λ that is one step old.

    A schedule of λ must not reach 0, as a cosine or linear one to ``end_value=0`` does: there the risk is the largest
    loss ever seen, every batch below it has the factor 0, and training stops although the updates are finite. End it
    above 0, at a small multiple of the typical loss.

    Args:
      temperature: λ in units of loss: a number, an array, a schedule of the step count, or a rule such as
        :func:`absgd_jax.trust_fraction` or :func:`absgd_jax.kl_radius`. Positive emphasises hard examples, negative
        suppresses outliers, ±inf is the plain gradient.
      gamma: γ in (0, 1], the weight of the new batch in the moving average: a number, an array, a schedule (which may
        end at 0: the past then stays as it is), or a rule such as :func:`absgd_jax.adaptive_gamma`. 1 is the mini-batch
        softmax.
      max_weight: c > 1, a number or an array; inf is Algorithm 1. The batch must be reduced with the state's threshold:
        ``value_and_grad(..., state=)`` does so; in your own loss pass it to :func:`absgd_jax.entropic_risk`. The
        threshold carries no gradient, so a bounded run has no true derivative with respect to λ or c.
      bias_correction: False is the paper's s_0 = 0, so that the first batches weigh 1/γ; True divides s_t by
        1 - (1 - γ)^t, as Adam does.

    Returns:
      A transformation with state :class:`absgd_jax.ScaleByAbsgdState`. Its update takes ``value=R̂``, the batch's
      :func:`absgd_jax.entropic_risk` at λ, of which ``updates`` are the gradient, and with a rule that has a radius
      also ``kl=``.

    Raises:
      ValueError: if ``temperature`` is NaN or 0, ``gamma`` is outside (0, 1], ``max_weight`` is not above 1 (Python and
        NumPy numbers are checked, JAX arrays are not), or ``value`` is not a scalar.
      TypeError: if ``update`` is called without ``value`` (or, with a rule that has a radius, without ``kl``).

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from absgd_jax import entropic_risk, scale_by_absgd
      >>> optimizer = optax.chain(scale_by_absgd(temperature=1.0), optax.sgd(0.1, momentum=0.9))
      >>> params = jnp.array([1.0, -2.0])
      >>> state = optimizer.init(params)
      >>> def risk(w):
      ...   return entropic_risk((w - jnp.array([0.5, 3.0])) ** 2, 1.0)
      >>> value, grads = jax.value_and_grad(risk)(params)
      >>> updates, state = optimizer.update(grads, state, params, value=value)
      >>> print(optax.apply_updates(params, updates).tolist())
      [1., -0.889]

    References:
      Qi et al., `Attentional-Biased Stochastic Gradient Descent <https://arxiv.org/abs/2012.06951>`_, Algorithm 1.
    """
    rec = recursion(temperature, gamma, max_weight, bias_correction)

    def init_fn(params):
        return rec.init(_state_dtype(params))

    def update_fn(updates, state, params=None, *, value=None, kl=None, **extra_args):
        del params, extra_args
        if value is None:
            raise TypeError(
                "ABSGD needs the batch's risk: call update(grads, state, params, value=risk), where "
                "risk = absgd_jax.entropic_risk(losses, temperature) and grads is its gradient; "
                "absgd_jax.value_and_grad returns both."
            )
        if kl is None and isinstance(temperature, Rule) and temperature.radius is not None:
            raise TypeError(
                "This rule for the temperature needs the batch's KL divergence: call update(grads, state, params, "
                "value=risk, kl=kl), where absgd_jax.value_and_grad(..., with_kl=True) returns ((risk, kl), grads)."
            )
        check_scalar("value", value, "Pass absgd_jax.entropic_risk(losses, temperature), not the losses.")
        if kl is not None:
            check_scalar("kl", kl, "Pass the KL of the whole batch, as absgd_jax.value_and_grad returns it.")
        factor, state = rec.step(value, kl, state)
        return jax.tree.map(partial(_scale, factor), updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _scale(factor: jax.Array, grad: jax.Array) -> jax.Array:
    """The product, in the dtype of the gradient."""
    grad = jnp.asarray(grad)
    with jax.numpy_dtype_promotion("standard"):  # float64 factors and complex gradients
        return (factor * grad.astype(wide(grad.dtype))).astype(grad.dtype)


def _state_dtype(params: optax.Params) -> jnp.dtype:
    """float32, or float64 if any parameter is."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(params)]
    real = [jnp.finfo(dtype).dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)]
    return max([jnp.dtype(jnp.float32), *map(wide, real)], key=lambda dtype: dtype.itemsize)
