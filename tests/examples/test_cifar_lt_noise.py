"""CIFAR example: wrong labels, drawn or read from the files of CIFAR-10N and CIFAR-100N."""

import os
import pickle
import zipfile

import numpy as np
import pytest

from examples.cifar_lt import noise
from examples.lab import files
from examples.lab.errors import UserError
from examples.lab.noise import symmetric

CLEAN = {
    "cifar10": np.random.default_rng(0).permutation(np.arange(50_000) % 10),
    "cifar100": np.random.default_rng(1).permutation(np.arange(50_000) % 100),
}
KINDS = {"cifar10": ["aggre", "worse", "random1", "random2", "random3"], "cifar100": ["noisy"]}
FILES = {"cifar10": "CIFAR-10_human.pt", "cifar100": "CIFAR-100_human.pt"}


def test_asymmetric_noise_goes_to_the_class_that_looks_alike():
    labels = np.arange(10).repeat(10_000)
    noisy = noise.wrong("asym", labels, 0.4, 10, 0)
    into = {9: 1, 2: 0, 4: 7, 3: 5, 5: 3}
    for c in range(10):
        changed = noisy[labels == c] != c
        assert np.mean(changed) == pytest.approx(0.4 if c in into else 0, abs=0.02)
        assert set(noisy[labels == c][changed]) == ({into[c]} if c in into else set())
    of_hundred = noise.wrong("asym", np.arange(100).repeat(1000), 0.2, 100, 0)
    assert set(np.unique((of_hundred - np.arange(100).repeat(1000)) % 100)) == {0, 1}
    np.testing.assert_array_equal(noise.wrong("sym", labels, 0.4, 10, 0), symmetric(labels, 0.4, 10, 0))


def labels_of(dataset):
    """What a file holds, by key: each kind of labels is wrong at other places."""
    clean, classes = CLEAN[dataset], len(set(CLEAN[dataset]))
    keys = ["aggre_label", "worse_label", "random_label1", "random_label2", "random_label3"]
    content: dict[str, object] = {"clean_label": clean}
    for i, key in enumerate(keys if dataset == "cifar10" else ["noisy_label"]):
        content[key] = np.where(np.arange(50_000) % (i + 3) == 0, (clean + 1) % classes, clean)
    if dataset == "cifar100":
        content["clean_coarse_label"] = [0] * 50_000  # lists in the file, as in the official one
    return content


def write(path, content, folder="archive", numpy_1=True):
    """A file as torch.save makes it where there are no tensors: a zip archive of a pickle of protocol 2."""
    pickled = pickle.dumps(content, protocol=2)
    if numpy_1:  # the module's name in the official files
        pickled = pickled.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{folder}/data.pkl", pickled)
        archive.writestr(f"{folder}/version", "3\n")


@pytest.mark.parametrize("numpy_1", [True, False])
@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_human_labels_of_each_kind(tmp_path, dataset, numpy_1):
    content = labels_of(dataset)
    write(tmp_path / FILES[dataset], content, FILES[dataset][:-3], numpy_1)
    truths = [content[key] for key in content if key.startswith(("aggre", "worse", "random", "noisy"))]
    for kind, truth in zip(KINDS[dataset], truths, strict=True):
        labels = noise.human(dataset, kind, tmp_path, CLEAN[dataset])
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(labels, truth)
    np.testing.assert_array_equal(noise.human(dataset, kind, tmp_path), truths[-1])


@pytest.mark.parametrize(
    ("dataset", "kind", "message"),
    [("cifar10", "noisy", "'noisy': cifar10 has aggre, worse, random1"), ("cifar100", "worse", "cifar100 has noisy")],
)
def test_unknown_kinds_are_told(tmp_path, dataset, kind, message):
    with pytest.raises(UserError, match=message):
        noise.human(dataset, kind, tmp_path)


