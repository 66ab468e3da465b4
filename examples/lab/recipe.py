"""A run as a user asks for it: the fields are the command line's options, and what tables and records speak of."""

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from examples.lab import methods
from examples.lab.classifiers import CLASSIFIERS
from examples.lab.errors import UsageError
from examples.lab.losses import LOG_PROBABILITIES, LOSSES, NEEDS_COSINES
from examples.lab.methods import Annealed
from examples.lab.task import Task

Kind = TypeVar("Kind", bound=Task)


def _by_name() -> dict[str, Callable[["Recipe"], Any]]:
    """Every method of the folder methods/ by its names there."""
    modules = [importlib.import_module(f"{methods.__name__}.{m.name}") for m in pkgutil.iter_modules(methods.__path__)]
    return {name: make for module in modules for name, make in module.BY_NAME.items()}


METHODS = _by_name()
NEEDS = {  # numbers that a method must be given, and that others must not
    "temperature": ("absgd", "within-class", "term", "adaptive-gamma", "recover"),
    "kl_radius": ("kl-radius",),
    "fraction": ("trust", "focus", "forward", "small-loss"),
    "parameter": ("gce", "sce", "smoothing", "rgd", "small-loss", "elr"),
    "log_alpha": ("adaptive-gamma",),
    "gamma": ("within-class",),  # small: a batch has few examples of a class
}
TAKES = {  # and need not be given
    "max_weight": ("absgd", "within-class", "term", "adaptive-gamma", "kl-radius", "trust", "focus"),
    "gamma": ("absgd", "kl-radius", "trust", "focus"),
    "anneal_from": ("absgd", "within-class", "gce"),
}


