"""Photographs, a pretrained ResNet, and what of it is trained."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from examples.imagenet_lt.data import OFFICIAL, Packed, Rows, packed, scenes
from examples.imagenet_lt.features import either_side, lower_layers, one_side, pretrained
from examples.imagenet_lt.resnet import KERAS_MEAN, MEAN, STD, Head, ResNet, read_keras, read_pth
from examples.lab.errors import UsageError
from examples.lab.imbalance import class_counts, subset
from examples.lab.task import NUMBER, Data, Split, Task

HELD_OUT_PER_CLASS = 10
TEST_PER_CLASS = 100  # of the scenes
LARGEST = 200  # training images of the most frequent class of the scenes
SCENES = 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Photographs(Task):
    """The fields identify the images and the network."""

    dataset: str  # imagenet-lt, places-lt, inaturalist18, or the stand-in scenes-<imbalance ratio>
    depth: int = 50
    pretrained: str | None = None  # a .pth of torchvision, or the .npz of Keras's first ResNet-50, in the data folder
    frozen: bool = False  # all below the last stage, of which then only the features are kept
    size: int = 224  # pixels that the network sees, of photographs resized to 8/7 of it; scenes keep their 128
    skip_broken: bool = False
    validation: float = 0.0
    subset_seed: int = 0

    PARTS = ("all", "last-block", "classifier")

    @property
    def ratio(self) -> float | None:
        """The imbalance ratio of the scenes; None of the official datasets, which are imbalanced as they are."""
        if self.dataset in OFFICIAL:
            return None
        found = re.fullmatch(f"scenes-{NUMBER}", self.dataset)
        if not found or float(found[1]) < 1:
            raise UsageError(f"--dataset {self.dataset}: choose from {', '.join(OFFICIAL)}, or scenes-100.")
        return float(found[1])

    @property
    def classes(self) -> int:
        return SCENES if self.ratio else OFFICIAL[self.dataset].classes

    @property
    def keras(self) -> bool:
        """Whether the weights are Keras's, whose strides and colours are not those of torchvision."""
        return self.pretrained is not None and self.pretrained.endswith(".npz")

    @property
    def streamed(self) -> bool:
        return self.dataset in OFFICIAL

    def load(self, data_dir: Path) -> Data:
        weights = None
        if self.pretrained is not None:
            weights = (read_keras if self.keras else read_pth)(data_dir / self.pretrained)
        return (self._scenes if self.ratio else self._official)(data_dir, weights)

    def _official(self, data_dir: Path, weights) -> Data:
        lists, size = OFFICIAL[self.dataset].lists, self.size

        def split(name: str, crop: int) -> Split:
            path, labels = packed(self.dataset, name, data_dir, skip_broken=self.skip_broken)
            inputs = Packed(path, size * 8 // 7, size if self.frozen else crop)
            return Split(self._frozen(inputs, weights, data_dir) if self.frozen else inputs, labels)

        train, test, validation = split("train", size * 8 // 7), split("test", size), None
        if self.validation and "val" in lists:
            validation = split("val", size)  # the official one, so nothing of the training set is held out
        elif self.validation:
            several = np.bincount(train.labels, minlength=self.classes) > 1
            chosen = subset(train.labels, several.astype(int), self.subset_seed)  # an image of each class
            validation = _rows(split("train", size), chosen)
            train = _rows(train, np.setdiff1d(np.arange(len(train.labels)), chosen))
        return Data(train, test, validation, pretrained=weights)

    def _scenes(self, data_dir: Path, weights) -> Data:
        images, labels, official_test = scenes(data_dir)
        tested = np.flatnonzero(official_test)
        per_class = np.full(self.classes, TEST_PER_CLASS)
        test = tested[subset(labels[tested], per_class, self.subset_seed)]
        rest = np.setdiff1d(np.arange(len(labels)), test)  # 100 training images a class are fewer than n_0
        share = np.ceil(self.validation * np.bincount(labels[rest], minlength=self.classes)).astype(int)
        validation = rest[subset(labels[rest], np.full(self.classes, share.min()), self.subset_seed)]
        rest = np.setdiff1d(rest, validation)
        counts = class_counts("lt", self.ratio or 1.0, self.classes, LARGEST)
        train = rest[subset(labels[rest], counts, self.subset_seed)]
        spare = np.setdiff1d(rest, train)
        held_out = spare[subset(labels[spare], np.full(self.classes, HELD_OUT_PER_CLASS), self.subset_seed)]
        inputs = self._frozen(images, weights, data_dir)

        def split(places) -> Split:
            return Split(inputs[places], labels[places])

        return Data(
            train=split(train),
            test=split(test),
            validation=split(validation) if self.validation else None,
            held_out=split(held_out),
            pretrained=weights,
        )

    def _frozen(self, images, weights, data_dir):
        return lower_layers(images, weights, data_dir, depth=self.depth, first_strides=self.keras)

    def network(self, loss, rngs):
        kind = Head if self.frozen else ResNet
        return kind(self.depth, self.classes, first_strides=self.keras, rngs=rngs)

    def calibrate(self, params, rest, data):
        if data.pretrained is None:
            return params, rest
        return pretrained(self, params, rest, data.pretrained)

    def augment(self, inputs, key):
        """The image or its mirror image; of whole images a random part with other colours."""
        if self.frozen:
            return either_side(inputs, key)
        keys = jax.random.split(key, len(inputs))
        return jax.vmap(lambda image, key: changed(image, key, self.size))(inputs, keys)

    def prepare(self, inputs):
        if self.frozen:
            return one_side(inputs)
        mean = jnp.array(KERAS_MEAN if self.keras else MEAN)
        return (inputs.astype(jnp.float32) / 255 - mean) / jnp.array(STD)

    def part(self, module):
        return {"classifier": 2, "stage": 1}.get(module, 0)


def _rows(split: Split, rows: np.ndarray) -> Split:
    return Split(Rows(split.inputs, rows), split.labels[rows])


def changed(image: jax.Array, key: jax.Array, size: int) -> jax.Array:
    """A random part of an image, resized, perhaps mirrored, with other brightness, contrast and saturation.

    As torchvision's RandomResizedCrop (8 to 100 % of the area, sides 3:4 to 4:3), RandomHorizontalFlip and ColorJitter
    with 0.4, but of the middle square of the photograph.

    Args:
      image: uint8 or float, shape (H, W, 3), from 0 to 255.
      key: a key of :mod:`jax.random`.
      size: pixels of the result.

    Returns:
      float32, shape (size, size, 3).
    """
    area, shape, place, mirror, jitter = jax.random.split(key, 5)
    whole = jnp.array(image.shape[:2], jnp.float32)
    share = jax.random.uniform(area, minval=0.08, maxval=1.0)
    log_side = jax.random.uniform(shape, minval=jnp.log(3 / 4), maxval=jnp.log(4 / 3)) / 2
    sides = jnp.minimum(whole * jnp.sqrt(share) * jnp.exp(jnp.array([log_side, -log_side])), whole)
    corner = jax.random.uniform(place, (2,)) * (whole - sides)
    scale = size / sides
    x = jax.image.scale_and_translate(
        image.astype(jnp.float32), (size, size, 3), (0, 1), scale, -corner * scale, "linear", antialias=True
    )
    x = jnp.where(jax.random.bernoulli(mirror), x[:, ::-1], x)
    brightness, contrast, saturation = jax.random.uniform(jitter, (3,), minval=0.6, maxval=1.4)
    x = jnp.clip(x * brightness, 0, 255)
    grey = x @ jnp.array([0.299, 0.587, 0.114])
    x = jnp.clip(grey.mean() + contrast * (x - grey.mean()), 0, 255)
    grey = (x @ jnp.array([0.299, 0.587, 0.114]))[..., None]
    return jnp.clip(grey + saturation * (x - grey), 0, 255)
