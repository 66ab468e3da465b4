"""The ResNets: sizes and layout of torchvision's, logits against a float64 forward pass, weights from files."""

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict

import jax
import numpy as np
import pytest
from flax import nnx

from examples.imagenet_lt import resnet
from examples.imagenet_lt.resnet import ResNet, load_weights, read_keras, read_pth
from examples.lab.errors import UserError


def blocks_of(depth):
    return resnet.BLOCKS.get(depth, (1, 1, 1, 1))  # 14 is a ResNet-50 with fewer blocks


def shapes(depth, classes):
    """Of a state_dict of torchvision, from the paper's table of layers."""
    out = {"conv1.weight": (64, 3, 7, 7)}

    def norm(name, channels):
        out.update({f"{name}.{each}": (channels,) for each in ("weight", "bias", "running_mean", "running_var")})

    norm("bn1", 64)
    before = 64
    for number, blocks in enumerate(blocks_of(depth), 1):
        width = 64 * 2 ** (number - 1)
        after = width if depth == 10 else 4 * width
        for i in range(blocks):
            at = f"layer{number}.{i}"
            basic = [(before, width, 3), (width, width, 3)]
            layers = basic if depth == 10 else [(before, width, 1), (width, width, 3), (width, after, 1)]
            for k, (a, b, size) in enumerate(layers, 1):
                out[f"{at}.conv{k}.weight"] = (b, a, size, size)
                norm(f"{at}.bn{k}", b)
            if i == 0 and (number > 1 or before != after):
                out[f"{at}.downsample.0.weight"] = (after, before, 1, 1)
                norm(f"{at}.downsample.1", after)
            before = after
    return out | {"fc.weight": (classes, before), "fc.bias": (classes,)}


def random_weights(depth, classes, seed=0):
    rng, out = np.random.default_rng(seed), {}
    for name, shape in shapes(depth, classes).items():
        if len(shape) == 4:
            out[name] = rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
        elif name.endswith(("running_var", ".weight")) and len(shape) == 1:
            out[name] = rng.uniform(0.5, 1.5, shape)
        else:
            out[name] = rng.normal(0, 0.1, shape)
    return {name: array.astype(np.float32) for name, array in out.items()}


# --- a forward pass of PyTorch's layout in float64 NumPy


