"""CIFAR example: packs are lossless, small, and refused when damaged or made for another run."""

import json
import os

import numpy as np
import pytest

from examples.cifar_lt import pack
from examples.cifar_lt.data import Split
from examples.cifar_lt.errors import UserError

IDENTITY = {"dataset": "cifar10", "imbalance": "lt", "ratio": 100.0, "n_max": None, "validation": 0.0}


def smooth(n):
    """Images that vary slowly, alike in the three colors, with a little noise: as photographs do."""
    rng = np.random.default_rng(0)
    row, column = np.mgrid[:32, :32]
    tilt = rng.uniform(-2, 2, (2, n, 1, 1))
    gray = 128 + tilt[0] * (row - 16) + tilt[1] * (column - 16)
    return np.clip(gray[..., None] + rng.normal(0, 1, (n, 32, 32, 3)), 0, 255).astype(np.uint8)


def split(images):
    return Split(images, np.random.default_rng(1).integers(0, 10, len(images), np.int32))


@pytest.fixture
def splits():
    return {"train": split(smooth(30)), "validation": split(smooth(5)), "test": split(smooth(20))}


@pytest.fixture
def packed(tmp_path, splits):
    path = tmp_path / "folder" / "data.pack"
    pack.write(path, splits, IDENTITY)
    return path


def same(splits, others):
    assert list(splits) == list(others)
    for name, (images, labels) in splits.items():
        assert others[name].images.dtype == np.uint8
        assert others[name].labels.dtype == np.int32
        np.testing.assert_array_equal(others[name].images, images)
        np.testing.assert_array_equal(others[name].labels, labels)


def test_all_splits_come_back(packed, splits):
    read = pack.read(packed, IDENTITY)
    same(splits, read)
    assert read["train"].images.flags["C_CONTIGUOUS"]
    assert read["train"].images.flags["WRITEABLE"]
    assert [path.name for path in packed.parent.iterdir()] == ["data.pack"]  # nothing is left aside


@pytest.mark.parametrize(
    "images",
    [
        np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8),
        np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (7, 32, 32, 3)),
        np.full((1, 32, 32, 3), 255, np.uint8),
        np.zeros((0, 32, 32, 3), np.uint8),
        np.random.default_rng(0).integers(0, 256, (3, 5, 2, 3), np.uint8),
        smooth(8)[::2, :, ::-1],
    ],
    ids=["random", "black and white", "constant", "none", "not square", "not contiguous"],
)
def test_any_image_comes_back(tmp_path, images):
    before = images.copy()
    pack.write(tmp_path / "pack", {"train": split(images)}, {})
    same({"train": split(before)}, pack.read(tmp_path / "pack"))
    np.testing.assert_array_equal(images, before)  # the input is left alone


def test_labels_keep_all_their_bits(tmp_path):
    labels = np.array([0, -1, 2**31 - 1, -(2**31)], np.int32)
    pack.write(tmp_path / "pack", {"test": Split(smooth(4), labels)}, {})
    assert pack.read(tmp_path / "pack")["test"].labels.tolist() == labels.tolist()


def test_packs_are_small(tmp_path):
    images = smooth(300)
    pack.write(tmp_path / "pack", {"train": split(images)}, {})
    assert (tmp_path / "pack").stat().st_size < 0.5 * images.nbytes


def test_the_second_line_says_what_a_pack_holds(packed):
    header = json.loads(packed.read_bytes().split(b"\n")[1])
    assert header["identity"] == IDENTITY
    assert {name: size["shape"] for name, size in header["splits"].items()} == {
        "train": [30, 32, 32, 3],
        "validation": [5, 32, 32, 3],
        "test": [20, 32, 32, 3],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 10.0}, r"other settings \(ratio: 100\.0 there, 10\.0 here\)"),
        ({"n_max": 500, "validation": 0.1}, r"n_max: None there, 500 here, validation: 0\.0 there, 0\.1 here"),
        ({"noise": "worse"}, "noise: not set there, worse here"),
    ],
)
def test_other_settings_are_refused_by_name(packed, change, message):
    with pytest.raises(UserError, match=message):
        pack.read(packed, {**IDENTITY, **change})


def test_settings_of_the_pack_alone_are_refused_too(packed):
    with pytest.raises(UserError, match=r"ratio: 100\.0 there, not set here"):
        pack.read(packed, {name: value for name, value in IDENTITY.items() if name != "ratio"})


def test_settings_are_compared_as_json_knows_them(tmp_path, splits):
    pack.write(tmp_path / "pack", splits, {"temperature": float("inf"), "shape": (1, 2)})
    same(splits, pack.read(tmp_path / "pack", {"temperature": float("inf"), "shape": (1, 2)}))


def test_damage_anywhere_is_told(packed):
    whole = packed.read_bytes()
    start = whole.index(b"\n", whole.index(b"\n") + 1) + 1  # of the images
    damaged = [whole[:length] for length in (0, 1, 50, start - 1, start, len(whole) // 2, len(whole) - 1)]
    damaged += [whole + b"\0", whole.replace(b"100.0", b"10.00", 1), b"\n" + whole, b"<html>" * 1000]
    for place in (0, 20, 90, start - 3, start, start + 1000, len(whole) - 1):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        damaged.append(bytes(flipped))
    for content in damaged:
        packed.write_bytes(content)
        with pytest.raises(UserError, match=r"data\.pack is damaged, truncated or not a pack"):
            pack.read(packed, IDENTITY)


@pytest.mark.parametrize("name", ["absent", "."])
def test_missing_packs_are_told(tmp_path, name):
    with pytest.raises(UserError, match="is missing"):
        pack.read(tmp_path / name)


def test_a_write_that_fails_leaves_the_old_pack(packed, splits, monkeypatch):
    def full(_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space left"):
            pack.write(packed, {"train": splits["test"]}, {})
    same(splits, pack.read(packed, IDENTITY))
    pack.write(packed, {"train": splits["test"]}, {})  # what was left aside is no obstacle
    same({"train": splits["test"]}, pack.read(packed, {}))


@pytest.mark.parametrize(
    "bad",
    [
        Split(np.zeros((2, 32, 32, 3), np.float32), np.zeros(2, np.int32)),
        Split(np.zeros((2, 32, 32, 1), np.uint8), np.zeros(2, np.int32)),
        Split(np.zeros((2, 3072), np.uint8), np.zeros(2, np.int32)),
        Split(np.zeros((2, 32, 32, 3), np.uint8), np.zeros(3, np.int32)),
        Split(np.zeros((2, 32, 32, 3), np.uint8), np.zeros(2, np.int64)),
    ],
)
def test_what_would_not_come_back_is_not_written(tmp_path, bad):
    with pytest.raises(ValueError, match="train: images"):
        pack.write(tmp_path / "pack", {"train": bad}, {})
    assert not list(tmp_path.iterdir())
