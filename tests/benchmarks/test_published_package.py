"""The comparison with the published package, with small networks."""

import importlib
import json

import jax
import numpy as np
import pytest

from benchmarks import published_package
from benchmarks.harness.names import EPOCH, PUBLISHED, ROUNDED, STEPWISE
from benchmarks.published_package import Options
from examples import style
from examples.cifar_lt import data
from examples.lab.task import Split
from tests.reference import algorithm1

SMALL = Options(depth=8, width=2, batch_size=4, steps=2, exact_steps=4, timed_steps=2, repeats=2)


@pytest.fixture
def published(monkeypatch):
    """The module that needs PyTorch, on random images."""
    for name in ("torch", "absgd"):
        pytest.importorskip(name)
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (32, 32, 32, 3), np.uint8), rng.integers(0, 10, 32, np.int32))
    monkeypatch.setattr(data, "load", lambda dataset, folder: (split, split))
    return importlib.import_module("benchmarks.harness.published")


def test_the_two_agree_in_float64(published):
    first, *steps = published.agreement(SMALL, SMALL.exact_depth, SMALL.exact_steps, np.float64)
    assert first["logits_difference"] < 1e-13
    assert {(record["method"], record["step"]) for record in steps} == {
        (method, step) for method in (PUBLISHED, ROUNDED) for step in (1, 2, 3, 4)
    }
    for record in steps:
        for name in ("loss_difference", "weight_difference", "parameter_distance"):
            assert record[name] < 1e-11, record


def test_the_package_with_these_settings_is_algorithm_1(published):
    with jax.enable_x64(True):
        _, init, _ = published.make_ours(8, 2, np.float64)
        arrays = published.torch_arrays(init(0).params)
    network = published.make_network(8, 2, arrays)
    images, labels = published.load(SMALL, 4)
    batches = list(zip(images.astype(np.float64), labels, strict=True))
    seen = list(published.published_steps(network, batches))
    losses = np.array([step.losses for step in seen])
    settings = {"temperature": 1.0, "gamma": 0.9, "learning_rate": 0.0}
    _, expected, _ = algorithm1(losses, np.zeros((*losses.shape, 1)), np.zeros(1), **settings)
    np.testing.assert_allclose([step.weights for step in seen], np.float64(expected), rtol=1e-12)


def test_speed_on_the_cpu(published):
    records = published.speed(SMALL)
    assert [record["method"] for record in records] == [
        PUBLISHED, STEPWISE, EPOCH,
    ]  # fmt: skip
    assert records[0]["ratio"] == {"median": 1, "min": 1, "max": 1}
    for record in records:
        rates = record["images_per_second"]
        assert 0 < rates["min"] <= rates["median"] <= rates["max"]
    json.dumps(records, allow_nan=False)


def trajectory(distance):
    common = {"quantity": "trajectory", "dtype": "float64", "depth": 8, "method": PUBLISHED, "loss": 2.3}
    return [
        {**common, "step": step, "loss_difference": 0.0, "weight_difference": 0.0, "parameter_distance": distance}
        for step in (1, 2)
    ]


def rate(method, device, ratio):
    spread = {"median": ratio, "min": ratio, "max": ratio}
    common = {"quantity": "images_per_second", "dtype": "float32", "runs": 1, "compile_seconds": 1.0}
    return {**common, "method": method, "device": device, "images_per_second": spread, "ratio": spread}


def test_targets_of_an_accelerator_are_met_or_missed(tmp_path):
    text = published_package.markdown([*trajectory(1e-12), rate(EPOCH, "cpu", 1.5)])
    assert "1.0e-12: met" in text
    assert "target" not in text

    text = published_package.markdown([*trajectory(1e-3), rate(EPOCH, "gpu", 2.5)])
    assert "1.0e-03: missed" in text
    assert "target 3: missed" in text
    assert "target 3: met" in published_package.markdown([*trajectory(0.0), rate(EPOCH, "gpu", 3.5)])
    assert "Speed: not run." in published_package.markdown(trajectory(0.0))

    style.save(published_package.figure(trajectory(1e-12)), tmp_path / "published_package.png")
    assert (tmp_path / "published_package.png").stat().st_size > 0
