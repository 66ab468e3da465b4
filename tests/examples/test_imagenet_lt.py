"""Photographs: lists, packed images, broken ones, and features of frozen layers."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from examples.imagenet_lt.data import Packed, pack, read_list
from examples.imagenet_lt.experiment import EXPERIMENT, make_run
from examples.imagenet_lt.features import lower_layers
from examples.imagenet_lt.resnet import KERAS_MEAN, STD, Head, ResNet, load_weights
from examples.lab.errors import UserError
from tests.examples.test_imagenet_resnet import random_weights


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
    assert pack(names, labels, tmp_path, path, skip_broken=True) == 2
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
    assert len({make_run(row) for row in rows}) == len(rows)


def test_lower_layers_and_head_are_the_whole_network(tmp_path):
    weights = random_weights(50, 1000)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32)).astype(np.uint8)
    features = lower_layers(images, weights, tmp_path, first_strides=True)
    assert features.shape == (8, 2, 2, 2, 1024)
    whole = ResNet(50, 4, first_strides=True, rngs=nnx.Rngs(0))
    load_weights(weights, stem=whole.stem, head=whole)
    head = Head(50, 4, first_strides=True, rngs=nnx.Rngs(1))
    load_weights(weights, head=head)
    head.classifier.kernel[...] = whole.classifier.kernel[...]  # of another size than the pretrained
    x = (images[..., None] / 255 - np.array(KERAS_MEAN)) / np.array(STD)
    for side, each in enumerate((x, x[:, :, ::-1])):
        expected = whole(jnp.asarray(each, jnp.float32), train=False)
        np.testing.assert_allclose(head(features[:, side], train=False), expected, rtol=1e-3, atol=1e-3)
    (path,) = (tmp_path / "cache").iterdir()
    before = path.stat().st_mtime_ns
    np.testing.assert_array_equal(lower_layers(images, weights, tmp_path, first_strides=True), features)
    assert path.stat().st_mtime_ns == before
    path.rename(path.with_name("of other images.npy"))
    lower_layers(images + np.uint8(1), weights, tmp_path, first_strides=True)
    assert path.name not in {other.name for other in (tmp_path / "cache").iterdir()}
