"""Photographs: lists, packed images, broken ones, features of frozen layers, and runs end to end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from examples.imagenet_lt import data as photos, features as features_of_images, task as photo_task
from examples.imagenet_lt.data import Packed, pack, packed, read_list
from examples.imagenet_lt.experiment import EXPERIMENT, make_run
from examples.imagenet_lt.features import lower_layers
from examples.imagenet_lt.resnet import KERAS_MEAN, STD, Head, load_weights
from examples.imagenet_lt.task import Photographs, changed
from examples.lab import cli, records
from examples.lab.errors import UserError
from tests.examples.test_imagenet_resnet import loaded, logits, random_weights


@pytest.fixture(scope="module")
def weights():
    return random_weights(10, 1000)


def test_lists_and_packed_images(tmp_path):
    for name, grey in (("a", 10), ("b", 200)):
        Image.fromarray(np.full((40, 60, 3), grey, np.uint8)).save(tmp_path / f"{name}.jpg")
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:200])
    (tmp_path / "list.txt").write_text("a.jpg 0\nbroken.jpg 1\nmissing.jpg 1\nb.jpg 1\n")
    names, labels = read_list(tmp_path / "list.txt", 2)
    path = tmp_path / "cache" / "x.array_record"
    with pytest.raises(UserError, match=r"broken\.jpg is missing or no image.*--skip-broken"):
        pack(names, labels, tmp_path, path, skip_broken=False)
    assert not path.exists()
    pack(names, labels, tmp_path, path, skip_broken=True)
    np.testing.assert_array_equal(np.load(path.with_suffix(".npy")), [0, 1])
    images = Packed(path, 32, 28)
    assert images[:].shape == (2, 28, 28, 3)
    assert [round(float(image.mean())) for image in images[np.array([1, 0])]] == [200, 10]
    for line in ("a.jpg 2", "a.jpg", "a.jpg x"):
        (tmp_path / "list.txt").write_text(f"{line}\n")
        with pytest.raises(UserError, match=r"list\.txt, line 1"):
            read_list(tmp_path / "list.txt", 2)
    with pytest.raises(UserError, match="cannot be read"):
        read_list(tmp_path / "none.txt", 2)


@pytest.mark.parametrize("preset", ["scenes", "paper", "whole"])
def test_every_row_is_a_run_of_its_own(preset):
    rows = EXPERIMENT.recipes(preset)
    assert len({make_run(row) for row in rows}) == len({EXPERIMENT.name_of(row) for row in rows}) == len(rows)


def test_lower_layers_and_head_are_the_whole_network(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(features_of_images, "BATCH", 3)  # the last part has two images and is filled up
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32)).astype(np.uint8)
    features = lower_layers(images, weights, tmp_path, depth=10, first_strides=True)
    assert features.shape == (8, 2, 2, 2, 256)
    whole = loaded(weights, 10, 1000, first_strides=True)
    head = nnx.eval_shape(lambda: Head(10, 1000, first_strides=True, rngs=nnx.Rngs(0)))
    load_weights(weights, head=head)
    x = (images[..., None] / 255 - np.array(KERAS_MEAN)) / np.array(STD)
    for side, each in enumerate((x, x[:, :, ::-1])):
        expected = logits(whole, jnp.asarray(each, jnp.float32))
        np.testing.assert_allclose(logits(head, features[:, side]), expected, rtol=1e-3, atol=1e-3)
    (path,) = (tmp_path / "cache").iterdir()
    before = path.stat().st_mtime_ns
    np.testing.assert_array_equal(lower_layers(images, weights, tmp_path, depth=10, first_strides=True), features)
    assert path.stat().st_mtime_ns == before
    path.rename(path.with_name("of other images.npy"))
    lower_layers(images + np.uint8(1), weights, tmp_path, depth=10, first_strides=True)
    assert path.name not in {other.name for other in (tmp_path / "cache").iterdir()}


def smooth_images(rng, count, shape):
    """Images that a JPEG keeps nearly as they are."""
    return np.clip(rng.integers(40, 200, (count, 1, 1)) + np.arange(shape[1])[None, None], 0, 255).repeat(shape[0], 1)


@pytest.fixture
def scene_folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 6)):
        for name in "abcdefghijklmno":
            folder = tmp_path / "scene15" / split / name
            folder.mkdir(parents=True)
            extra = 2 if (split, name) == ("train", "c") else 0
            for i, image in enumerate(smooth_images(rng, count + extra, (32, 32))):
                Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.jpg", quality=95)
    return tmp_path


@pytest.fixture
def small(weights, monkeypatch):
    """Splits for eight images a class, and random weights in place of a file."""
    for name, value in (("TEST_PER_CLASS", 2), ("HELD_OUT_PER_CLASS", 1), ("LARGEST", 6)):
        monkeypatch.setattr(photo_task, name, value)
    monkeypatch.setattr(photo_task, "read_keras", lambda path: weights)
    monkeypatch.setattr(photo_task, "read_pth", lambda path: weights)


def test_scenes_are_split_without_overlap(scene_folder, small, monkeypatch):
    images, labels, official = photos.scenes(scene_folder)
    assert images.shape == (15 * 14 + 2, 32, 32)
    assert np.bincount(labels)[0] == 16  # the class with most images comes first
    assert official.sum() == 15 * 6
    monkeypatch.setattr(
        photo_task, "lower_layers", lambda images, *_, **options: np.arange(len(images))
    )  # to know them
    scenes = Photographs(dataset="scenes-6", frozen=True, pretrained="weights.npz", validation=0.2)
    data = scenes.load(scene_folder)
    np.testing.assert_array_equal(np.bincount(data.test.labels), 2)
    np.testing.assert_array_equal(np.bincount(data.held_out.labels), 1)
    assert len(set(np.bincount(data.validation.labels))) == 1
    counts = np.bincount(data.train.labels)
    assert (counts[0], counts[-1]) == (6, 1)
    assert (np.diff(counts) <= 0).all()
    places = np.concatenate([part.inputs for part in (data.train, data.test, data.validation, data.held_out)])
    assert len(set(places)) == len(places)
    assert official[data.test.inputs].all()
    np.testing.assert_array_equal(labels[data.train.inputs], data.train.labels)
    (next((scene_folder / "scene15/train/a").iterdir())).write_bytes(b"no image")
    with pytest.raises(UserError, match="is no image"):
        photos.scenes(scene_folder)


@pytest.mark.parametrize("changes", [["--method", "absgd", "--temperature", "1"], ["--classifier", "ncm"]])
def test_scenes_end_to_end(scene_folder, small, changes):
    options = ["--preset", "scenes", "--dataset", "scenes-6", "--depth", "10"]
    options += ["--epochs", "2", "--batch-size", "8", *changes]
    folders = ["--data-dir", scene_folder, "--work", scene_folder / "work", "--out", scene_folder / "out"]
    assert cli.main(EXPERIMENT, ["train", *options, *map(str, folders)]) == 0
    (path,) = (scene_folder / "out/scenes/scenes-6").glob("*.json")
    record = records.read(path)
    assert record["class_counts"][0] == 6
    assert 0 <= record["accuracy"] <= 100


def write_official(folder):
    """ImageNet-LT in miniature: each list names twelve photographs of two classes."""
    rng = np.random.default_rng(1)
    (folder / "ImageNet/train").mkdir(parents=True)
    for split in ("train", "val", "test"):
        lines = []
        for i, image in enumerate(smooth_images(rng, 12, (40, 50))):
            name = f"train/{split}{i}.JPEG"
            Image.fromarray(image.astype(np.uint8)).convert("RGB").save(folder / "ImageNet" / name)
            lines.append(f"{name} {i % 4 // 3}")
        (folder / f"ImageNet_LT_{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def official_folder(tmp_path):
    return write_official(tmp_path)


@pytest.mark.parametrize("frozen", [False, True])
def test_photographs_by_lists_end_to_end(official_folder, small, frozen):
    options = ["--preset", "whole", "--dataset", "imagenet-lt", "--size", "32", "--epochs", "2", "--batch-size", "4"]
    if frozen:
        options += ["--frozen", "--pretrained", "resnet10.pth", "--trained", "last-block"]
    folders = ["--data-dir", official_folder, "--work", official_folder / "work", "--out", official_folder / "out"]
    assert cli.main(EXPERIMENT, ["train", *options, "--method", "absgd", "--temperature", "1", *map(str, folders)]) == 0
    (path,) = (official_folder / "out/whole/imagenet-lt").glob("*.json")
    assert records.read(path)["class_counts"][:3] == [9, 3, 0]


def test_images_that_were_left_out_are_said_again(official_folder, capsys):
    (official_folder / "ImageNet/train/val3.JPEG").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"val3\.JPEG is missing or no image"):
        packed("imagenet-lt", "val", official_folder, skip_broken=False)
    for _ in range(2):
        assert len(packed("imagenet-lt", "val", official_folder, skip_broken=True)[1]) == 11
        assert capsys.readouterr().out == "imagenet-lt, val: without 1 of 12 images, which were missing or broken.\n"
    with pytest.raises(UserError, match="lacks 1 of 12 images, which were missing or broken"):
        packed("imagenet-lt", "val", official_folder, skip_broken=False)


def test_without_a_validation_list_an_image_of_each_class_is_held_out(official_folder, small):
    folder = official_folder
    (folder / "ImageNet").rename(folder / "iNaturalist18")
    for ours, theirs in (("train", "train"), ("val", "test")):
        (folder / f"ImageNet_LT_{theirs}.txt").rename(folder / f"iNaturalist18_{ours}.txt")
    task = Photographs(dataset="inaturalist18", depth=10, size=32, validation=0.1)
    whole, split = dataclasses.replace(task, validation=0.0).load(folder), task.load(folder)
    assert whole.validation is None
    np.testing.assert_array_equal(np.bincount(whole.train.labels), [9, 3])
    np.testing.assert_array_equal(np.bincount(split.train.labels), [8, 2])
    assert sorted(split.validation.labels) == [0, 1]
    crop = whole.train.inputs[:][:, 2:34, 2:34]  # images of 36 pixels, for a network that sees 32
    train, held = (part.inputs[np.arange(len(part.labels))] for part in (split.train, split.validation))
    assert held.shape == (2, 32, 32, 3)
    found = [image.tobytes() for image in (*train[:, 2:34, 2:34], *held)]
    assert sorted(found) == sorted(image.tobytes() for image in crop)


def test_changed_images_stay_images():
    keys = jax.random.split(jax.random.key(0), 50)
    image = np.full((40, 40, 3), [200.0, 100.0, 50.0], np.float32)
    out = np.asarray(jax.jit(jax.vmap(lambda key: changed(image, key, 32)))(keys))
    assert out.shape == (50, 32, 32, 3)
    assert 0 <= out.min() <= out.max() <= 255
    assert np.ptp(out, axis=(1, 2)).max() < 0.01  # a photograph of one colour stays one
    # Brighter from top to bottom.
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32)[:, None, None] * 6, (40, 40, 3))
    out = np.asarray(jax.jit(jax.vmap(lambda key: changed(ramp, key, 32)))(keys))[..., 0]
    assert np.diff(out, axis=1).min() > -0.01  # never upside down
    assert np.ptp(out, axis=2).max() < 0.01