def test_another_order_is_told(tmp_path):
    content = labels_of("cifar10")
    write(tmp_path / FILES["cifar10"], {key: np.asarray(labels)[::-1].copy() for key, labels in content.items()})
    noise.human("cifar10", "worse", tmp_path)  # nothing to compare with
    wrong = (CLEAN["cifar10"] != CLEAN["cifar10"][::-1]).sum()
    with pytest.raises(UserError, match=f"other true labels than cifar10, {wrong:,} of 50,000: another order"):
        noise.human("cifar10", "worse", tmp_path, CLEAN["cifar10"])


class Call:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_malicious_files_are_refused_and_do_nothing(tmp_path):
    victim = tmp_path / "victim"
    write(tmp_path / FILES["cifar10"], {**labels_of("cifar10"), "x": Call(os.mkdir, str(victim))})
    with pytest.raises(UserError, match=r"CIFAR-10_human\.pt is not a \.pt file .*asks for \w+\.mkdir"):
        noise.human("cifar10", "worse", tmp_path)
    assert not victim.exists()


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "_codecs.decode", "_codecs.lookup", "numpy.load"])
def test_only_arrays_and_containers_are_admitted(tmp_path, name):
    module, _, attribute = name.rpartition(".")
    with zipfile.ZipFile(tmp_path / FILES["cifar10"], "w") as archive:
        archive.writestr("archive/data.pkl", f"c{module}\n{attribute}\n.")
    with pytest.raises(UserError, match=f"asks for {name}"):
        noise.human("cifar10", "worse", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"worse_label": np.zeros(49_999, int)}, "no 50,000 classes from 0 to 9 as 'worse_label'"),
        ({"clean_label": np.zeros((50_000, 1), int)}, "as 'clean_label'"),
        ({"worse_label": np.zeros(50_000)}, "as 'worse_label'"),
        ({"worse_label": np.full(50_000, 10)}, "as 'worse_label'"),
        ({"worse_label": np.full(50_000, -1)}, "as 'worse_label'"),
        ({"worse_label": [[0], [0, 1]]}, "is not a .pt file of labels"),
        ({"worse_label": None}, "as 'worse_label'"),
    ],
)
def test_labels_of_something_else_are_told(tmp_path, change, message):
    write(tmp_path / FILES["cifar10"], {**labels_of("cifar10"), **change})
    with pytest.raises(UserError, match=message):
        noise.human("cifar10", "worse", tmp_path)


@pytest.mark.parametrize("content", [[1, 2], {}, 3, {"worse_label": np.zeros(50_000, int)}])
def test_files_without_labels_are_told(tmp_path, content):
    write(tmp_path / FILES["cifar10"], content)
    with pytest.raises(
        UserError, match=r"not a \.pt file of labels .*Delete it and start again to download https://raw"
    ):
        noise.human("cifar10", "worse", tmp_path)


def test_damaged_files_are_told(tmp_path):
    path = tmp_path / FILES["cifar10"]
    write(path, labels_of("cifar10"))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # within the labels: only the checksum of the zip archive can notice it
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], whole[:-1], bytes(flipped), b"<html>" * 1000):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"is not a \.pt file of labels"):
            noise.human("cifar10", "worse", tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/version", "3\n")
    with pytest.raises(UserError, match=r"no item named 'data\.pkl'"):
        noise.human("cifar10", "worse", tmp_path)


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_missing_files_are_downloaded(tmp_path, monkeypatch, dataset):
    asked = []

    def online(url, known_hash, fname, path, processor):
        asked.append((url, known_hash))
        write(path / fname, labels_of(dataset))

    monkeypatch.setattr(files.pooch, "retrieve", online)
    for _ in range(2):
        noise.human(dataset, KINDS[dataset][0], tmp_path, CLEAN[dataset])
    [(url, known_hash)] = asked
    assert url.startswith("https://raw.githubusercontent.com/UCSC-REAL/cifar-10-100n/")
    assert url.endswith(f"/data/{FILES[dataset]}")
    assert known_hash == f"sha256:{noise.RELEASES[dataset][1]}"


def test_a_download_that_fails_is_told(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(files.pooch, "retrieve", offline)
    message = r"CIFAR-100_human\.pt is missing, and https://raw\S+ could not be downloaded \(no route to host\)"
    with pytest.raises(UserError, match=message):
        noise.human("cifar100", "noisy", tmp_path)
