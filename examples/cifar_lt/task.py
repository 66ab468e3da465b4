"""CIFAR-10 and CIFAR-100, imbalanced or with wrong labels, and the networks that are trained on them."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from examples.cifar_lt import noise
from examples.cifar_lt.augment import crop_and_flip, normalise
from examples.cifar_lt.data import load
from examples.cifar_lt.models import ResNet, Shallow, whitening_kernel
from examples.lab.errors import UsageError, UserError
from examples.lab.imbalance import class_counts, subset
from examples.lab.losses import NEEDS_COSINES
from examples.lab.task import NUMBER, Data, Split, Task

HELD_OUT_PER_CLASS = 10
DATASET = re.compile(
    rf"(cifar10|cifar100)-(lt|st)-{NUMBER}(?:-(sym|asym)(0?\.[0-9]+)|-(aggre|worse|random[123]|noisy))?"
)


def precision():
    """The dtype of images between the layers. Parameters, batch statistics, losses and the risk are float32."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cifar(Task):
    """The fields identify the images and the network."""

    dataset: str  # such as cifar10-lt-100 or cifar10-lt-1-sym0.4
    network_name: str  # "shallow" or "resnet-<depth>-<width>"
    shift: int  # pixels of the random crop
    flipped_test: bool = False  # whether logits are averaged with those of the mirror image
    n_max: int | None = None  # at most so many training images of the largest class; None takes all there are
    test_per_class: int | None = None
    validation: float = 0.0
    subset_seed: int = 0

    @property
    def parsed(self) -> tuple[str, str, float, str | None, float, str | None]:
        found = DATASET.fullmatch(self.dataset)
        if not found:
            raise UsageError(
                f"--dataset {self.dataset}: it should be like cifar10-lt-100 or cifar100-st-10 (long tail or step, "
                "imbalance ratio), or with wrong labels like cifar10-lt-1-sym0.4 or cifar10-lt-1-worse."
            )
        name, imbalance, ratio, kind, rate, human = found.groups()
        return name, imbalance, float(ratio), kind, float(rate or 0), human

    @property
    def classes(self) -> int:
        return 100 if self.parsed[0] == "cifar100" else 10

    def load(self, data_dir: Path) -> Data:
        name, imbalance, ratio, kind, rate, human = self.parsed
        train, test = load(name, data_dir)
        labels = train.labels if human is None else noise.human(name, human, data_dir, clean=train.labels)
        everyone = np.bincount(train.labels, minlength=self.classes)
        share = np.ceil(everyone * self.validation).astype(int)
        validation = subset(train.labels, share, self.subset_seed)
        rest = np.setdiff1d(np.arange(len(train.labels)), validation)
        there = int((everyone - share).min())
        n_max = min(self.n_max or there, there)
        chosen = rest[
            subset(
                train.labels[rest],
                class_counts(imbalance, ratio, self.classes, n_max),
                self.subset_seed,
            )
        ]
        if kind is not None:  # the labels of the validation split are as wrong as those that are trained on
            labels = noise.wrong(kind, labels, rate, self.classes, self.subset_seed)
        if self.test_per_class is not None:
            kept = subset(test.labels, np.full(self.classes, self.test_per_class), self.subset_seed)
            test = Split(test.inputs[kept], test.labels[kept])
        held_out = self._held_out(train.labels, rest, chosen)
        return Data(
            train=Split(train.inputs[chosen], labels[chosen]),
            test=test,
            validation=Split(train.inputs[validation], labels[validation]) if self.validation else None,
            held_out=Split(train.inputs[held_out], train.labels[held_out]),
            clean=train.labels[chosen],
        )

    def _held_out(self, labels, rest, chosen):
        """Images that are not trained on; of a class that has no others, ones that are."""
        spare, indices = np.setdiff1d(rest, chosen), []
        for c in range(self.classes):
            members = np.concatenate([of[labels[of] == c] for of in (spare, chosen)])
            if len(members) < HELD_OUT_PER_CLASS:
                raise UserError(f"class {c} has only {len(members)} images, META needs {HELD_OUT_PER_CLASS}.")
            indices.append(members[:HELD_OUT_PER_CLASS])
        return np.concatenate(indices)

    def network(self, loss, rngs):
        cosine = loss in NEEDS_COSINES
        if self.network_name == "shallow":
            return Shallow(self.classes, cosine=cosine, dtype=precision(), rngs=rngs)
        _, depth, width = self.network_name.split("-")
        return ResNet(int(depth), self.classes, width=int(width), cosine=cosine, dtype=precision(), rngs=rngs)

    def calibrate(self, params, rest, data):
        if self.network_name == "shallow":
            train = data.train
            some = train.inputs[:: -(-len(train.inputs) // 5000)]  # of all classes, which come one after another
            rest["whitening"][...] = whitening_kernel(normalise(jnp.asarray(some)))
        return params, rest

    def prepare(self, inputs):
        return normalise(inputs)

    def augment(self, inputs, key):
        return crop_and_flip(inputs, key, self.shift, "reflect" if self.network_name == "shallow" else "constant")

    def predict(self, module, inputs):
        logits = module(inputs, train=False)
        return logits + module(inputs[:, :, ::-1], train=False) if self.flipped_test else logits
