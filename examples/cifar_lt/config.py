"""All settings of a run. The fields are the command line's options, the presets in ``configs/`` their defaults."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, get_args

from examples.cifar_lt.errors import UsageError

Preset = Literal["smoke", "mini", "paper", "best"]
Loss = Literal["ce", "focal", "ldam", "cb-ce", "cb-focal", "cb-ldam", "balanced-softmax", "logit-adjustment"]
Algorithm = Literal["absgd", "recover", "meta", "l2rw"]
Trained = Literal["all", "last-block", "classifier"]
Classifier = Literal["joint", "ncm", "crt", "tau-norm", "lws"]
PRESETS: tuple[str, ...] = get_args(Preset)
LOSSES: tuple[str, ...] = get_args(Loss)
TRAINED: tuple[str, ...] = get_args(Trained)
ALIASES: dict[str, Loss] = {"logit-adjustment": "balanced-softmax"}  # one loss, at τ = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a CIFAR ResNet on an imbalanced subset, in the two stages of ABSGD."""

    preset: Preset
    """Where all other defaults come from: see configs/."""
    depth: int
    """Depth of the ResNet, 6n + 2."""
    width: int
    """Channels of its first stage; the published networks have 16."""
    epochs: int
    """All epochs. The second stage begins after 80 % of them."""
    decay: float
    """Factor on the learning rate in the second stage, after 80 % of the epochs, and again after 90 %."""
    n_max: int | None
    """Training images of the largest class. None takes all there are."""
    test_per_class: int | None
    """Test images of each class. None takes all there are."""
    eval_every: int
    """Epochs between evaluations; the last epoch is always evaluated."""
    batch_size: int = 128
    """Images in a step. What is left over at the end of an epoch (other images every time) is dropped."""

    dataset: Literal["cifar10", "cifar100"] = "cifar10"
    """The dataset."""
    imbalance: Literal["lt", "step"] = "lt"
    """Long-tailed (exponential), or half of the classes frequent and half rare."""
    ratio: float = 100.0
    """Imbalance ratio ρ: the largest class over the smallest."""
    validation: float = 0.0
    """Fraction of each class held out, before the imbalance, to tune on. It is as balanced as the test set."""
    symmetric_noise: float = 0.0
    """Fraction of the training labels replaced by another class."""
    human_labels: str | None = None
    """Human labels of CIFAR-10N (aggre, worse, random1 to random3) or CIFAR-100N (noisy) to train on."""
    loss: Loss = "ce"
    """The per-example loss; cb- weighs the classes by effective number in the second stage."""
    algorithm: Algorithm = "absgd"
    """What takes the steps of the second stage: ABSGD (SGD at λ = ∞), RECOVER, or weights learnt by META or L2RW."""
    temperature: float = math.inf
    """λ of the second stage, in units of loss. inf is SGD."""
    kl_radius: float | None = None
    """Radius in nats: λ follows the losses so that the weights stay that far from uniform."""
    gamma: float = 0.9
    """γ, the weight of the new batch in the running risk. 1 is the mini-batch softmax (TERM)."""
    log_alpha: float | None = None
    """log α of SCENT's rule, which sets γ by the running risk."""
    start: int | None = None
    """Epochs before λ becomes finite. By default the first stage."""
    trained: Trained = "all"
    """What the second stage trains: all layers, the last block and the classifier, or the classifier alone."""
    mixup: bool = False
    """Mix each image with another one of the batch, in a proportion that is uniform between 0 and 1."""
    cutout: int = 0
    """Side of a square that is cut out of each image, in pixels."""
    label_smoothing: float = 0.0
    """Part of the label that is spread over all classes."""
    balanced_batches: bool = False
    """Re-sampling: batches with as many images of each class, drawn with replacement."""
    classifier: Classifier = "joint"
    """A classifier fitted to the features at the end, in place of the one trained with them (Kang et al. 2019)."""
    learning_rate: float = 0.1
    """Learning rate between the warm-up and the first decay."""
    momentum: float = 0.9
    """Momentum."""
    weight_decay: float = 2e-4
    """Weight decay."""
    seed: int = 0
    """Seed of the training: initial parameters, order, augmentation."""
    subset_seed: int = 0
    """Seed of the subset (and the validation split)."""
    data_dir: Path = Path("data")
    """Folder that holds the unpacked official archives, or is to hold them."""
    packed: Path | None = None
    """Folder of packed images, in place of the archives; see sweep --pack."""
    out: Path | None = None
    """Folder of checkpoints, metrics and result. By default runs/ and a name made of the settings."""

    def __post_init__(self):
        needs = {
            "--depth must be 6n + 2: 8, 20, 32, 44, 56 or 110": self.depth >= 8 and self.depth % 6 == 2,
            "--width must be at least 1": self.width >= 1,
            "--epochs must be at least 1": self.epochs >= 1,
            "--batch-size must be at least 1": self.batch_size >= 1,
            "--eval-every must be at least 1": self.eval_every >= 1,
            "--n-max must be at least 1": self.n_max is None or self.n_max >= 1,
            "--test-per-class must be at least 1": self.test_per_class is None or self.test_per_class >= 1,
            "--ratio must be at least 1": 1 <= self.ratio < math.inf,
            "--validation must be at least 0 and less than 1": 0 <= self.validation < 1,
            "--temperature must be a number other than 0": self.temperature != 0 and not math.isnan(self.temperature),
            "--gamma must be above 0 and at most 1": 0 < self.gamma <= 1,
            "--cutout must be from 0 to 32": 0 <= self.cutout <= 32,
            "--label-smoothing must be at least 0 and less than 1": 0 <= self.label_smoothing < 1,
            "--start must be at least 0 and less than --epochs": self.start is None or 0 <= self.start < self.epochs,
            "--symmetric-noise must be at least 0 and less than 1": 0 <= self.symmetric_noise < 1,
            "--human-labels and --symmetric-noise: choose one": not (self.human_labels and self.symmetric_noise),
            "--kl-radius finds its own λ: leave out --temperature": self.kl_radius is None
            or math.isinf(self.temperature),
            "--algorithm recover needs a finite --temperature": self.algorithm != "recover"
            or math.isfinite(self.temperature),
            f"--algorithm {self.algorithm} weighs the examples itself: leave out --temperature and --kl-radius": (
                self.algorithm not in ("meta", "l2rw") or (math.isinf(self.temperature) and self.kl_radius is None)
            ),
            "--classifier replaces a linear classifier, and LDAM's is none": self.classifier == "joint"
            or not self.cosine,
        }
        if self.kl_radius is not None:
            limit = math.log(self.batch_size)
            needs[f"--kl-radius must be above 0 and below log(batch size) = {limit:.3g}"] = 0 < self.kl_radius < limit
        for message, fulfilled in needs.items():
            if not fulfilled:
                raise UsageError(message + ".")

    @property
    def method(self) -> str:
        """The method's name in tables and files."""
        if self.classifier != "joint":
            return self.classifier
        if self.balanced_batches:
            return f"resample-{self.weighting}".removesuffix("-sgd")
        return self.weighting

    @property
    def weighting(self) -> str:
        """The name of what weighs the examples, whatever they are drawn by and the classifier is fitted by."""
        if self.algorithm != "absgd":
            return self.algorithm
        momentum = "" if self.momentum else "-no-momentum"
        if self.kl_radius is not None:
            return "kl-radius" + momentum
        if math.isinf(self.temperature):
            return "sgd" + momentum
        if self.log_alpha is not None:
            return "adaptive-gamma" + momentum
        if self.gamma == 1:
            return "term" + momentum
        return "absgd" + momentum + ("-one-stage" if self.finite_from == 0 else "")

    @property
    def cosine(self) -> bool:
        """Whether the classifier is normalised, which is what LDAM's margins are made for."""
        return self.loss.removeprefix("cb-") == "ldam"

    @property
    def finite_from(self) -> int:
        """The first epoch with a finite λ."""
        return self.second_stage if self.start is None else self.start

    @property
    def column(self) -> str:
        """The dataset's name in tables and files."""
        noise = f"-sym{self.symmetric_noise:g}" if self.symmetric_noise else ""
        noise += f"-{self.human_labels}" if self.human_labels else ""
        return f"{self.dataset}-{'lt' if self.imbalance == 'lt' else 'st'}-{self.ratio:g}{noise}"

    @property
    def name(self) -> str:
        """The name of the cell: method, loss, strength and seed."""
        strength = f"-t{self.temperature:g}" if math.isfinite(self.temperature) else ""
        strength += f"-r{self.kl_radius:g}" if self.kl_radius is not None else ""
        return f"{self.method}-{self.loss}{strength}-s{self.seed}"

    @property
    def classes(self) -> int:
        return 10 if self.dataset == "cifar10" else 100

    @property
    def second_stage(self) -> int:
        """The first epoch of the second stage: λ, class weights, and the learning rate's first decay."""
        return math.ceil(0.8 * self.epochs)

    @property
    def second_decay(self) -> int:
        return math.ceil(0.9 * self.epochs)

    @property
    def warmup(self) -> int:
        """Epochs over which the learning rate rises: 5, but never more than a quarter of them."""
        return min(5, self.epochs // 4)

    def identity(self) -> dict[str, Any]:
        """What makes a run this run and no other, as JSON knows it: everything but where its files lie."""
        fields = dataclasses.asdict(self)
        for name in ("data_dir", "packed", "out"):
            del fields[name]
        return {name: jsonable(value) for name, value in fields.items()}


def jsonable(value: Any) -> Any:
    """JSON has no infinity: it becomes the string that ``float`` and the command line understand."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