def conv(x, kernel, stride=1, padding=0):
    """Images (N, C, H, W) with a kernel (D, C, K, K)."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], axis=(2, 3))[:, :, ::stride, ::stride]
    return np.einsum("nchwij,dcij->ndhw", windows, kernel, optimize=True)


def forward(w, x, depth, *, first_strides=False, eps=1e-5, biases=None):
    biases = biases or {}

    def norm(x, name):
        scale, shift, mean, var = (
            w[f"{name}.{each}"].astype(np.float64)[:, None, None]
            for each in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + eps) * scale + shift

    def layer(x, name, bn, stride=1, padding=0):
        y = conv(x, w[f"{name}.weight"].astype(np.float64), stride, padding)
        return norm(y + biases.get(name, np.zeros(1))[:, None, None], bn)

    relu = lambda x: np.maximum(x, 0)  # noqa: E731
    x = relu(layer(x, "conv1", "bn1", 2, 3))
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::2, ::2].max(axis=(-2, -1))
    for number, blocks in enumerate(blocks_of(depth), 1):
        for i in range(blocks):
            at, stride = f"layer{number}.{i}", 2 if number > 1 and i == 0 else 1
            first, second = (stride, 1) if first_strides else (1, stride)
            if depth == 10:
                y = relu(layer(x, f"{at}.conv1", f"{at}.bn1", stride, 1))
                y = layer(y, f"{at}.conv2", f"{at}.bn2", 1, 1)
            else:
                y = relu(layer(x, f"{at}.conv1", f"{at}.bn1", first))
                y = relu(layer(y, f"{at}.conv2", f"{at}.bn2", second, 1))
                y = layer(y, f"{at}.conv3", f"{at}.bn3")
            if f"{at}.downsample.0.weight" in w:
                x = layer(x, f"{at}.downsample.0", f"{at}.downsample.1", stride)
            x = relu(y + x)
    return x.mean(axis=(2, 3)) @ w["fc.weight"].T.astype(np.float64) + w["fc.bias"]


@pytest.mark.parametrize(
    ("depth", "blocks", "parameters"),
    [(10, (1, 1, 1, 1), 5_418_792), (50, (3, 4, 6, 3), 25_557_032), (152, (3, 8, 36, 3), 60_192_808)],
)
def test_sizes_are_torchvision_s(depth, blocks, parameters):
    assert resnet.BLOCKS[depth] == blocks
    module = nnx.eval_shape(lambda: ResNet(depth, 1000, rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))) == parameters
    with pytest.raises(ValueError, match="depth=20"):
        ResNet(20, 10, rngs=nnx.Rngs(0))


def loaded(weights, depth, classes, *, first_strides):
    """A network with these weights and no others."""
    module = nnx.eval_shape(lambda: ResNet(depth, classes, first_strides=first_strides, rngs=nnx.Rngs(0)))
    load_weights(weights, stem=module.stem, head=module)
    return module


@nnx.jit
def logits(module, x):
    return module(x, train=False)


@pytest.mark.parametrize(("depth", "first_strides"), [(10, False), (14, False), (14, True)])
def test_logits_are_those_of_a_forward_pass_by_hand(depth, first_strides, monkeypatch):
    monkeypatch.setitem(resnet.BLOCKS, 14, blocks_of(14))
    weights = random_weights(depth, 7)
    module = loaded(weights, depth, 7, first_strides=first_strides)
    x = np.random.default_rng(1).normal(size=(2, 3, 64, 64))
    expected = forward(weights, x, depth, first_strides=first_strides)
    found = logits(module, x.transpose(0, 2, 3, 1).astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_every_array_has_a_place_and_must_fit():
    module = nnx.jit(lambda: ResNet(10, 7, rngs=nnx.Rngs(0)))()
    weights = random_weights(10, 1000)
    before = np.array(module.classifier.kernel[...])
    load_weights(weights, stem=module.stem, head=module)  # of other classes: the classifier stays
    np.testing.assert_array_equal(module.classifier.kernel[...], before)
    np.testing.assert_array_equal(module.stem.bn1.var[...], weights["bn1.running_var"])
    with pytest.raises(UserError, match=r"no layer2\.0\.conv1\.weight"):
        load_weights(
            {name: w for name, w in weights.items() if name != "layer2.0.conv1.weight"},
            stem=module.stem,
            head=module,
        )
    with pytest.raises(UserError, match=r"no place for layer2\.1\.conv1\.weight"):
        load_weights(weights | {"layer2.1.conv1.weight": np.zeros(3)}, stem=module.stem, head=module)
    with pytest.raises(UserError, match=r"bn1\.bias has the shape \(3,\)"):
        load_weights(weights | {"bn1.bias": np.zeros(3)}, stem=module.stem, head=module)


def save_pth(path, tensors, rebuild="_rebuild_tensor_v2"):
    """As torch.save writes it, without PyTorch."""
    utils, torch = types.ModuleType("torch._utils"), types.ModuleType("torch")
    exec(f"def {rebuild}(): pass", utils.__dict__)
    torch.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})
    function = getattr(utils, rebuild)

    class Storage:
        def __init__(self, key):
            self.key = key

    class Tensor:
        def __init__(self, key, array):
            self.key, self.array = key, array

        def __reduce__(self):
            strides = tuple(step // 4 for step in self.array.strides)
            return function, (Storage(self.key), 0, self.array.shape, strides, False, OrderedDict())

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            if isinstance(obj, Storage):
                return "storage", torch.FloatStorage, obj.key, "cpu", tensors[list(tensors)[int(obj.key)]].size
            return None

    file = io.BytesIO()
    before = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules |= {"torch": torch, "torch._utils": utils}
    try:
        state = OrderedDict((name, Tensor(str(i), array)) for i, (name, array) in enumerate(tensors.items()))
        Pickler(file, 2).dump(state)
    finally:
        for name, module in before.items():
            sys.modules.pop(name) if module is None else sys.modules.__setitem__(name, module)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("resnet/data.pkl", file.getvalue())
        for i, array in enumerate(tensors.values()):
            archive.writestr(f"resnet/data/{i}", np.asarray(array, np.float32).tobytes())


def test_pth_files_are_read_without_pytorch(tmp_path):
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}
    save_pth(tmp_path / "a.pth", tensors)
    found = read_pth(tmp_path / "a.pth")
    assert list(found) == ["a", "b"]
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)


def test_pth_files_that_ask_for_more_or_are_damaged_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    save_pth(path, {"a": np.ones(3, np.float32)}, rebuild="_load")
    with pytest.raises(UserError, match=r"torch\._utils\._load"):
        read_pth(path)
    save_pth(path, {"a": np.lib.stride_tricks.as_strided(np.ones(3, np.float32), (2, 3), (40, 4))[:, :0]})
    assert read_pth(path)["a"].shape == (2, 0)
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read("resnet/data.pkl")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("resnet/data.pkl", pickled)  # and no data
    for text in (None, b"PK", b""):
        if text is not None:
            path.write_bytes(text)
        with pytest.raises(UserError, match=r"a\.pth is not a state_dict"):
            read_pth(path)


def keras_arrays(weights, rng):
    """The same network as Keras stores it, with biases of its own."""
    out, biases = {}, {}

    def unit(names, conv, norm):
        kernel = weights[f"{conv}.weight"].transpose(2, 3, 1, 0)
        biases[conv] = rng.normal(size=kernel.shape[-1])
        out[f"{names[0]}/kernel"], out[f"{names[0]}/bias"] = kernel, biases[conv]
        theirs = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
        out.update({f"{names[1]}/{b}": weights[f"{norm}.{a}"] for a, b in theirs.items()})

    unit(("conv1", "bn_conv1"), "conv1", "bn1")
    for number, blocks in enumerate(resnet.BLOCKS[50], 1):
        for i in range(blocks):
            name = f"{number + 1}{'abcdef'[i]}_branch"
            for k, branch in enumerate(("2a", "2b", "2c"), 1):
                at = f"layer{number}.{i}"
                unit((f"res{name}{branch}", f"bn{name}{branch}"), f"{at}.conv{k}", f"{at}.bn{k}")
            if i == 0:
                unit((f"res{name}1", f"bn{name}1"), f"{at}.downsample.0", f"{at}.downsample.1")
    out["fc1000/kernel"], out["fc1000/bias"] = weights["fc.weight"].T, weights["fc.bias"]
    return out, biases


def test_keras_weights_give_keras_logits(tmp_path, monkeypatch):
    monkeypatch.setitem(resnet.BLOCKS, 50, (1, 2, 1, 2))  # shallow, or most of the time compiles
    weights = random_weights(50, 5)
    arrays, biases = keras_arrays(weights, np.random.default_rng(2))
    np.savez(tmp_path / "weights.npz", **arrays)
    module = loaded(read_keras(tmp_path / "weights.npz"), 50, 5, first_strides=True)
    image = np.random.default_rng(1).integers(0, 256, (1, 32, 32, 3)).astype(np.float64)
    bgr = image[..., ::-1] - [103.939, 116.779, 123.68]
    expected = forward(weights, bgr.transpose(0, 3, 1, 2), 50, first_strides=True, eps=1e-3, biases=biases)
    normalised = (image / 255 - resnet.KERAS_MEAN) / resnet.STD
    found = logits(module, normalised.astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    with pytest.raises(UserError, match=r"other\.npz does not hold"):
        read_keras(tmp_path / "other.npz")
