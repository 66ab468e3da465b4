"""The losses by name: functions of (logits, labels, class counts) that return one loss an example."""

from collections.abc import Callable
from functools import partial

import jax
import optax

from absgd_jax import losses

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


LOSSES: dict[str, Loss] = {
    "ce": lambda logits, labels, counts: optax.softmax_cross_entropy_with_integer_labels(logits, labels),
    "focal": lambda logits, labels, counts: losses.focal(logits, labels),
    "ldam": losses.ldam,
    "balanced-softmax": losses.balanced_softmax,  # at τ = 1 the logit adjustment is the same loss
    **{f"logit-adjustment-{tau:g}": partial(losses.logit_adjustment, tau=tau) for tau in (1.25, 1.5, 2.0)},
}
NEEDS_COSINES = ("ldam",)  # losses of a normalised classifier
LOG_PROBABILITIES = tuple(name for name in LOSSES if name not in ("focal", "ldam"))  # minus the log of a probability
