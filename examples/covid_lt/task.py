"""X-rays as what a pretrained ResNet-50 makes of them before its last stage, which is trained."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np

from examples.covid_lt.data import CLASSES, covid_lt, read_npz, split_by_patient
from examples.imagenet_lt.features import either_side, lower_layers, one_side, pretrained
from examples.imagenet_lt.resnet import Head, read_keras
from examples.lab.errors import UsageError
from examples.lab.imbalance import class_counts, subset
from examples.lab.task import NUMBER, Data, Split, Task

WEIGHTS = Path("resnet50-imagenet") / "weights.npz"
SIZE = 224  # pixels, of covid-lt


@dataclasses.dataclass(frozen=True, kw_only=True)
class CovidLt(Task):
    """The fields identify the images; the network is the last stage of a ResNet-50 and a classifier."""

    dataset: str  # covid-lt-10 from the official folders, or xray64-10; the number is the imbalance ratio
    test_per_class: int = 50
    validation: float = 0.0
    subset_seed: int = 0

    classes = len(CLASSES)

    @property
    def parsed(self) -> tuple[str, float]:
        found = re.fullmatch(f"(covid-lt|xray64)-{NUMBER}", self.dataset)
        if not found or float(found[2]) < 1:
            raise UsageError(f"--dataset {self.dataset}: it should be like covid-lt-10 or xray64-10.")
        return found[1], float(found[2])

    def load(self, data_dir: Path) -> Data:
        source, ratio = self.parsed
        xrays = covid_lt(data_dir, SIZE) if source == "covid-lt" else read_npz(data_dir / "xray64.npz")
        weights = read_keras(data_dir / WEIGHTS)
        test, rest = split_by_patient(xrays, self.test_per_class, self.subset_seed)
        kept = rest[:0]
        if self.validation:
            share = math.ceil(self.validation * np.bincount(xrays.labels[rest], minlength=self.classes).min())
            those = xrays._replace(labels=xrays.labels[rest], patients=xrays.patients[rest])
            kept, rest = (rest[places] for places in split_by_patient(those, share, self.subset_seed))
        there = np.bincount(xrays.labels[rest], minlength=self.classes)
        # The largest class is as large as the others allow.
        n_max = int(min(n * ratio ** (k / (self.classes - 1)) for k, n in enumerate(there)))
        counts = class_counts("lt", ratio, self.classes, n_max)
        train = rest[subset(xrays.labels[rest], counts, self.subset_seed)]

        used = np.sort(np.concatenate([train, test, kept]))
        features = lower_layers(xrays.images[used], weights, data_dir, first_strides=True)

        def split(places) -> Split:
            return Split(features[np.searchsorted(used, places)], xrays.labels[places])

        return Data(
            train=split(train),
            test=split(test),
            validation=split(kept) if self.validation else None,
            pretrained=weights,
        )

    def network(self, loss, rngs):
        return Head(50, self.classes, first_strides=True, rngs=rngs)

    def calibrate(self, params, rest, data):
        return pretrained(self, params, rest, data.pretrained)

    def augment(self, inputs, key):
        return either_side(inputs, key)

    def prepare(self, inputs):
        return one_side(inputs)
