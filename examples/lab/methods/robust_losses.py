"""Losses made for wrong labels, in place of cross entropy: functions of it and, some of them, of the logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from examples.lab.methods import Annealed, gradient_of_mean


def generalised_cross_entropy(loss, logits, q):
    """(1 - p^q) / q, from cross entropy (q = 0) to the mean absolute error (q = 1); Zhang and Sabuncu 2018."""
    del logits
    return -jnp.expm1(-q * loss) / q


def symmetric_cross_entropy(loss, logits, alpha):
    """α CE - log(10⁻⁴) (1 - p): the second is the cross entropy the other way round; Wang et al. 2019, their β = 1."""
    del logits
    return alpha * loss - jnp.log(1e-4) * -jnp.expm1(-loss)


def label_smoothing(loss, logits, part):
    """Cross entropy with a part of the label spread over all classes; Lukasik et al. 2020."""
    return (1 - part) * loss - part * jnp.mean(jax.nn.log_softmax(logits), axis=-1)


def forward_correction(loss, logits, rate):
    """-log of the probability of the label as given, if it was replaced by any other at a rate; Patrini et al. 2017."""
    wrong = rate / (logits.shape[-1] - 1)
    return -jnp.log(wrong + (1 - rate - wrong) * jnp.exp(-loss))


def reweighted(loss, logits, threshold):
    """Losses weighted by exp(min(L, τ) / (τ + 1)), which is at most e: RGD, Kumar et al. 2023."""
    del logits
    return jax.lax.stop_gradient(jnp.exp(jnp.minimum(loss, threshold) / (threshold + 1))) * loss


FUNCTIONS = {
    "gce": generalised_cross_entropy,
    "sce": symmetric_cross_entropy,
    "smoothing": label_smoothing,
    "forward": forward_correction,
    "rgd": reweighted,
}


@register_dataclass
@dataclasses.dataclass(frozen=True)
class RobustLoss:
    """The mean over the batch of a function of the losses."""

    name: str = dataclasses.field(metadata={"static": True})
    number: float | Annealed  # annealed, it is its reciprocal: |λ| of generalised cross entropy

    needs_held_out = False

    def init(self, params, size):
        del params, size
        return jnp.zeros((), jnp.int32)  # steps done

    def gradient(self, losses, params, state, batch, held_out):
        del held_out
        number = 1 / self.number(state) if isinstance(self.number, Annealed) else self.number
        objective = lambda values, aux: FUNCTIONS[self.name](values, aux.logits, number)  # noqa: E731
        grads, info = gradient_of_mean(objective, losses, params, batch)
        return grads, state + 1, info


def _by_name(name):
    def make(recipe):
        if recipe.anneal_from is not None:
            return RobustLoss(name, Annealed(1 / recipe.anneal_from, 1 / recipe.parameter, recipe.epochs))
        return RobustLoss(name, 1 - recipe.fraction if name == "forward" else recipe.parameter)

    return make


BY_NAME = {name: _by_name(name) for name in FUNCTIONS}
