"""A 3x3 convolution whose gradients are fast inside ``lax.scan`` on the CPU too."""

from functools import partial

import jax

# XLA's CPU backend has a fast routine for exactly this arrangement of the axes.
_NHWC = ("NHWC", "HWIO", "NHWC")


def conv3x3(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolves images (N, H, W, C) with a kernel (3, 3, C, D), padded by 1, to (N, H / stride, W / stride, D).

    On the CPU it has gradients of gradients, but no forward mode: transpose twice instead (see ``meta.py``).
    """
    return (_conv_cpu if jax.default_backend() == "cpu" else _conv)(x, kernel, stride)


def _conv(x, kernel, stride, padding=(1, 1), **dilation):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (padding, padding), dimension_numbers=_NHWC, **dilation
    )


# The gradients of a convolution are convolutions with other arrangements of the axes. XLA brings those into the fast
# one by transposing, but not inside a loop, where they run 50 times slower. Here the transposes are written out. All
# three are derivatives of one trilinear form, <dy, conv(x, kernel)>, so the gradients of each are the two others.
@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_cpu(x, kernel, stride):
    return _conv(x, kernel, stride)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _images_cpu(dy, kernel, stride, size):
    mirrored = kernel[::-1, ::-1].swapaxes(2, 3)
    return _conv(dy, mirrored, 1, padding=(1, 1 + _gaps(size, dy, stride)), lhs_dilation=(stride, stride))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _kernel_cpu(x, dy, stride):
    # Channels take the place of examples, and the output's gradient that of the kernel.
    images, filters = x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3)
    padding = (1, 1 - _gaps(x.shape[1], dy, stride))
    return _conv(images, filters, 1, padding, rhs_dilation=(stride, stride)).transpose(1, 2, 0, 3)


def _gaps(size, dy, stride):
    """Rows at the end of the images that are skipped by the stride."""
    return size - ((dy.shape[1] - 1) * stride + 1)


def _gradients_of_conv(stride, residuals, dy):
    x, kernel = residuals
    return _images_cpu(dy, kernel, stride, x.shape[1]), _kernel_cpu(x, dy, stride)


def _gradients_of_images(stride, size, residuals, x):
    dy, kernel = residuals
    return _conv_cpu(x, kernel, stride), _kernel_cpu(x, dy, stride)


def _gradients_of_kernel(stride, residuals, kernel):
    x, dy = residuals
    return _images_cpu(dy, kernel, stride, x.shape[1]), _conv_cpu(x, kernel, stride)


def _keep_arguments(function):
    return lambda a, b, *static: (function(a, b, *static), (a, b))


_conv_cpu.defvjp(_keep_arguments(_conv_cpu), _gradients_of_conv)
_images_cpu.defvjp(_keep_arguments(_images_cpu), _gradients_of_images)
_kernel_cpu.defvjp(_keep_arguments(_kernel_cpu), _gradients_of_kernel)
