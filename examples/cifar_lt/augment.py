"""Images as the network sees them: random crops and flips, then normalisation, all on the device."""

import jax
import jax.numpy as jnp

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)
SIZE = 32


def crop_and_flip(images: jax.Array, key: jax.Array, pixels: int, mode: str = "constant") -> jax.Array:
    """A random crop of each padded image, mirrored half of the time, in one gather.

    Args:
      images: shape (B, 32, 32, 3).
      key: the random key.
      pixels: the width of the padding.
      mode: of the padding, as of jnp.pad.

    Returns:
      Images, shape (B, 32, 32, 3).
    """
    size = len(images)
    framed = jnp.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)), mode=mode)
    corner_key, flip_key = jax.random.split(key)
    top, left = jax.random.randint(corner_key, (2, size, 1), 0, 2 * pixels + 1)
    flip = jax.random.bernoulli(flip_key, shape=(size, 1))
    along = jnp.arange(SIZE)
    rows, columns = top + along, left + jnp.where(flip, along[::-1], along)
    return framed[jnp.arange(size)[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalise(images: jax.Array) -> jax.Array:
    """Bytes to float32 of about mean 0 and variance 1 in each channel."""
    return (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)
