"""Images as the network sees them: random crops and flips, then normalisation, all on the device."""

import jax
import jax.numpy as jnp

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)
SIZE = 32


def pad(images: jax.Array, pixels: int, mode: str = "constant") -> jax.Array:
    """Images (N, 32, 32, 3) with a frame of ``pixels`` on each side; ``mode`` is that of jnp.pad."""
    return jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode=mode)


def crop_and_flip(framed: jax.Array, key: jax.Array, pixels: int) -> jax.Array:
    """A random crop, mirrored half of the time, of each image, in one gather.

    Args:
      framed: images with their frames, shape (B, 32 + 2 pixels, 32 + 2 pixels, 3).
      key: the random key.
      pixels: the width of the frame.

    Returns:
      Images, shape (B, 32, 32, 3).
    """
    size = len(framed)
    corner_key, flip_key = jax.random.split(key)
    top, left = jax.random.randint(corner_key, (2, size, 1), 0, 2 * pixels + 1)
    flip = jax.random.bernoulli(flip_key, shape=(size, 1))
    along = jnp.arange(SIZE)
    rows, columns = top + along, left + jnp.where(flip, along[::-1], along)
    return framed[jnp.arange(size)[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalise(images: jax.Array) -> jax.Array:
    """Bytes to float32 of about mean 0 and variance 1 in each channel."""
    return (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
