r"""RECOVER: ABSGD's objective by variance-reduced estimates, for two gradients a step.

The objective is F_λ(w) = λ log g(w) with g(w) = E exp(L(w)/λ). On the batch z_t, evaluated at the parameters of this
step and of the last one, g and its gradient are estimated by

.. math::
    u_t &= g(w_t; z_t) + (1 - a) (u_{t-1} - g(w_{t-1}; z_t)) \\
    v_t &= \nabla g(w_t; z_t) + (1 - a) (v_{t-1} - \nabla g(w_{t-1}; z_t))

and the step goes along q_t = λ v_t / u_t. Here u is kept as R = λ log u, in units of loss, and v only as q. With the
batch's risks R̂ = λ log g(w_t; z_t) and R̂' = λ log g(w_{t-1}; z_t) both are sums with the same three coefficients, from
which any common factor, and so every overflow, cancels:

.. math::
    u_t &= e^{\hat R/λ} + (1 - a) (e^{R_{t-1}/λ} - e^{\hat R'/λ}) \\
    u_t q_t &= e^{\hat R/λ} \nabla \hat R + (1 - a) (e^{R_{t-1}/λ} q_{t-1} - e^{\hat R'/λ} \nabla \hat R')

References:
  Qi, Guo, Xu, Jin, Yang, `An Online Method for A Class of Distributionally Robust Optimization with Non-Convex
  Objectives <https://arxiv.org/abs/2006.10138>`_, 2021.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

import absgd_jax
from examples.lab.methods import Info


class RecoverState(NamedTuple):
    """The estimates and where they were made."""

    params_before: Any  # w_{t-1}
    direction: Any  # q_{t-1}, like the parameters
    risk: jax.Array  # R_{t-1}, the running value of the objective; shape=(), dtype=float32 or float64
    temperature: jax.Array  # λ of the last step; of the dtype of risk
    count: jax.Array  # shape=(), dtype=int32


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Recover:
    """The direction q_t in place of the gradient.

    The estimates start afresh from the batch, R = R̂ and q = ∇R̂, in the first step, when λ changes, and where u_t is not
    above a floor: a/10 times the largest of its three terms. In the paper there is none, but u_t ≤ 0 has no logarithm,
    and just above 0 it would be a rounding error that q_t is divided by. With it no coefficient of q_t exceeds 10/a.
    """

    temperature: float  # λ; at ±inf the estimates are those of STORM for the mean loss
    a: float = 0.9  # in (0, 1], the weight of the new batch; 1 is the mini-batch softmax. 0.9 is the authors' default

    needs_held_out = False

    def init(self, params, size):
        del size
        dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(params)))
        return RecoverState(
            params_before=jax.tree.map(jnp.copy, params),  # each field is an array of its own: the state can be donated
            direction=jax.tree.map(jnp.zeros_like, params),
            risk=jnp.zeros((), dtype),
            temperature=jnp.zeros((), dtype),
            count=jnp.zeros((), jnp.int32),
        )

    def direction(self, risk_and_grad, params, state):
        """q_t, of the shape of the parameters, and the next state.

        ``risk_and_grad`` evaluates the batch at any parameters: R̂ (:func:`absgd_jax.entropic_risk` at λ) and its
        gradient. It is called twice, first at ``params``.
        """
        lam = jnp.asarray(self.temperature, state.risk.dtype)
        risk, grads = risk_and_grad(params)
        risk_before, grads_before = risk_and_grad(state.params_before)
        keep = 1 - jnp.asarray(self.a, lam.dtype)

        risks = jnp.stack([risk, state.risk, risk_before]).astype(lam.dtype)
        plain = jnp.isinf(lam)
        scale = jnp.where(plain, 1, lam)
        anchor = jnp.where(lam > 0, jnp.max(risks), jnp.min(risks))
        terms = jnp.where(plain, 1, jnp.exp((risks - anchor) / scale)) * jnp.stack(
            [jnp.ones((), lam.dtype), keep, keep]
        )
        u = terms[0] + (terms[1] - terms[2])
        goes_on = (state.count > 0) & (lam == state.temperature) & (u > 0.1 * (1 - keep) * jnp.max(terms))

        u = jnp.where(goes_on, u, 1)
        new, old, before = jnp.where(goes_on, terms / u, jnp.array([1, 0, 0], lam.dtype))
        direction = jax.tree.map(
            lambda g, q, h: (new * g + (old * q - before * h)).astype(q.dtype), grads, state.direction, grads_before
        )
        running = jnp.where(plain, risks[0] + keep * (risks[1] - risks[2]), anchor + scale * jnp.log(u))
        return direction, RecoverState(
            params_before=params,
            direction=direction,
            risk=jnp.where(goes_on, running, risks[0]),
            temperature=lam,
            count=state.count + 1,
        )

    def gradient(self, losses, params, state, batch, held_out):
        del held_out
        seen = []

        def risk_and_grad(params):
            (risk, found), grads = absgd_jax.value_and_grad(with_losses, has_aux=True)(
                params, batch, temperature=self.temperature
            )
            seen.append(found)
            return risk, grads

        def with_losses(params, batch):
            values, aux = losses(params, batch)
            values = batch.weights * values
            return values, (values, aux)

        direction, after = self.direction(risk_and_grad, params, state)
        values, aux = seen[0]
        lam = after.temperature
        weights = jax.nn.softmax(values / jnp.where(jnp.isinf(lam), jnp.finfo(lam.dtype).max, lam))
        return direction, after, Info(values, weights, after.risk, lam, aux)


BY_NAME = {"recover": lambda recipe: Recover(recipe.temperature)}
