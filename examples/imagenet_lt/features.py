"""What the frozen layers of a pretrained ResNet make of images; computed once, then read."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.imagenet_lt.resnet import KERAS_MEAN, MEAN, STD, Stem, load_weights
from examples.lab import files
from examples.lab.task import Task, module_of

BATCH = 32


def lower_layers(
    images: Any,
    weights: Mapping[str, np.ndarray],
    data_dir: Path,
    *,
    depth: int = 50,
    first_strides: bool = False,
) -> np.ndarray:
    """Features of each image and of its mirror image before the last stage.

    Args:
      images: uint8, grey (N, H, W) or RGB (N, H, W, 3): an array, or :class:`examples.imagenet_lt.data.Packed`.
      weights: those of the network, by torchvision's names.
      data_dir: the folder in whose ``cache`` the features are kept.
      depth: of the network.
      first_strides: as :class:`examples.imagenet_lt.resnet.ResNet`, and whether colours are centred as Keras does.

    Returns:
      Features, shape (N, 2, H/16, W/16, C), float32, read from the file when used.
    """
    digest = hashlib.sha256(images.tobytes() if isinstance(images, np.ndarray) else images.identity)
    for key in sorted(key for key in weights if key.startswith("layer3")):
        digest.update(weights[key].tobytes())
    path = data_dir / "cache" / f"resnet{depth}-{digest.hexdigest()[:16]}.npy"
    if not path.is_file():
        stem = nnx.eval_shape(lambda: Stem(depth, first_strides=first_strides, rngs=nnx.Rngs(0)))
        load_weights(weights, stem=stem)
        mean = KERAS_MEAN if first_strides else MEAN
        with files.aside(path) as file:
            for begin in range(0, len(images), BATCH):
                places = np.arange(begin, begin + BATCH)
                part = np.asarray(
                    _features(stem, jnp.asarray(images[places.clip(max=len(images) - 1)]), jnp.array(mean))
                )
                if begin == 0:
                    header = {"descr": "<f4", "fortran_order": False, "shape": (len(images), *part.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(part[: len(images) - begin].tobytes())
    return np.load(path, mmap_mode="r")


@nnx.jit
def _features(stem: Stem, images: jax.Array, mean: jax.Array) -> jax.Array:
    colours = images if images.ndim == 4 else images[..., None]
    x = (colours.astype(jnp.float32) / 255 - mean) / jnp.array(STD)
    both = jnp.stack([x, x[:, :, ::-1]], axis=1)
    features = stem(both.reshape(-1, *x.shape[1:]), train=False)
    return features.reshape(*both.shape[:2], *features.shape[1:])


def pretrained(task: Task, params: nnx.State, rest: nnx.State, weights: Mapping[str, np.ndarray]) -> tuple:
    """Parameters and statistics of a task's network, its stem where it has one, with pretrained weights."""
    module = module_of(task, "ce", params, rest)
    load_weights(weights, stem=getattr(module, "stem", None), head=module)
    return nnx.split(module, nnx.Param, ...)[1:]


def either_side(features: jax.Array, key: jax.Array) -> jax.Array:
    """Of each image (N, 2, …) itself or its mirror image, at random."""
    mirrored = jax.random.bernoulli(key, shape=features.shape[:1])
    return jnp.where(mirrored[:, None, None, None], features[:, 1], features[:, 0])


def one_side(features: jax.Array) -> jax.Array:
    """Of each image (N, 2, …) itself; what :func:`either_side` has chosen stays."""
    return features if features.ndim == 4 else features[:, 0]
