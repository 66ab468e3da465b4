"""CIFAR example: reading the archives, refusing bad ones, imbalanced subsets."""

import io
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from examples.cifar_lt import data
from examples.lab import files, safe_pickle
from examples.lab.errors import UserError
from examples.lab.imbalance import class_counts, subset
from tests.examples.cifar_files import write_cifar10

CIFAR10, CIFAR10_PY = data.ARCHIVES["cifar10"]
CIFAR100, CIFAR100_PY = data.ARCHIVES["cifar100"]


def planes(n):
    """Images as the archives store them: all of red, then green, then blue, each row by row."""
    return np.random.default_rng(0).integers(0, 256, (n, 3, 32, 32), np.uint8)


@pytest.mark.parametrize("archive", [CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
def test_binary_records(tmp_path, archive):
    pixels, path = planes(3), tmp_path / "batch.bin"
    fine = [7, 0, archive.classes - 1]
    with path.open("wb") as file:
        for image, label in zip(pixels, fine, strict=True):
            coarse = [19] if archive is CIFAR100 else []  # CIFAR-100 has the superclass first
            file.write(bytes([*coarse, label]) + image.tobytes())
    split = data.read(path, archive, 3)
    assert split.labels.tolist() == fine
    assert split.inputs.shape == (3, 32, 32, 3)
    assert split.inputs[1, 5, 9].tolist() == pixels[1, :, 5, 9].tolist()  # row 5, column 9, RGB


def python2_pickle(pixels, labels, key):
    """The bytes that Python 2 wrote, opcode by opcode (protocol 2): str keys and data, NumPy 1 module names."""

    def text(s):
        return b"U" + bytes([len(s)]) + s

    def integer(i):
        return b"K" + bytes([i])

    out = b"\x80\x02}(" + text(b"data") + b"cnumpy.core.multiarray\n_reconstruct\n"
    out += b"cnumpy\nndarray\n" + integer(0) + b"\x85" + text(b"b") + b"\x87R"
    out += b"(" + integer(1) + integer(len(pixels)) + b"M" + struct.pack("<H", 3072) + b"\x86"
    out += b"cnumpy\ndtype\n" + text(b"u1") + integer(0) + integer(1) + b"\x87R"
    out += b"(" + integer(3) + text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + integer(0) + b"tb"
    raw = pixels.tobytes()
    out += b"\x89" + b"T" + struct.pack("<i", len(raw)) + raw + b"tb"
    out += text(key) + b"](" + b"".join(map(integer, labels)) + b"e"
    return out + text(b"batch_label") + text(b"testing batch") + b"u."


@pytest.mark.parametrize(("archive", "key"), [(CIFAR10_PY, b"labels"), (CIFAR100_PY, b"fine_labels")])
def test_pickles_of_python_2(tmp_path, archive, key):
    pixels, path = planes(3), tmp_path / "data_batch_1"
    path.write_bytes(python2_pickle(pixels, [3, 0, 9], key))
    split = data.read(path, archive, 3)
    assert split.labels.tolist() == [3, 0, 9]
    np.testing.assert_array_equal(split.inputs.transpose(0, 3, 1, 2), pixels)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickles_of_python_3(tmp_path, protocol):
    pixels, path = planes(2), tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({"data": pixels.reshape(2, -1), "labels": [1, 2]}, protocol=protocol))
    np.testing.assert_array_equal(data.read(path, CIFAR10_PY, 2).inputs.transpose(0, 3, 1, 2), pixels)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_malicious_pickles_are_refused_and_do_nothing(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({"data": Touch(victim)}))
    with pytest.raises(UserError, match="data_batch_1 is not a pickle of images"):
        data.read(path, CIFAR10_PY, 1)
    assert not victim.exists()


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "builtins.eval",
        "builtins.getattr",
        "numpy.fromfile",
        "numpy.core.multiarray.scalar",
        "numpy.memmap",
    ],
)
def test_only_arrays_and_containers_are_admitted(name):
    module, _, attribute = name.rpartition(".")
    content = io.BytesIO(f"c{module}\n{attribute}\n.".encode())
    with pytest.raises(pickle.UnpicklingError, match=name):
        safe_pickle.load(content)


