"""What is varied, how far, and the arithmetic of many devices; with a linear network in place of the ResNet."""

import dataclasses
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import scaling
from benchmarks.harness import programs, steps
from benchmarks.harness.programs import Program
from benchmarks.scaling import Options, Setting
from examples import style
from examples.lab.errors import UserError

SMALL = Options(batch_size=4, rounds=3, memory_gb=1.0)


@pytest.fixture(autouse=True)
def linear_network(monkeypatch):
    def network(depth, width, classes):
        def losses(params, stats, x, labels):
            x = x.mean(axis=(1, 2))
            logits = x @ params["w"] + params["b"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels), {"mean": x.mean(axis=0)}

        w = jnp.linspace(-1, 1, 3 * classes).reshape(3, classes)
        return losses, lambda: ({"w": w, "b": jnp.zeros(classes)}, {"mean": jnp.zeros(3)})

    monkeypatch.setattr(steps, "network", network)
    monkeypatch.setattr(programs, "LEAST_SECONDS", 0)


def images(seed, number=6):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (number, 32, 32, 3), np.uint8), rng.integers(0, 10, number, np.int32)


def train(step, run, arrays, steps):
    step = jax.jit(step)
    for _ in range(steps):
        run = step(run, *arrays)
    return run


def spread(name, arrays, steps):
    """Over 4 devices."""
    step, init = scaling.data_parallel(SMALL, Setting(4), name, 4)
    return train(step, init(), arrays, steps).state


def assert_same(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), actual, expected)


def test_devices_with_the_same_images_train_like_one():
    x, labels = images(0)
    state = spread("ABSGD", (np.tile(x, (4, 1, 1, 1)), np.tile(labels, 4)), 2)
    step, init = scaling.training(SMALL, Setting(4), "ABSGD")
    expected = train(step, init(), (x, labels), 2).state
    assert_same((state.params, state.optimizer, state.method), (expected.params, expected.optimizer, expected.method))
    assert_same(state.stats["mean"].reshape(4, 3), np.tile(expected.stats["mean"], (4, 1)))


def test_devices_with_images_of_their_own_average_their_gradients():
    parts = [images(seed) for seed in range(4)]
    state = spread("SGD", tuple(map(np.concatenate, zip(*parts, strict=True))), 1)
    step, init = scaling.training(SMALL, Setting(4), "SGD")
    step = jax.jit(step)
    each = [step(init(), *part).state for part in parts]
    momenta = [optax.tree.get(one.optimizer, "trace") for one in each]
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *momenta)
    assert_same(optax.tree.get(state.optimizer, "trace"), mean)
    assert np.ptp([np.linalg.norm(momentum["w"]) for momentum in momenta]) > 0.01
    assert_same(state.stats["mean"], np.concatenate([one.stats["mean"] for one in each]))


def test_runs_trained_together_are_those_trained_alone():
    together, init_all = scaling.training(SMALL, Setting(4, runs=2), "ABSGD")
    step, _ = scaling.training(SMALL, Setting(4), "ABSGD")
    before = init_all()
    assert before.temperature.tolist() == [1, 2]
    assert len(set(before.count.tolist())) == 2
    after = train(together, before, images(0), 2)
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], before)
        assert_same(jax.tree.map(lambda leaf, i=i: leaf[i], after), train(step, one, images(0), 2))
    momenta = optax.tree.get(after.state.optimizer, "trace")["w"]
    assert np.abs(momenta[0] - momenta[1]).max() > 0.01


