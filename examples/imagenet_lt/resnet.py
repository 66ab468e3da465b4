"""ResNets for photographs (He et al. 2016) as torchvision has them, and pretrained weights for them.

Names and shapes of parameters are those of ``torchvision.models.resnet50().state_dict()``, kernels with their axes in
JAX's order, so that its ``.pth`` files can be read without PyTorch.
"""

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.lab import safe_pickle
from examples.lab.errors import UserError

BLOCKS = {10: (1, 1, 1, 1), 50: (3, 4, 6, 3), 152: (3, 8, 36, 3)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_he = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


def _conv(channels_in: int, channels: int, size: int, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    padding = [(size // 2, size // 2)] * 2
    conv = nnx.Conv(
        channels_in, channels, (size, size), stride, padding=padding, use_bias=False, kernel_init=_he, rngs=rngs
    )
    if jax.default_backend() == "cpu":
        conv.conv_general_dilated = _as_product
    return conv


def _as_product(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **_: Any) -> jax.Array:
    """A convolution as one product of matrices, because XLA's gradients of those with few pixels are slow on a CPU."""
    height, width, channels = *kernel.shape[:2], kernel.shape[3]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = ((n - k) // s + 1 for n, k, s in zip(x.shape[1:3], (height, width), strides, strict=True))

    def seen_by(i: int, j: int) -> jax.Array:
        return x[:, i : i + strides[0] * rows : strides[0], j : j + strides[1] * columns : strides[1]]

    patches = jnp.concatenate([seen_by(i, j) for i in range(height) for j in range(width)], axis=-1)
    return patches @ kernel.reshape(-1, channels)


def _norm(channels: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(channels, momentum=0.9, epsilon=1e-5, rngs=rngs)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions and the shortcut around them; the stride is that of the 3x3, as in torchvision.

    With ``first_strides`` it is that of the first 1x1, as in the paper.
    """

    convolutions, expansion = 3, 4

    def __init__(self, channels_in: int, width: int, stride: int, first_strides: bool, rngs: nnx.Rngs):
        strides = (stride, 1) if first_strides else (1, stride)
        self.conv1, self.bn1 = _conv(channels_in, width, 1, strides[0], rngs), _norm(width, rngs)
        self.conv2, self.bn2 = _conv(width, width, 3, strides[1], rngs), _norm(width, rngs)
        self.conv3, self.bn3 = _conv(width, 4 * width, 1, 1, rngs), _norm(4 * width, rngs)
        changes = stride > 1 or channels_in != 4 * width
        shortcut = [_conv(channels_in, 4 * width, 1, stride, rngs), _norm(4 * width, rngs)] if changes else []
        self.downsample = nnx.List(shortcut)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        fixed = not train
        y = nnx.relu(self.bn1(self.conv1(x), use_running_average=fixed))
        y = nnx.relu(self.bn2(self.conv2(y), use_running_average=fixed))
        y = self.bn3(self.conv3(y), use_running_average=fixed)
        return nnx.relu(_shortcut(self.downsample, x, fixed) + y)


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and the shortcut around them."""

    convolutions, expansion = 2, 1

    def __init__(self, channels_in: int, width: int, stride: int, first_strides: bool, rngs: nnx.Rngs):
        del first_strides  # there is no other way
        self.conv1, self.bn1 = _conv(channels_in, width, 3, stride, rngs), _norm(width, rngs)
        self.conv2, self.bn2 = _conv(width, width, 3, 1, rngs), _norm(width, rngs)
        changes = stride > 1 or channels_in != width
        self.downsample = nnx.List([_conv(channels_in, width, 1, stride, rngs), _norm(width, rngs)] if changes else [])

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        fixed = not train
        y = nnx.relu(self.bn1(self.conv1(x), use_running_average=fixed))
        y = self.bn2(self.conv2(y), use_running_average=fixed)
        return nnx.relu(_shortcut(self.downsample, x, fixed) + y)


def _shortcut(downsample: nnx.List, x: jax.Array, fixed: bool) -> jax.Array:
    if not downsample:
        return x
    conv, norm = downsample
    return norm(conv(x), use_running_average=fixed)


def _block(depth: int) -> type[BasicBlock] | type[Bottleneck]:
    return BasicBlock if depth == 10 else Bottleneck


class Stem(nnx.Module):
    """All of a ResNet before its last stage: images (N, H, W, 3) to (N, H/16, W/16, 1024), of a ResNet-10 256."""

    def __init__(self, depth: int = 50, *, first_strides: bool = False, rngs: nnx.Rngs):
        self.conv1, self.bn1 = _conv(3, 64, 7, 2, rngs), _norm(64, rngs)
        channels_in, self.stages, block = 64, nnx.List(), _block(depth)
        for stage, blocks in enumerate(BLOCKS[depth][:3]):
            self.stages.append(_stage(block, channels_in, 64 * 2**stage, blocks, stage > 0, first_strides, rngs))
            channels_in = block.expansion * 64 * 2**stage

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nnx.relu(self.bn1(self.conv1(x), use_running_average=not train))
        around: Any = ((1, 1), (1, 1))  # pyright knows only its strings
        x = nnx.max_pool(x, (3, 3), (2, 2), around)
        for stage in self.stages:
            for block in stage:
                x = block(x, train=train)
        return x


class Head(nnx.Module):
    """The last stage, the mean over the image, and a linear classifier."""

    def __init__(self, depth: int, classes: int, *, first_strides: bool = False, rngs: nnx.Rngs):
        block = _block(depth)
        self.stage = _stage(block, 256 * block.expansion, 512, BLOCKS[depth][3], True, first_strides, rngs)
        self.classifier = nnx.Linear(512 * block.expansion, classes, rngs=rngs)

    def features(self, x: jax.Array, *, train: bool) -> jax.Array:
        """What the classifier sees, shape (N, 2048), of a ResNet-10 (N, 512)."""
        for block in self.stage:
            x = block(x, train=train)
        return jnp.mean(x, axis=(1, 2))

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return self.classifier(self.features(x, train=train))


class ResNet(Head):
    """A whole network: logits (N, classes) of normalised images (N, H, W, 3)."""

    def __init__(self, depth: int, classes: int, *, first_strides: bool = False, rngs: nnx.Rngs):
        if depth not in BLOCKS:
            raise ValueError(f"depth={depth}: choose from {', '.join(map(str, BLOCKS))}.")
        super().__init__(depth, classes, first_strides=first_strides, rngs=rngs)
        self.stem = Stem(depth, first_strides=first_strides, rngs=rngs)

    def features(self, x: jax.Array, *, train: bool) -> jax.Array:
        return super().features(self.stem(x, train=train), train=train)


def _stage(block, channels_in, width, blocks, halves, first_strides, rngs) -> nnx.List:
    first = block(channels_in, width, 2 if halves else 1, first_strides, rngs)
    rest = [block(block.expansion * width, width, 1, first_strides, rngs) for _ in range(blocks - 1)]
    return nnx.List([first, *rest])


# --- pretrained weights


def load_weights(weights: Mapping[str, np.ndarray], *, stem: Stem | None = None, head: Head | None = None) -> None:
    """Puts the arrays of a torchvision state_dict, PyTorch's axes, into a network; the classifier only if it fits.

    Raises:
      UserError: if an array is missing or has another shape, or there are more layers than the network has.
    """
    places = _places(stem, head)
    stages = {name.partition(".")[0] for name in places if name.startswith("layer")}
    for name in weights:
        if name.partition(".")[0] in stages and name not in places and not name.endswith("num_batches_tracked"):
            raise UserError(f"The network has no place for {name}: the weights are those of another depth.")
    for name, (owner, attribute) in places.items():
        variable = getattr(owner, attribute)
        given = weights.get(name)
        if name.startswith("fc.") and (given is None or given.size != variable.size):
            continue
        if given is None:
            raise UserError(f"The weights have no {name}: they are not those of this ResNet.")
        array = np.asarray(given, np.float32)
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        if array.shape != variable.shape:
            raise UserError(f"{name} has the shape {given.shape}, the network needs {variable.shape} in JAX's order.")
        variable.set_value(jnp.asarray(array))


def _places(stem: Stem | None, head: Head | None) -> dict[str, tuple[Any, str]]:
    """Where each array of a state_dict belongs: a module and its attribute."""
    places: dict[str, tuple[Any, str]] = {}

    def norm(name: str, module: nnx.BatchNorm) -> None:
        names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
        places.update({f"{name}.{theirs}": (module, ours) for theirs, ours in names.items()})

    if stem is not None:
        places["conv1.weight"] = (stem.conv1, "kernel")
        norm("bn1", stem.bn1)
    stages = [*(enumerate(stem.stages, 1) if stem else ()), *([(4, head.stage)] if head else ())]
    for number, stage in stages:
        for i, block in enumerate(stage):
            at = f"layer{number}.{i}"
            for k in range(1, block.convolutions + 1):
                places[f"{at}.conv{k}.weight"] = (getattr(block, f"conv{k}"), "kernel")
                norm(f"{at}.bn{k}", getattr(block, f"bn{k}"))
            if block.downsample:
                places[f"{at}.downsample.0.weight"] = (block.downsample[0], "kernel")
                norm(f"{at}.downsample.1", block.downsample[1])
    if head is not None:
        places["fc.weight"], places["fc.bias"] = (head.classifier, "kernel"), (head.classifier, "bias")
    return places


def read_pth(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a state_dict that PyTorch has saved; nothing in the file is executed."""
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            root = pickled.removesuffix("data.pkl")
            storage = lambda key: archive.read(f"{root}data/{key}")  # noqa: E731
            content = safe_pickle.load(io.BytesIO(archive.read(pickled)), storage)
            return {name: np.asarray(array) for name, array in content.items()}
    except Exception as error:  # a damaged archive can fail in any way
        raise UserError(f"{path} is not a state_dict of PyTorch ({type(error).__name__}: {error}).") from None


def read_keras(path: Path) -> dict[str, np.ndarray]:
    """Weights of Keras's first ResNet-50 as a state_dict; they are for ``first_strides`` and :data:`KERAS_MEAN`.

    Biases of convolutions become part of the means of batch normalisation, another ε part of its variances, and the
    input is RGB in units of ``STD``.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return _from_keras(arrays)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} does not hold the weights of Keras's ResNet-50 ({error}).") from None


KERAS_MEAN = tuple(value / 255 for value in (123.68, 116.779, 103.939))


def _from_keras(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {}

    def unit(theirs: Sequence[str], conv: str, norm: str) -> None:
        kernel = arrays[f"{theirs[0]}/kernel"]
        if conv == "conv1":
            kernel = kernel[:, :, ::-1] * 255 * np.array(STD)[:, None]
        out[f"{conv}.weight"] = kernel.transpose(3, 2, 0, 1)
        for ours, name in (("weight", "gamma"), ("bias", "beta")):
            out[f"{norm}.{ours}"] = arrays[f"{theirs[1]}/{name}"]
        out[f"{norm}.running_mean"] = arrays[f"{theirs[1]}/moving_mean"] - arrays[f"{theirs[0]}/bias"]
        out[f"{norm}.running_var"] = arrays[f"{theirs[1]}/moving_variance"] + (1e-3 - 1e-5)

    unit(("conv1", "bn_conv1"), "conv1", "bn1")
    for number, blocks in enumerate(BLOCKS[50], 1):
        for i in range(blocks):
            at, name = f"layer{number}.{i}", f"{number + 1}{'abcdef'[i]}_branch"
            for k, branch in enumerate(("2a", "2b", "2c"), 1):
                unit((f"res{name}{branch}", f"bn{name}{branch}"), f"{at}.conv{k}", f"{at}.bn{k}")
            if i == 0:
                unit((f"res{name}1", f"bn{name}1"), f"{at}.downsample.0", f"{at}.downsample.1")
    out["fc.weight"], out["fc.bias"] = arrays["fc1000/kernel"].T, arrays["fc1000/bias"]
    return out
