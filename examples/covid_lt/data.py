"""Chest X-rays of four classes: COVID-LT from its official sources, and a small stand-in that can be run anywhere.

Classes as in the paper: 0 other findings, 1 no finding, 2 pneumonia, 3 COVID-19.
"""

import dataclasses
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from examples.lab.errors import UserError

CLASSES = ("other findings", "no finding", "pneumonia", "COVID-19")
CHEXPERT = "https://stanfordmlgroup.github.io/competitions/chexpert/"
COLLECTION = "https://github.com/ieee8023/covid-chestxray-dataset"
FRONTAL = ("PA", "AP", "AP Supine", "AP Erect")


@dataclasses.dataclass(frozen=True)
class Files:
    """Images that are read when they are asked for: of the official sources few are used."""

    paths: Sequence[Path]
    size: int  # pixels

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        return np.stack([_grey(self.paths[place], self.size) for place in places])


class Xrays(NamedTuple):
    """Grey images, their classes and whose they are."""

    images: Any  # an array or Files: shape=(N, H, W), dtype=uint8
    labels: np.ndarray  # shape=(N,), dtype=int32
    patients: np.ndarray  # shape=(N,), equal for images of one patient


def read_npz(path: Path) -> Xrays:
    """The stand-in: a file with the arrays image, label and patient."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = Xrays(file["image"], file["label"].astype(np.int32), file["patient"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} does not hold X-rays ({error}): it needs image, label and patient.") from None
    if found.images.ndim != 3 or len({len(part) for part in found}) > 1 or not set(found.labels) <= set(range(4)):
        raise UserError(f"{path} does not hold grey images and as many labels from 0 to 3.")
    return found


def covid_lt(folder: Path, size: int) -> Xrays:
    """The images of the paper, from ``CheXpert-v1.0-small`` and ``covid-chestxray-dataset``, frontal views alone.

    Of CheXpert the positive cases of no finding and of pneumonia, and all others that have a finding; of the collection
    the X-rays of patients with COVID-19. The authors' own choice among them is not public.
    """
    table = pd.concat([_chexpert(folder), _collection(folder)], ignore_index=True)
    return Xrays(Files(table.path.tolist(), size), table.label.to_numpy(np.int32), table.patient.to_numpy())


def _chexpert(folder: Path) -> pd.DataFrame:
    source = folder / "CheXpert-v1.0-small" / "train.csv"
    table = _csv(source, CHEXPERT)
    table = table[table["Frontal/Lateral"] == "Frontal"]
    findings = table.loc[:, "Enlarged Cardiomediastinum":"Fracture"].drop(columns="Pneumonia")
    label = np.select(
        [table["No Finding"] == 1, table["Pneumonia"] == 1, (findings == 1).any(axis=1)], [1, 2, 0], default=-1
    )
    found = pd.DataFrame({"path": [folder / path for path in table["Path"]], "label": label})
    found["patient"] = table["Path"].str.extract(r"(patient\d+)", expand=False).to_numpy()
    return found.loc[found["label"] >= 0, :]


def _collection(folder: Path) -> pd.DataFrame:
    root = folder / "covid-chestxray-dataset"
    table = _csv(root / "metadata.csv", COLLECTION)
    covid = table["finding"].fillna("").str.contains("COVID-19") & (table["modality"] == "X-ray")
    table = table[covid & table["view"].isin(FRONTAL)]
    paths = [root / "images" / name for name in table["filename"]]
    return pd.DataFrame({"path": paths, "label": 3, "patient": "collection-" + table["patientid"].astype(str)})


def _csv(path: Path, url: str) -> pd.DataFrame:
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}). Get the dataset from {url}.") from None


def _grey(path: Path, size: int) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L").resize((size, size), Image.Resampling.BILINEAR))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}).") from None


def split_by_patient(xrays: Xrays, test_per_class: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a test or validation set with equally many images of each class, and of all other patients' images.

    Patients are drawn until each class has enough images, those of the rarest class first; what they have too many is
    left out of both.
    """
    rng, test, tested = np.random.default_rng(seed), [], set()
    for label in np.argsort(np.bincount(xrays.labels, minlength=len(CLASSES)), kind="stable"):
        own = xrays.labels == label
        for patient in rng.permutation(np.unique(xrays.patients[own])):
            if np.isin(xrays.patients[own], list(tested)).sum() >= test_per_class:
                break
            tested.add(patient)
        there = np.flatnonzero(own & np.isin(xrays.patients, list(tested)))
        if len(there) < test_per_class:
            raise UserError(
                f"{CLASSES[label]}: {len(there)} images are fewer than the {test_per_class} that are asked for."
            )
        test.append(rng.permutation(there)[:test_per_class])
    return np.concatenate(test), np.flatnonzero(~np.isin(xrays.patients, list(tested)))