def test_images_and_labels():
    x, labels = scaling.make_images(Setting(4, classes=3, examples=300))
    assert (x.shape, x.dtype) == ((300, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(x[256:], x[:44])
    assert set(np.unique(labels)) == {0, 1, 2}


def test_bytes_needed():
    def program(temporary, output, alias, size):
        analysis = SimpleNamespace(temp_size_in_bytes=temporary, output_size_in_bytes=output, alias_size_in_bytes=alias)
        compiled = SimpleNamespace(memory_analysis=lambda: analysis)
        return Program(lambda: None, lambda: jnp.zeros(size, jnp.float32), compiled, 0.0)

    alternatives = {"SGD": program(1000, 40, 40, 10), "ABSGD": program(900, 60, 50, 15)}
    both = scaling.bytes_needed(alternatives, (jnp.zeros(7, jnp.uint8), jnp.zeros(2, jnp.int32)))
    assert both == 7 + 2 * 4 + 4 * (10 + 15) + 1000
    alternatives["ABSGD"] = program(900, 160, 50, 15)
    assert scaling.bytes_needed(alternatives, ()) == 4 * (10 + 15) + 900 + 110


def test_growth_ends_with_the_memory():
    # 1024 images of 3 kB fit, 16384 of them do not, into 5 MB; 4 bytes a label
    records = scaling.grow(dataclasses.replace(SMALL, memory_gb=0.005), "examples")
    assert [record["examples"] for record in records] == [1024, 16384]
    assert [record["ended_by"] for record in records] == [None, "memory"]
    small, large = records
    assert 1024 * (3072 + 4) < small["bytes_needed"] < 5e6 < 16384 * (3072 + 4) < large["bytes_needed"]
    assert small["parameters"] == 3 * 10 + 10
    assert small["images_per_second"] == pytest.approx(4 / small["seconds_per_step"])
    assert "time_ratio" not in large
    json.dumps(records, allow_nan=False)


def test_growth_ends_with_the_time():
    (record,) = scaling.grow(dataclasses.replace(SMALL, most_seconds=0.0), "runs")
    assert record["ended_by"] == "time"
    assert record["timings"] == 3


def test_devices_are_weighed_together(monkeypatch):
    monkeypatch.setattr(programs, "time_ratios", lambda *args, **options: (0.5, {"ABSGD": [1.0, 1.25, 1.5]}))
    (record,) = scaling.measure(dataclasses.replace(SMALL, sweeps=("devices",), devices=(2,)))
    assert (record["sweep"], record["devices"], record["batch_size"]) == ("devices", 2, 4)
    assert record["images_per_second"] == 2 * 4 / 0.5
    assert (record["time_ratio"], record["time_ratio_quartiles"]) == (1.25, [1.125, 1.375])


def test_what_fits_nowhere_is_said():
    with pytest.raises(UserError, match="--memory-gb"):
        scaling.measure(dataclasses.replace(SMALL, memory_gb=1e-6, sweeps=("examples",)))


def test_memory(monkeypatch):
    limits = {"bytes_limit": 1000}
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(memory_stats=lambda: limits)])
    assert scaling.memory(Options(memory_gb=3.0)) == 3e9
    assert scaling.memory(Options()) == 900
    limits.clear()
    assert scaling.memory(Options()) == 2e9


def test_seconds_of_an_all_reduce():
    assert scaling.all_reduce_seconds(1, 1e9) == 0
    # three hops up and three down, and seven eighths of 400 bytes both ways through 50 GB/s
    assert scaling.all_reduce_seconds(8, 400) == pytest.approx(6 * 5e-6 + 2 * 350 / 50e9)


def record(sweep="batch_size", **changes):
    setting = {"batch_size": 16, "runs": 1, "classes": 10, "examples": 4096, "devices": 1}
    network = {"depth": 8, "width": 16, "parameters": 1_000_000, "memory": 2e9, "bytes_needed": 5e6}
    times = {"seconds_per_step": 1e-3, "time_ratio": 1.02, "time_ratio_quartiles": [1.01, 1.03]}
    counts = {"images_per_second": 16000.0, "ended_by": None}
    return {"sweep": sweep} | setting | network | times | counts | changes


def too_large(**changes):
    return {name: value for name, value in record(**changes).items() if "time" not in name and "second" not in name}


def test_projection():
    of = scaling.projection(record(), 64)
    gradients = 12 * 5e-6 + 2 * 63 / 64 * 4e6 / 50e9
    numbers = 12 * 5e-6 + 2 * 63 / 64 * (64 * 3 * 4) / 50e9
    assert of == pytest.approx(
        {
            "gradients": gradients,
            "numbers": numbers,
            "sgd": 1e-3 + gradients,
            "absgd": 1e-3 + gradients + numbers,
            "sgd_hidden": 1e-3,
        }
    )
    slow = scaling.projection(record(parameters=100_000_000), 64)
    assert slow["sgd_hidden"] == slow["gradients"] > 1e-3


def test_tables_say_what_was_not_run_and_what_ended_it():
    records = [record(), record(batch_size=32, seconds_per_step=2e-3), too_large(batch_size=64, ended_by="memory")]
    first, second, last = [line for line in scaling.markdown(records).splitlines() if line.endswith(" |")][2:5]
    assert first == "| 16 | 16,000 | 1 | 1.020 (1.010 to 1.030) | 5 |  |"
    assert second.startswith("| 32 | 16,000 | 2 | 1.020")
    assert last == "| 64 | not run | not run | not run | 5 | the last: memory |"


def test_the_arithmetic_is_that_of_the_shortest_step():
    records = [record(batch_size=32, seconds_per_step=2e-3), record(), too_large(batch_size=64, ended_by="memory")]
    text = scaling.markdown(records)
    assert "From the shortest measured step, 16 examples on one device (1 ms of SGD" in text
    gradients = 2 * math.log2(8) * 5e-6 + 2 * 7 / 8 * 4e6 / 50e9
    assert f"\n| 8 | {1e6 * gradients:.1f} | 30.0 | {1 + 1e3 * gradients:.4g} | " in text
    assert "calculated" not in scaling.markdown([record("runs")])


def test_figure(tmp_path):
    records = [record(), record(batch_size=32), record("runs"), record("devices"), record("devices", devices=2)]
    style.save(scaling.figure([*records, too_large(sweep="runs", runs=2)]), tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 0