SYMBOLS = {  # of what says how uneven the weights are
    "temperature": "λ",
    "kl_radius": "ρ",
    "fraction": "fraction",
    "parameter": "p",
    "max_weight": "c",
    "log_alpha": "log α",
    "anneal_from": "from",
}
ON = {  # losses of which a method is a function; others take any
    **dict.fromkeys(("gce", "sce"), LOG_PROBABILITIES),
    **dict.fromkeys(("smoothing", "forward"), ("ce",)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Trains one model. The same command continues a run that was stopped."""

    COSINES: ClassVar[bool] = False  # whether the network has a normalised classifier for the losses that need one

    preset: str
    """Where all other defaults come from."""
    dataset: str
    """The dataset, by its name in tables and files."""
    method: str = "sgd"
    """What weights the examples in the second stage."""
    loss: str = "ce"
    """The loss of an example; cb- weights it by class in the second stage, deferred- is ce in the first."""
    temperature: float = math.inf
    """λ of the second stage, in units of loss. inf is SGD."""
    kl_radius: float | None = None
    """Distance of the weights from uniform, in nats."""
    fraction: float | None = None
    """Fraction of the examples to trust (of right labels), or to focus on."""
    parameter: float | None = None
    """The number of a method that has one of its own: see methods/."""
    max_weight: float = math.inf
    """Largest weight that a loss can have relative to one as large as the running risk."""
    gamma: float = 0.9
    """γ, the weight of the new batch in the running risk."""
    log_alpha: float | None = None
    """log α of SCENT's rule, which sets γ by the running risk."""
    anneal_from: float | None = None
    """λ (of gce its parameter) in the first step, from where it goes to the one given in a third of all epochs."""
    epochs: int = 10
    """All epochs."""
    begin: float = 0.0
    """Part of the epochs before the second stage."""
    rate: float = 0.1
    """The largest learning rate."""
    momentum: float = 0.9
    """Momentum."""
    weight_decay: float = 0.0
    """Weight decay."""
    batch_size: int = 128
    """Examples in a step."""
    balanced_batches: bool = False
    """Re-sampling: all classes are equally likely in a batch."""
    classifier: str | None = None
    """A classifier fitted to the features at the end, in place of the one trained with them."""
    validation: float = 0.0
    """Fraction of each class held out, before the imbalance, to choose by."""
    seed: int = 0
    """Seed of the training: initial parameters, order, augmentation."""
    subset_seed: int = 0
    """Seed of the subset, of wrong labels and of the validation split."""

    def __post_init__(self):
        for name, value, known in (
            ("method", self.method, METHODS),
            ("loss", self.losses[1], LOSSES),
            ("classifier", self.classifier, (None, *CLASSIFIERS)),
        ):
            if value not in known:
                raise UsageError(f"--{name} {getattr(self, name)}: choose from {', '.join(filter(None, known))}.")
        for rule, fulfilled in self.rules().items():
            if not fulfilled:
                raise UsageError(rule + ".")
        default = {field.name: field.default for field in dataclasses.fields(self)}
        for name in NEEDS | TAKES:
            takers = (*NEEDS.get(name, ()), *TAKES.get(name, ()))
            flag, given = f"--{name.replace('_', '-')}", getattr(self, name) != default[name]
            if given and self.method not in takers:
                raise UsageError(f"{flag} {getattr(self, name)} is for {', '.join(takers)}, not for {self.method}.")
            if not given and self.method in NEEDS.get(name, ()):
                raise UsageError(f"--method {self.method} needs {flag}.")

    def rules(self) -> dict[str, bool]:
        """What has to be true of the numbers; a comparison with NaN is not."""
        suited = ON.get(self.method, LOSSES)
        return {
            f"--temperature {self.temperature}: it must be a number other than 0": abs(self.temperature) > 0,
            f"--kl-radius {self.kl_radius}: it must be above 0": self.kl_radius is None
            or 0 < self.kl_radius < math.inf,
            f"--fraction {self.fraction}: it must be between 0 and 1": self.fraction is None or 0 < self.fraction < 1,
            f"--parameter {self.parameter}: it must be above 0": self.parameter is None
            or 0 < self.parameter < math.inf,
            f"--parameter {self.parameter}: of {self.method} it must be at most 1": self.method
            not in ("gce", "smoothing")
            or self.parameter is None
            or self.parameter <= 1,
            f"--method {self.method} is a function of {' or '.join(suited)}, not of --loss {self.loss}": (
                self.losses[1] in suited
            ),
            f"--loss {self.loss} needs a normalised classifier, which this experiment has not": (
                self.COSINES or self.losses[1] not in NEEDS_COSINES
            ),
            f"--method l2rw gives the weights itself, and --loss {self.loss} would be without those of its classes": (
                self.method != "l2rw" or not self.loss.startswith("cb-")
            ),
            f"--loss {self.loss}: choose one of cb- and deferred-": not self.loss.startswith(
                ("cb-deferred-", "deferred-cb-")
            ),
            f"--max-weight {self.max_weight}: it must be above 1": self.max_weight > 1,
            f"--gamma {self.gamma}: it must be above 0 and at most 1": 0 < self.gamma <= 1,
            f"--log-alpha {self.log_alpha}: it must be finite": self.log_alpha is None or math.isfinite(self.log_alpha),
            f"--anneal-from {self.anneal_from}: it must have the sign of the number that it goes to": (
                self.anneal_from is None or 0 < self.anneal_from * (self.parameter or self.temperature) < math.inf
            ),
            f"--anneal-from {self.anneal_from} is in the first step: --begin 0": self.anneal_from is None
            or self.begin == 0,
            f"--epochs {self.epochs}: it must be at least 1": self.epochs >= 1,
            f"--begin {self.begin}: it must be from 0 to 1": 0 <= self.begin <= 1,
            f"--rate {self.rate}: it must be above 0 and finite": 0 < self.rate < math.inf,
            f"--momentum {self.momentum}: it must be at least 0 and less than 1": 0 <= self.momentum < 1,
            f"--weight-decay {self.weight_decay}: it must be at least 0 and finite": 0 <= self.weight_decay < math.inf,
            f"--batch-size {self.batch_size}: it must be at least 1": self.batch_size >= 1,
            f"--validation {self.validation}: it must be at least 0 and less than 1": 0 <= self.validation < 1,
            f"--seed {self.seed}: it must be from 0 to 2147483647": 0 <= self.seed < 2**31,
            f"--subset-seed {self.subset_seed}: it must be from 0 to 2147483647": 0 <= self.subset_seed < 2**31,
        }

    @property
    def losses(self) -> tuple[str, str]:
        """Of the first and of the second stage, without class weights."""
        plain = self.loss.removeprefix("cb-").removeprefix("deferred-")
        return ("ce" if self.loss.startswith("deferred-") else plain), plain

    @property
    def strength(self) -> str:
        """What says how uneven the weights are, for names."""
        numbers = {"t": self.temperature, "r": self.kl_radius, "f": self.fraction, "p": self.parameter}
        numbers |= {"c": self.max_weight, "a": self.log_alpha, "from": self.anneal_from}
        return "".join(f"-{k}{v:g}" for k, v in numbers.items() if v is not None and math.isfinite(v))

    @property
    def title(self) -> str:
        """The method in tables: what weights the examples, and what else is done to them."""
        if self.classifier is not None:
            return self.classifier if self.method == "sgd" else f"{self.classifier}-{self.method}"
        if self.balanced_batches:
            return "resample" if self.method == "sgd" else f"resample-{self.method}"
        bounded = self.method == "absgd" and math.isfinite(self.max_weight)
        ending = "" if self.anneal_from is None else "-annealed"
        return ("bounded-absgd" if bounded else self.method) + ending

    def make_task(self, kind: type[Kind], **others: Any) -> Kind:
        """The task that has what it shares with the recipe, by the fields' names, and the rest as given."""
        shared = {field.name for field in dataclasses.fields(kind)} & {field.name for field in dataclasses.fields(self)}
        return kind(**{name: getattr(self, name) for name in shared} | others)

    @property
    def annealed_temperature(self) -> float | Annealed:
        """λ, or the schedule by which it is reached."""
        return (
            self.temperature if self.anneal_from is None else Annealed(self.anneal_from, self.temperature, self.epochs)
        )

    def make_method(self) -> Any:
        return METHODS[self.method](self)