def test_damaged_pickles_are_told(tmp_path):
    path, whole = tmp_path / "data_batch_1", io.BytesIO()
    pickle.dump({"data": planes(1).reshape(1, -1), "labels": [1]}, whole)
    path.write_bytes(whole.getvalue()[:-100])
    with pytest.raises(UserError, match="data_batch_1 is not a pickle"):
        data.read(path, CIFAR10_PY, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no array 'data'"),
        ({"data": np.zeros((1, 3072), np.float32), "labels": [1]}, "uint8"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2]}, r"shape \(1, 3072\)"),
        ({"data": np.zeros((1, 3072), np.uint8)}, "no list 'labels'"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["cat"]}, "no list 'labels'"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, "classes outside 0 to 9"),
    ],
)
def test_pickles_of_something_else_are_told(tmp_path, content, message):
    path = tmp_path / "test_batch"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=message):
        data.read(path, CIFAR10_PY, 1)


def test_wrong_files_are_told_by_name_size_and_remedy(tmp_path):
    path = tmp_path / "test_batch.bin"
    with pytest.raises(UserError, match=r"test_batch\.bin is missing.*unpack that archive again"):
        data.read(path, CIFAR10, 10_000)
    path.write_bytes(bytes(100))
    with pytest.raises(UserError, match=r"test_batch\.bin has 100 bytes, expected 30,730,000 .*Delete"):
        data.read(path, CIFAR10, 10_000)
    path.write_bytes(bytes([10]) + bytes(3072))
    with pytest.raises(UserError, match="classes outside 0 to 9"):
        data.read(path, CIFAR10, 1)


def test_whole_archive(cifar10):
    train, test = data.load("cifar10", cifar10)
    assert train.inputs.shape == (50_000, 32, 32, 3)
    assert test.inputs.shape == (10_000, 32, 32, 3)
    assert np.bincount(train.labels).tolist() == [5000] * 10


def test_a_download_that_fails_is_told(tmp_path, monkeypatch):
    def offline(url, known_hash, **_):
        assert (url, known_hash) == (
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            "md5:03b5dce01913d631647c71ecec9e9cb8",
        )
        raise OSError("no route to host")

    monkeypatch.setattr(files.pooch, "retrieve", offline)
    with pytest.raises(UserError, match=r"could not be downloaded \(no route to host\).*--data-dir"):
        data.load("cifar100", tmp_path)


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    folder = write_cifar10(tmp_path_factory.mktemp("data"))
    yield folder
    shutil.rmtree(folder)  # 180 MB


def test_long_tail_counts_are_the_published_ones():
    # From the LDAM repository and the papers that follow it.
    ten = class_counts("lt", 100, 10, 5000)
    assert ten.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert ten.sum() == 12_406
    assert class_counts("lt", 100, 100, 500).sum() == 10_847
    assert class_counts("lt", 50, 10, 5000).sum() == 13_996
    assert class_counts("lt", 10, 10, 5000).sum() == 20_431


def test_step_counts():
    assert class_counts("st", 100, 10, 5000).tolist() == [5000] * 5 + [50] * 5
    assert class_counts("st", 3, 4, 10).tolist() == [10, 10, 3, 3]
    assert class_counts("lt", 1, 10, 7).tolist() == [7] * 10


@pytest.mark.parametrize("ratio", [0.5, float("nan"), float("inf"), 1000])
def test_impossible_ratios_are_told(ratio):
    with pytest.raises(UserError, match="imbalance ratio"):
        class_counts("lt", ratio, 10, 100)


def test_subsets_have_their_counts_and_their_seed():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), 50))
    counts = np.array([20, 10, 1])
    chosen = subset(labels, counts, seed=0)
    assert np.bincount(labels[chosen]).tolist() == counts.tolist()
    assert len(set(chosen)) == counts.sum()
    np.testing.assert_array_equal(chosen, subset(labels, counts, seed=0))
    assert set(chosen) != set(subset(labels, counts, seed=1))
    assert set(chosen) < set(subset(labels, counts + 5, seed=0))
    with pytest.raises(UserError, match=r"51 images of class 2.*only 50"):
        subset(labels, np.array([1, 1, 51]), seed=0)
