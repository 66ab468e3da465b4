"""The four settings and the hyper-parameters among which the validation split chooses."""

from collections.abc import Callable
from dataclasses import dataclass, field

import absgd_jax
from examples.digits import data

INF = float("inf")
LINEAR, MLP = (data.PIXELS, data.CLASSES), (data.PIXELS, 64, data.CLASSES)

# SGD chooses among the same learning rates as everyone else.
LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0)


@dataclass(frozen=True)
class Method:
    """A way to set the temperature: ``temperature(v)`` for each v among ``values``."""

    name: str
    values: tuple[float, ...]
    temperature: Callable = field(default=lambda value: value)


SGD = Method("SGD", (INF,))  # λ = ∞, bit for bit
LIFT = Method("ABSGD", (8.0, 4.0, 2.0, 1.0, 0.5, 0.1, 0.01))
SILENCE = Method("ABSGD", (-8.0, -4.0, -2.8, -2.0, -1.4, -1.0))
RADIUS = Method("KL radius", (0.1, 0.3, 0.6, 1.0, 1.5, 2.3), absgd_jax.kl_radius)


@dataclass(frozen=True)
class Setting:
    """What is trained, on what, for how long, and by which methods; ``after`` names the setting it continues."""

    title: str
    sample: Callable[[data.Split, int], data.Sample]
    special: str  # what the special examples of the sample are called
    sizes: tuple[int, ...]
    passes: int
    batch_size: int
    methods: tuple[Method, ...]
    after: str | None = None


SETTINGS = {
    "few": Setting("Long tail, 5 passes", data.long_tail, "rare", LINEAR, 5, 124, (SGD, LIFT)),
    "many": Setting("Long tail, 50 passes", data.long_tail, "rare", LINEAR, 50, 124, (SGD, LIFT)),
    "noise": Setting("40 % wrong labels", data.wrong_labels, "wrong", MLP, 25, 64, (SGD, SILENCE)),
    "fit": Setting("Long tail, fitted", data.long_tail, "rare", MLP, 60, 31, (SGD,)),
    "fitted": Setting("… continued", data.long_tail, "rare", MLP, 40, 31, (SGD, LIFT, RADIUS), after="fit"),
}
