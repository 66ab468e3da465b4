"""ResNets for CIFAR (He et al. 2016), and a shallow network that is as good in minutes on a CPU."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

_he = nnx.initializers.he_normal()
_uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
PATCH, PATCH_FILTERS = 4, 24  # of the whitening


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: Any = ((1, 1), (1, 1))) -> jax.Array:
    """Convolves images (N, H, W, C) with a kernel (K, K, C, D), padded by 1 unless told."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=layout)


def shortcut(x: jax.Array, stride: int, channels: int) -> jax.Array:
    """Option A: the identity, subsampled and padded with channels of zeros on both sides. It has no parameters."""
    before = (channels - x.shape[-1]) // 2
    after = channels - x.shape[-1] - before
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (before, after)))


class ConvNorm(nnx.Module):
    """A 3x3 convolution without bias, and batch normalisation, whose statistics are float32 whatever ``dtype`` is."""

    def __init__(self, channels_in, channels, stride=1, *, init=_he, dtype=jnp.float32, rngs: nnx.Rngs):
        self.stride = stride
        self.kernel = nnx.Param(init(rngs.params(), (3, 3, channels_in, channels)))
        self.norm = nnx.BatchNorm(channels, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return self.norm(convolve(x, self.kernel[...].astype(x.dtype), self.stride), use_running_average=not train)


class Block(nnx.Module):
    """Two convolutions and the shortcut around them."""

    def __init__(self, channels_in: int, channels: int, stride: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.stride, self.channels = stride, channels
        self.first = ConvNorm(channels_in, channels, stride, dtype=dtype, rngs=rngs)
        self.second = ConvNorm(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = self.second(nnx.relu(self.first(x, train=train)), train=train)
        return nnx.relu(y + shortcut(x, self.stride, self.channels))


class CosineClassifier(nnx.Module):
    """The cosines between the features and a direction for each class, which is what LDAM's margins are made for."""

    def __init__(self, features: int, classes: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(nnx.initializers.normal()(rngs.params(), (features, classes)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return _unit(x, axis=1) @ _unit(self.kernel[...], axis=0)


def _unit(x: jax.Array, axis: int) -> jax.Array:
    # After the last ReLU all features may be 0, where the norm itself has no gradient.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis, keepdims=True), 1e-12))


class ResNet(nnx.Module):
    """A CIFAR ResNet.

    Args:
      depth: 6n + 2: 8, 20, 32, 44, 56, 110.
      classes: number of classes.
      width: channels of the first stage; the published networks have 16.
      cosine: whether the classifier is normalised, without bias (for LDAM).
      dtype: of images between the layers; parameters, statistics and logits are float32 whatever it is.
      rngs: the source of the initial parameters.
    """

    def __init__(
        self, depth: int, classes: int, *, width: int = 16, cosine: bool = False, dtype=jnp.float32, rngs: nnx.Rngs
    ):
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth={depth}: a CIFAR ResNet has depth 6n + 2, such as 8, 20, 32, 44, 56 or 110.")
        self.dtype = dtype
        self.stem = ConvNorm(3, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List()
        channels_in = width
        for stage, channels in enumerate((width, 2 * width, 4 * width)):
            for i in range(blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                self.blocks.append(Block(channels_in, channels, stride, dtype=dtype, rngs=rngs))
                channels_in = channels
        if cosine:
            self.classifier = CosineClassifier(channels_in, classes, rngs=rngs)
        else:
            self.classifier = nnx.Linear(channels_in, classes, kernel_init=_he, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits (or cosines), shape (N, classes), of normalised images, shape (N, 32, 32, 3)."""
        return self.classifier(self.features(x, train=train))

    def features(self, x: jax.Array, *, train: bool) -> jax.Array:
        """What the classifier sees, shape (N, 4 * width)."""
        x = nnx.relu(self.stem(x.astype(self.dtype), train=train))
        for block in self.blocks:
            x = block(x, train=train)
        return jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


class Shallow(nnx.Module):
    """Whitened patches at 15x15, then five convolutions: minutes on a CPU, at the accuracy of a ResNet-32.

    A fixed 4x4 convolution with stride 2 whitens the patches of the training images (after Jordan 2024, airbench);
    then come convolutions, of which the first and the third are followed by 2x2 max-pooling, with batch normalisation
    and GELU, the maximum over the image, and a linear classifier.

    Args:
      classes: number of classes.
      widths: channels of the convolutions.
      cosine: whether the classifier is normalised, without bias (for LDAM).
      dtype: of images between the layers.
      rngs: the source of the initial parameters.
    """

    def __init__(self, classes, *, widths=(64, 128, 128, 256, 256), cosine=False, dtype=jnp.float32, rngs: nnx.Rngs):
        self.dtype, channels_in = dtype, 2 * PATCH_FILTERS
        self.whitening = nnx.Variable(jnp.zeros((PATCH, PATCH, 3, channels_in)))  # see whitening_kernel
        self.bias = nnx.Param(jnp.zeros(channels_in))
        self.blocks = nnx.List()
        for channels in widths:
            self.blocks.append(ConvNorm(channels_in, channels, init=_uniform, dtype=dtype, rngs=rngs))
            channels_in = channels
        if cosine:
            self.classifier = CosineClassifier(channels_in, classes, rngs=rngs)
        else:
            self.classifier = nnx.Linear(channels_in, classes, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits (or cosines), shape (N, classes), of normalised images, shape (N, 32, 32, 3)."""
        return self.classifier(self.features(x, train=train))

    def features(self, x: jax.Array, *, train: bool) -> jax.Array:
        """What the classifier sees, shape (N, last width)."""
        x = convolve(x.astype(self.dtype), self.whitening[...].astype(self.dtype), stride=2, padding="VALID")
        x = jax.nn.gelu(x + self.bias[...].astype(self.dtype))
        for i, block in enumerate(self.blocks):
            x = convolve(x, block.kernel[...].astype(x.dtype))
            x = jax.nn.gelu(block.norm(max_pool(x) if i in (0, 2) else x, use_running_average=not train))
        return jnp.max(x, axis=(1, 2)).astype(jnp.float32)


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of each 2x2 square; an odd last row or column is dropped.

    By slices, because on the CPU the gradient of ``reduce_window`` is 20 times slower.
    """
    x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
    x = jnp.maximum(x[:, ::2], x[:, 1::2])
    return jnp.maximum(x[:, :, ::2], x[:, :, 1::2])


def whitening_kernel(images: jax.Array) -> jax.Array:
    """The first principal components of patches of normalised images (N, H, W, 3), scaled to variance 1.

    Returns:
      The kernel and its negative, shape (4, 4, 3, 48).
    """
    patches = jax.lax.conv_general_dilated_patches(
        images, (PATCH, PATCH), (3, 3), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    patches = patches.reshape(-1, 3 * PATCH * PATCH)  # the channel is the slowest of a patch's axes
    values, vectors = jnp.linalg.eigh(patches.T @ patches / len(patches))
    kernel = (vectors / jnp.sqrt(values + 5e-4))[:, ::-1][:, :PATCH_FILTERS]
    kernel = kernel.reshape(3, PATCH, PATCH, PATCH_FILTERS).transpose(1, 2, 0, 3)
    return jnp.concatenate([kernel, -kernel], axis=-1)
