"""Adult from its UCI files and the tables that scikit-learn ships, also with wrong labels, and a perceptron."""

import dataclasses
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from flax import nnx
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from examples.lab.errors import UsageError, UserError
from examples.lab.noise import symmetric
from examples.lab.task import Data, Split, Task

SHIPPED = {"breast-cancer": load_breast_cancer, "digits": load_digits}
CLASSES = {"adult": 2, "breast-cancer": 2, "digits": 10}
DATASET = re.compile(rf"({'|'.join(CLASSES)})(?:-sym(0?\.[0-9]+))?")
HIDDEN = (64, 64)  # units
FEATURES = {"adult": 108, "breast-cancer": 30, "digits": 64}
URL = "https://archive.ics.uci.edu/dataset/2/adult"
COLUMNS = (
    "age", "workclass", "fnlwgt", "education", "education-num", "marital-status", "occupation", "relationship", "race",
    "sex", "capital-gain", "capital-loss", "hours-per-week", "native-country", "income",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tabular(Task):
    """The fields identify the rows and the network."""

    dataset: str  # such as adult or, with 20 % wrong labels, adult-sym0.2
    validation: float = 0.0
    subset_seed: int = 0

    @property
    def parsed(self) -> tuple[str, float]:
        found = DATASET.fullmatch(self.dataset)
        if not found:
            raise UsageError(
                f"--dataset {self.dataset}: choose from {', '.join(CLASSES)}, or with wrong labels like adult-sym0.2."
            )
        return found[1], float(found[2] or 0)

    @property
    def classes(self) -> int:
        return CLASSES[self.parsed[0]]

    def load(self, data_dir: Path) -> Data:
        name, rate = self.parsed
        if name == "adult":
            train, test = adult(data_dir / "adult")
            if train.inputs.shape[1] != FEATURES["adult"]:
                raise UserError(f"{data_dir / 'adult'} lacks some categories. Get the files from {URL}.")
        else:
            table: Any = SHIPPED[name]()
            train, test = (Split(*part) for part in self._split(0.3, table["data"], table["target"]))
        inputs, clean = train
        labels = symmetric(np.asarray(clean, np.int32), rate, self.classes, self.subset_seed)
        validation = None
        if self.validation:  # its labels are as wrong as those that are trained on
            (inputs, clean, labels), held_out = self._split(self.validation, inputs, clean, labels)
            validation = Split(held_out[0], held_out[2])
        scaler = StandardScaler().fit(inputs)

        def scaled(rows: Split) -> Split:
            return Split(np.asarray(scaler.transform(rows.inputs), np.float32), np.asarray(rows.labels, np.int32))

        rows = scaled(Split(inputs, labels))
        return Data(rows, scaled(test), validation and scaled(validation), clean=np.asarray(clean, np.int32))

    def _split(self, part: float, *columns: np.ndarray) -> tuple[Sequence[Any], Sequence[Any]]:
        """Two parts of the rows with the same share of each value of the last column."""
        try:
            parts = train_test_split(*columns, test_size=part, random_state=self.subset_seed, stratify=columns[-1])
        except ValueError as error:
            raise UsageError(f"--validation {part} of {len(columns[-1])} rows: {error}") from None
        return parts[::2], parts[1::2]

    def network(self, loss, rngs):
        return Perceptron((FEATURES[self.parsed[0]], *HIDDEN), self.classes, rngs)


class Perceptron(nnx.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, sizes, classes, rngs):
        self.hidden = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])
        self.classifier = nnx.Linear(sizes[-1], classes, rngs=rngs)

    def features(self, x, *, train):
        del train
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return x

    def __call__(self, x, *, train):
        return self.classifier(self.features(x, train=train))


def adult(folder: Path) -> tuple[Split, Split]:
    """Rows of numbers and of categories as indicators (? is one of them), and whether the income exceeds 50,000."""
    tables = [_read(folder / "adult.data", skip=0), _read(folder / "adult.test", skip=1)]
    whole = pd.concat(tables, keys=("train", "test"))
    labels = whole.pop("income").str.rstrip(".") == ">50K"
    inputs = pd.get_dummies(whole)

    def part(name: str) -> Split:
        return Split(inputs.loc[name].to_numpy(float), labels.loc[name].to_numpy())

    return part("train"), part("test")


def _read(path: Path, skip: int) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, names=list(COLUMNS), skipinitialspace=True, skiprows=skip)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Get it from {URL} and put it there.") from None
    if table.empty or table.isna().any(axis=None) or not table.income.isin(["<=50K", ">50K", "<=50K.", ">50K."]).all():
        raise UserError(f"{path} is not a file of Adult. Get it from {URL} and put it there.")
    return table
