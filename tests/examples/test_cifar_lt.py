"""The CIFAR experiment: presets as the paper has them, networks, datasets by name, and one run end to end."""

import dataclasses
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.cifar_lt.augment import crop_and_flip, normalise
from examples.cifar_lt.experiment import EXPERIMENT, PRESETS, CifarRecipe, make_run
from examples.cifar_lt.models import ResNet, Shallow, max_pool, whitening_kernel
from examples.cifar_lt.task import Cifar
from examples.lab import cli, records
from examples.lab.errors import UsageError
from examples.lab.experiment import tuned, with_seeds
from examples.lab.methods.absgd import Absgd
from tests.examples.cifar_files import write_cifar10


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    folder = write_cifar10(tmp_path_factory.mktemp("data"))
    yield folder
    shutil.rmtree(folder)  # 180 MB


def rates(run):
    """The learning rate of every epoch's first step."""
    return [float(stage.rate_at(jnp.int32(10 * e), jnp.int32(10))) for stage in run.stages for e in range(stage.epochs)]


def test_the_paper_s_schedule_is_that_of_its_code():
    run = make_run(dataclasses.replace(PRESETS["paper"], method="absgd", temperature=1.0))
    expected = [0.1 * (e + 1) / 5 for e in range(5)] + [0.1] * 155 + [1e-3] * 20 + [1e-5] * 20
    np.testing.assert_allclose(rates(run), expected, rtol=1e-6)
    first, second = run.stages[:2], run.stages[2:]
    assert all(stage.method == Absgd() for stage in first)
    assert all(stage.method == Absgd(1.0) for stage in second)
    assert sum(stage.epochs for stage in first) == 160
    for stage in run.stages:
        assert (stage.batch_size, stage.momentum, stage.weight_decay, stage.nesterov) == (128, 0.9, 2e-4, False)
    assert (run.task.network_name, run.task.shift, run.task.flipped_test) == ("resnet-32-16", 4, False)


@pytest.mark.parametrize("begin", [0.0, 0.25, 0.8])
@pytest.mark.parametrize("preset", PRESETS)
def test_where_the_second_stage_begins_changes_no_rate(preset, begin):
    run = make_run(dataclasses.replace(PRESETS[preset], begin=begin, method="absgd", temperature=2.0, loss="cb-ce"))
    np.testing.assert_allclose(rates(run), rates(make_run(PRESETS[preset])), rtol=1e-6, atol=1e-9)
    assert run.epochs == PRESETS[preset].epochs
    later = [stage for stage in run.stages if stage.class_weights]
    assert sum(stage.epochs for stage in later) == run.epochs - round(begin * run.epochs)
    assert all(stage.method == Absgd(2.0) for stage in later)


def test_the_fast_rate_rises_and_falls_linearly_by_steps():
    run = make_run(PRESETS["fast"])
    steps = [
        float(stage.rate_at(jnp.int32(s), jnp.int32(10))) for stage in run.stages for s in range(10 * stage.epochs)
    ]
    np.testing.assert_allclose(steps, np.interp(range(180), [0, 40, 180], [0, 0.05, 0]), rtol=1e-5, atol=1e-7)


def parameters(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (32, 464_154), (56, 853_018), (110, 1_727_962)])
def test_resnets_have_the_published_sizes(depth, count):
    assert parameters(nnx.eval_shape(lambda: ResNet(depth, 10, rngs=nnx.Rngs(0)))) == count


def test_the_shallow_network_and_its_whitening():
    module = nnx.jit(lambda: Shallow(10, rngs=nnx.Rngs(0)))()
    assert parameters(module) == 1_137_850
    rng = np.random.default_rng(0)
    rough = rng.normal(size=(60, 32, 32, 3)).astype(np.float32)
    images = rough + 2 * rough[:, ::-1].mean(axis=3, keepdims=True)
    kernel = jax.jit(whitening_kernel)(images)
    np.testing.assert_array_equal(kernel[..., 24:], -kernel[..., :24])
    windows = np.lib.stride_tricks.sliding_window_view(images.astype(np.float64), (4, 4), axis=(1, 2))[:, ::3, ::3]
    patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 48)  # rows, columns, channels
    seen = patches @ np.asarray(kernel[..., :24], np.float64).reshape(48, 24)
    variances = np.linalg.eigvalsh(patches.T @ patches / len(patches))[:-25:-1]
    np.testing.assert_allclose(seen.T @ seen / len(seen), np.diag(variances / (variances + 5e-4)), atol=1e-3)
    x = rng.normal(size=(2, 5, 5, 3)).astype(np.float32)
    np.testing.assert_array_equal(max_pool(x), nnx.max_pool(x, (2, 2), (2, 2)))
    forward = lambda module, x: (module(x, train=True), module.features(x, train=False))  # noqa: E731
    logits, features = nnx.jit(forward)(module, rng.normal(size=(4, 32, 32, 3)))
    assert logits.shape == (4, 10)
    assert features.shape == (4, 256)


