"""The loss-level API: the weights of Algorithm 1 for users who weight their losses themselves."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from absgd_jax._merge import AxisName, Part, merge_devices
from absgd_jax._recursion import recursion
from absgd_jax._rules import Gamma, Rule, Temperature, check_radius
from absgd_jax._state import ScaleByAbsgdState
from absgd_jax._tilt import clip_losses, is_infinite, reduction_inputs, tilt


class LossWeighting(NamedTuple):
    """A pair of pure functions, made by :func:`weight_by_absgd` in the manner of an Optax transformation."""

    init: Callable[[], ScaleByAbsgdState]
    update: Callable[..., tuple[jax.Array, ScaleByAbsgdState]]


def weight_by_absgd(
    temperature: Temperature,
    gamma: Gamma = 0.9,
    *,
    max_weight: ArrayLike = float("inf"),
    bias_correction: bool = False,
) -> LossWeighting:
    r"""The per-example weights of Algorithm 1, for users who weight their losses themselves.

    .. math:: \tilde p_i = e^{L_i/\lambda} / s_{t+1}, \qquad s_{t+1} = (1-\gamma)\, s_t + \gamma \tilde g_t

    This is the recursion of :func:`absgd_jax.scale_by_absgd` at the level of the loss: the gradient of ``mean(p̃ · L)``
    with p̃ held constant is what that transformation produces. Use one or the other, not both. But to look at the
    weights of a step of that transformation, pass ``update`` the losses of the batch and the transformation's state
    before the step.

    A term of the objective that belongs to the batch or the model, not to an example (a load-balance loss, a group
    penalty), is added here: ``mean(p̃ · L) + term``. Added to every example's loss, it would move R, and its gradient
    would be scaled by g̃/s.

    Args:
      temperature: λ, as for :func:`absgd_jax.scale_by_absgd`.
      gamma: γ, as there.
      max_weight: c, as there.
      bias_correction: as there.

    Returns:
      A pair of functions. ``init() -> state``. ``update(losses, state, *, where=None, axis_name=None) -> (p̃, state)``:
      ``losses`` of any shape; ``where`` is a mask whose False leaves an example out, matched from the first axis on;
      ``axis_name`` names a ``shard_map``, ``pmap`` or ``vmap`` axis over which the batch is spread. p̃ has the shape of
      ``losses``, is 0 where an example is left out, and carries no gradient. The objective is ``sum(p̃ · L) / n``,
      where n is the number of losses that are not left out; over devices both are sums over all of them. Losses that
      are left out have to be finite (0 times NaN is NaN).

    Raises:
      ValueError: if ``temperature`` is NaN or 0, ``gamma`` is outside (0, 1], ``max_weight`` is not above 1, or the
        radius of a rule such as :func:`absgd_jax.kl_radius` is at or above log(batch size), masked examples included.

    Example:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import weight_by_absgd
      >>> weighting = weight_by_absgd(temperature=1.0, bias_correction=True)
      >>> state = weighting.init()
      >>> weights, state = weighting.update(jnp.array([0., 1., 4.]), state)
      >>> print(weights.tolist(), state.risk)
      [0.051, 0.14, 2.809] 2.967

    References:
      Qi et al., `Attentional-Biased Stochastic Gradient Descent <https://arxiv.org/abs/2012.06951>`_, Algorithm 1.
    """
    rec = recursion(temperature, gamma, max_weight, bias_correction)

    def init_fn():
        return rec.init(jnp.result_type(float))

    def update_fn(
        losses: ArrayLike,
        state: ScaleByAbsgdState,
        *,
        where: ArrayLike | None = None,
        axis_name: AxisName | None = None,
    ):
        devices = 1 if axis_name is None else jax.lax.psum(1, axis_name)
        if isinstance(temperature, Rule):
            check_radius(temperature.radius, devices * math.prod(jnp.shape(losses)))
        losses, state = jax.lax.stop_gradient(losses), rec.now(state)
        losses, lam, weights = reduction_inputs(losses, state.temperature, None, where)
        batch = tilt(clip_losses(losses, lam, state.threshold), lam, weights)
        part, share = Part(batch.risk, batch.weight, batch.kl), 1
        if axis_name is not None:
            part, share, _ = merge_devices(part, lam, axis_name)
        factor, state = rec.step(part.risk, part.kl, state)
        # The shares first: a factor that overflows with the weight of the batch would make NaN of a share of 0.
        tilted = jnp.asarray(factor, losses.dtype) * (share * part.weight * batch.shares)
        plain = is_infinite(lam) & jnp.isfinite(part.risk)  # 1/n · n would not be 1 for every n
        tilted = jnp.where(plain | (weights == 0), weights, jnp.minimum(tilted, jnp.finfo(losses.dtype).max))
        return jax.lax.stop_gradient(tilted), state

    return LossWeighting(init_fn, update_fn)
