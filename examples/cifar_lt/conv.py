"""A 3x3 convolution whose gradient is fast inside ``lax.scan`` on the CPU too."""

from functools import partial

import jax

# XLA's CPU backend has a fast routine for exactly this arrangement of the axes.
_NHWC = ("NHWC", "HWIO", "NHWC")


def conv3x3(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolves images (N, H, W, C) with a kernel (3, 3, C, D), padded by 1, to (N, H / stride, W / stride, D)."""
    return (_conv_cpu if jax.default_backend() == "cpu" else _conv)(x, kernel, stride)


def _conv(x, kernel, stride, padding=(1, 1), **dilation):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (padding, padding), dimension_numbers=_NHWC, **dilation
    )


# The gradients of a convolution are convolutions with other arrangements of the axes. XLA brings those into the fast
# one by transposing, but not inside a loop, where they run 50 times slower. Here the transposes are written out.
@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv_cpu(x, kernel, stride):
    return _conv(x, kernel, stride)


def _forward(x, kernel, stride):
    return _conv(x, kernel, stride), (x, kernel)


def _backward(stride, residuals, dy):
    x, kernel = residuals
    gaps, dilation = x.shape[1] - ((dy.shape[1] - 1) * stride + 1), (stride, stride)
    mirrored = kernel[::-1, ::-1].swapaxes(2, 3)
    dx = _conv(dy, mirrored, 1, padding=(1, 1 + gaps), lhs_dilation=dilation)
    # Channels take the place of examples, and the output's gradient that of the kernel.
    images, filters = x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3)
    dkernel = _conv(images, filters, 1, padding=(1, 1 - gaps), rhs_dilation=dilation)
    return dx, dkernel.transpose(1, 2, 0, 3)


_conv_cpu.defvjp(_forward, _backward)
