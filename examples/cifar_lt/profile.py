"""What an epoch costs, and how near it comes to what the device can do, both measured in the same run.

python -m examples.cifar_lt.sweep --profile --preset paper --columns cifar10-lt-100

The rates to compare with are not from a data sheet: a large matrix product gives the FLOP/s, a large copy the bytes/s.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from examples.cifar_lt.config import Config
from examples.cifar_lt.programs import all_functions, call, images_of, stack
from examples.cifar_lt.schedule import make_hyper, steps_per_epoch
from examples.cifar_lt.train import precision
from examples.environment import hardware, versions

EPOCHS = 3


def convolutions(config: Config) -> list[tuple[int, int, int]]:
    """Size of the output, channels in and channels out of each convolution of the network."""
    layers, channels_in, size = [(32, 3, config.width)], config.width, 32
    for stage in range(3):
        channels, size = config.width << stage, 32 >> stage
        for _ in range((config.depth - 2) // 3):
            layers.append((size, channels_in, channels))
            channels_in = channels
    return layers


def training_flops(config: Config) -> int:
    """FLOPs of one image: forwards, and backwards to the images and to the kernels, all three alike."""
    products = sum(9 * size**2 * before * after for size, before, after in convolutions(config))
    return 3 * 2 * (products + 4 * config.width * config.classes)


def least_bytes(config: Config, itemsize: int) -> int:
    """Bytes of one image that must move if all but the convolutions were fused into them.

    A convolution reads its input and writes its output; backwards it reads the output's gradient and its input and
    writes the input's gradient. Caches can do better where a whole batch of a layer fits into them.
    """
    moved = 0
    for i, (size, before, after) in enumerate(convolutions(config)):
        stride = 2 if i and before != after else 1
        inputs, outputs = (stride * size) ** 2 * before, size**2 * after
        moved += 3 * inputs + 2 * outputs
    return itemsize * moved


def profile(configs: Sequence[Config]) -> dict[str, Any]:
    """Times the epochs of runs that train together, which are alike but for what is an input of the program."""
    images = images_of(configs[0])
    functions, network = all_functions(configs[0], images.counts)
    hyper = stack([make_hyper(config, images.counts, 0) for config in configs])
    state, _ = call(network.init, hyper)
    arguments = images.data["train"], images.data["held_out"], hyper
    (state, _), compile_seconds = call(functions.train_epoch, state, *arguments, donate=True)
    seconds = []
    for _ in range(EPOCHS):
        began = time.perf_counter()
        (state, metrics), _ = call(functions.train_epoch, state, *arguments, donate=True)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - began)

    dtype = jnp.dtype(precision())
    trained = steps_per_epoch(configs[0], images.counts) * configs[0].batch_size * len(configs)
    flops_rate, bytes_rate = _matrix_product_rate(dtype), _copy_rate()
    flops, moved = trained * training_flops(configs[0]), trained * least_bytes(configs[0], dtype.itemsize)
    best = min(seconds)
    return {
        "preset": configs[0].preset,
        "column": configs[0].column,
        "runs_together": len(configs),
        "images_per_epoch": trained,
        "seconds_per_epoch": seconds,
        "compile_seconds": compile_seconds,
        "images_per_second": trained / best,
        "model_flops_per_second": flops / best,
        "matrix_product_flops_per_second": flops_rate,
        "fraction_of_matrix_product": flops / best / flops_rate,
        "least_bytes_per_epoch": moved,
        "copy_bytes_per_second": bytes_rate,
        "fraction_of_copy": moved / best / bytes_rate,
        "seconds_per_run_of_all_epochs": best * configs[0].epochs / len(configs),
        "precision": dtype.name,
        "hardware": hardware(),
        "versions": versions(),
    }


def _best_seconds(function: Callable[..., jax.Array], *arguments: jax.Array) -> float:
    compiled, seconds = jax.jit(function).lower(*arguments).compile(), []
    for _ in range(5):
        began = time.perf_counter()
        compiled(*arguments).block_until_ready()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _matrix_product_rate(dtype: jnp.dtype) -> float:
    size = 1024 if jax.default_backend() == "cpu" else 8192
    matrix = jnp.ones((size, size), dtype)
    return 2 * size**3 / _best_seconds(jnp.matmul, matrix, matrix)


def _copy_rate() -> float:
    numbers = jnp.ones(2**26 if jax.default_backend() == "cpu" else 2**29, jnp.float32)
    return 2 * numbers.nbytes / _best_seconds(lambda x: x + 1, numbers)