def test_crops_are_windows_of_the_framed_image_or_their_mirror_images():
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    for pixels in (2, 4):
        framed = np.pad(images, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
        for key in range(5):
            crops = crop_and_flip(images, jax.random.key(key), pixels)
            for crop, frame in zip(np.asarray(crops), framed, strict=True):
                windows = [frame[i : i + 32, j : j + 32] for i in range(2 * pixels + 1) for j in range(2 * pixels + 1)]
                assert any((crop == w).all() or (crop == w[:, ::-1]).all() for w in windows)
    np.testing.assert_allclose(normalise(np.full((1, 1, 1, 3), 255, np.uint8))[0, 0, 0, 0], (1 - 0.4914) / 0.2023)


def task(dataset, **fields):
    return Cifar(dataset=dataset, network_name="shallow", shift=2, **fields)


def test_datasets_by_name(cifar10):
    data = task("cifar10-lt-100", n_max=200, validation=0.1).load(cifar10)
    np.testing.assert_array_equal(np.bincount(data.train.labels), [int(200 * 0.01 ** (i / 9)) for i in range(10)])
    np.testing.assert_array_equal(np.bincount(data.validation.labels), 500)
    np.testing.assert_array_equal(np.bincount(data.held_out.labels), 10)
    assert (data.clean == data.train.labels).all()
    whole = task("cifar10-lt-1", n_max=9000, validation=0.1).load(cifar10)  # more than there are
    np.testing.assert_array_equal(np.bincount(whole.train.labels), 4500)
    noisy = task("cifar10-lt-1-sym0.4", n_max=100, validation=0.1).load(cifar10)
    assert np.mean(noisy.clean != noisy.train.labels) == pytest.approx(0.4, abs=0.05)
    true = np.sort(np.bincount(noisy.validation.labels))  # as wrong as those that are trained on
    assert true[0] != true[-1]
    for name in ("cifar10", "cifar10-lt", "cifar11-lt-100", "cifar10-lt-1.0.0", "cifar10-lt-1-sym1.4", "mnist"):
        with pytest.raises(UsageError, match=f"--dataset {name}"):
            make_run(dataclasses.replace(PRESETS["smoke"], dataset=name))


def test_one_run_end_to_end(cifar10, tmp_path, capsys):
    options = ["--data-dir", str(cifar10), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    arguments = [
        "--preset",
        "smoke",
        "--method",
        "absgd",
        "--temperature",
        "1",
        "--max-weight",
        "3",
        "--network",
        "shallow",
    ]
    assert cli.main(EXPERIMENT, ["train", *arguments, "--epochs", "2", "--begin", "0.5", *options]) == 0
    record = records.read(tmp_path / "out/smoke/cifar10-lt-100/bounded-absgd-ce-t1-c3-epochs2-s0.json")
    assert record["max_weight"] == 3
    assert sum(record["class_counts"]) == 242
    assert record["accuracy"] > 10
    assert max(weight for _, weight in record["by_epoch"]["largest_weight"]) > 1
    assert "test accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dataset", "right"),
    [
        ("cifar10-lt-100", None),
        ("cifar100-st-10", None),
        ("cifar10-lt-1", None),
        ("cifar10-lt-1-sym0.4", 0.6),
        ("cifar10-lt-1-asym0.4", 0.8),
        ("cifar100-lt-1-asym0.4", 0.6),
        ("cifar10-lt-1-worse", 0.6),
        ("cifar10-lt-10-sym0.4", 0.6),
    ],
)
def test_every_row_of_the_tables_is_a_run_of_its_own(dataset, right):
    for preset in PRESETS:
        rows = EXPERIMENT.recipes(preset, dataset)
        recipes = {run for row in rows for run in [tuned(row), *with_seeds(row, 2)]}
        assert len({EXPERIMENT.path(recipe, Path()) for recipe in recipes}) == len(recipes)
        assert len({make_run(recipe) for recipe in recipes}) == len(recipes)
        told = {recipe.fraction for recipe in recipes if recipe.method == "forward"}
        assert told == (set() if right is None else {right})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"network": "resnet-9-4"}, "--network resnet-9-4"),
        ({"network": "vgg"}, "--network vgg"),
        ({"rate": math.nan}, "--rate nan"),
        ({"rate": -1.0}, "--rate -1"),
        ({"momentum": math.nan}, "--momentum nan"),
        ({"weight_decay": math.nan}, "--weight-decay nan"),
        ({"test_per_class": 5000}, "--test-per-class 5000"),
        ({"epochs": 0}, "--epochs 0"),
        ({"begin": 1.5}, "--begin 1.5"),
        ({"second_rate": 0.0}, "--second-rate 0.0"),
        ({"classifier": "crt", "loss": "ldam"}, "--classifier replaces"),
        ({"method": "within-class", "temperature": 1.0}, "--method within-class needs --gamma"),
        ({"method": "term", "temperature": 1.0, "gamma": 0.5}, "--gamma 0.5 is for within-class, absgd"),
    ],
)
def test_numbers_that_cannot_be_are_one_sentence(arguments, message):
    with pytest.raises(UsageError, match=message):
        CifarRecipe(preset="fast", **arguments)
