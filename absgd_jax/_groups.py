"""The weights of Algorithm 1 within groups, such as classes, each with a running risk of its own."""

import operator

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from absgd_jax._merge import AxisName
from absgd_jax._state import ScaleByAbsgdState
from absgd_jax._tilt import align, align_mask
from absgd_jax._weighting import LossWeighting


def within_groups(weighting: LossWeighting, num_groups: int) -> LossWeighting:
    r"""Compares an example only with those of its own group, such as its class, so that every group keeps its weight.

    .. math:: \tilde p_i = e^{(L_i - R_{k_i})/\lambda}, \qquad R_k = \lambda \log s_k

    Each group k has a running risk R_k. The objective is the mean of the groups' robust risks, in proportion to their
    examples. With wrong labels and a long tail, λ < 0 then takes weight from the outliers of each class; without groups
    it would take weight from rare classes, whose losses are all large.

    A batch has few examples of a group. So give the weighting a small γ, such as 0.1, which remembers more of them, and
    ``bias_correction=True``. λ should be a number or a schedule: a rule such as :func:`absgd_jax.trust_fraction` would
    see the KL divergence of these few examples, which is small however different the group's examples are.

    Args:
      weighting: what :func:`absgd_jax.weight_by_absgd` returns.
      num_groups: K, the number of groups, at least 1.

    Returns:
      A pair of functions. ``init() -> state``: the state of ``weighting`` for each group, every field of shape (K,).
      ``update(losses, state, groups, *, where=None, axis_name=None) -> (p̃, state)``: ``groups`` are integers from 0 to
      K - 1, matched to ``losses`` from the first axis on; all else is as in ``weighting``. A group without examples in
      a batch keeps its risk. p̃ is NaN where the group is outside this range, unless ``where`` leaves the example out.

    Raises:
      ValueError: if ``num_groups`` is less than 1, ``groups`` do not fit the losses, or ``state`` does not have K
        groups.
      TypeError: if ``num_groups`` or ``groups`` are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from absgd_jax import weight_by_absgd, within_groups
      >>> weighting = within_groups(weight_by_absgd(-1.0, gamma=0.1, bias_correction=True), 2)
      >>> losses, labels = jnp.array([0.1, 0.1, 3., 5., 5., 9.]), jnp.array([0, 0, 0, 1, 1, 1])
      >>> weights, state = weighting.update(losses, weighting.init(), labels)
      >>> print(weights.tolist(), state.risk.tolist())
      [1.459, 1.459, 0.08, 1.486, 1.486, 0.027] [0.478, 5.396]
    """
    num_groups = operator.index(num_groups)
    if num_groups < 1:
        raise ValueError(f"num_groups={num_groups}: there has to be at least one group.")

    def init_fn():
        return jax.vmap(lambda _: weighting.init())(jnp.arange(num_groups))

    def update_fn(
        losses: ArrayLike,
        state: ScaleByAbsgdState,
        groups: ArrayLike,
        *,
        where: ArrayLike | None = None,
        axis_name: AxisName | None = None,
    ):
        shape = jnp.shape(losses)
        groups = align("groups", groups, shape)
        if not jnp.issubdtype(groups.dtype, jnp.integer):
            raise TypeError(f"groups have dtype {groups.dtype}: give integers from 0 to {num_groups - 1}.")
        if jnp.shape(state.risk) != (num_groups,):
            raise ValueError(
                f"The state's risk has shape {jnp.shape(state.risk)}, that of {num_groups} groups has ({num_groups},): "
                "make the state with the init() that belongs to this update."
            )
        known = (groups >= 0) & (groups < num_groups)
        groups = jnp.where(known, groups, -1).astype(jnp.int32)  # uint8 ends at 255, where there may be more groups
        present = align_mask(True if where is None else where, shape)

        def of_group(state, group):
            return weighting.update(losses, state, where=present & (groups == group), axis_name=axis_name)

        weights, state = jax.vmap(of_group)(state, jnp.arange(num_groups, dtype=jnp.int32))
        return jnp.where(known | ~present, jnp.sum(weights, axis=0), jnp.nan), state

    return LossWeighting(init_fn, update_fn)
