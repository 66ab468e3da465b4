"""ResNets for CIFAR (He et al. 2016), and a shallow, wide network that is as good in minutes on a CPU."""

import jax
import jax.numpy as jnp
from flax import nnx

_he = nnx.initializers.he_normal()


def conv3x3(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolves images (N, H, W, C) with a kernel (3, 3, C, D), padded by 1, to (N, H / stride, W / stride, D)."""
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=layout)


def shortcut(x: jax.Array, stride: int, channels: int) -> jax.Array:
    """Option A: the identity, subsampled and padded with channels of zeros on both sides. It has no parameters."""
    before = (channels - x.shape[-1]) // 2
    after = channels - x.shape[-1] - before
    return jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (before, after)))


class ConvNorm(nnx.Module):
    """A 3x3 convolution without bias, and batch normalisation, whose statistics are float32 whatever ``dtype`` is."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.stride = stride
        self.kernel = nnx.Param(_he(rngs.params(), (3, 3, channels_in, channels)))
        self.norm = nnx.BatchNorm(channels, momentum=0.9, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return self.norm(conv3x3(x, self.kernel[...].astype(x.dtype), self.stride), use_running_average=not train)


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
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


class Wide(nnx.Module):
    """Three blocks of convolution, 2x2 pooling, normalisation and GELU, convolution, normalisation and GELU.

    Before them a fixed 2x2 convolution that whitens the patches of the training images, after them the maximum over
    the image and a linear classifier.

    Args:
      classes: number of classes.
      widths: channels of the blocks.
      cosine: whether the classifier is normalised, without bias (for LDAM).
      dtype: of images between the layers.
      rngs: the source of the initial parameters.
    """

    def __init__(self, classes, *, widths=(32, 96, 128), cosine=False, dtype=jnp.float32, rngs: nnx.Rngs):
        self.dtype = dtype
        self.whitening = nnx.Variable(jnp.zeros((2, 2, 3, 24)))  # see whitening_kernel
        self.blocks, channels_in = nnx.List(), 24
        for channels in widths:
            first = ConvNorm(channels_in, channels, dtype=dtype, rngs=rngs)
            second = ConvNorm(channels, channels, dtype=dtype, rngs=rngs)
            self.blocks.append(nnx.List([first, second]))
            channels_in = channels
        if cosine:
            self.classifier = CosineClassifier(channels_in, classes, rngs=rngs)
        else:
            self.classifier = nnx.Linear(channels_in, classes, kernel_init=_he, rngs=rngs)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits (or cosines), shape (N, classes), of normalised images, shape (N, 32, 32, 3)."""
        return self.classifier(self.features(x, train=train))

    def features(self, x: jax.Array, *, train: bool) -> jax.Array:
        """What the classifier sees, shape (N, last width)."""
        layout = ("NHWC", "HWIO", "NHWC")
        kernel = self.whitening[...].astype(self.dtype)
        x = jax.nn.gelu(
            jax.lax.conv_general_dilated(x.astype(self.dtype), kernel, (1, 1), "VALID", dimension_numbers=layout)
        )
        for first, second in self.blocks:
            x = conv3x3(x, first.kernel[...].astype(x.dtype))
            x = jax.nn.gelu(first.norm(max_pool(x), use_running_average=not train))
            x = jax.nn.gelu(second(x, train=train))
        return jnp.max(x, axis=(1, 2)).astype(jnp.float32)


def max_pool(x: jax.Array) -> jax.Array:
    """The largest of each 2x2 square; an odd last row or column is dropped."""
    n, h, w, c = x.shape
    return x[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


def whitening_kernel(images: jax.Array) -> jax.Array:
    """The kernel (2, 2, 3, 24) that whitens the patches of normalised images (N, H, W, 3), and its negative."""
    patches = jnp.stack([images[:, i : i - 1 or None, j : j - 1 or None] for i in (0, 1) for j in (0, 1)], axis=-2)
    patches = patches.reshape(-1, 12)
    values, vectors = jnp.linalg.eigh(jnp.cov(patches.T))
    kernel = (vectors / jnp.sqrt(values + 5e-4)).reshape(2, 2, 3, 12)
    return jnp.concatenate([kernel, -kernel], axis=-1)
