"""The steps whose cost is measured, against their formulas; and what is said of the cost."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import step_cost
from benchmarks.harness import programs, steps
from benchmarks.harness.records import Record
from benchmarks.harness.steps import DECAY, MOMENTUM, RATE, TEMPERATURE
from benchmarks.step_cost import DEVICES, METHODS, SPREAD, Options, Problem
from examples import style
from tests.reference import algorithm1

STEPS, BATCH = 3, 16
SMALL, NAMES = Options(models=("MLP",), batch_size=8, hidden=4, rounds=8), ("SGD", "ABSGD", "META")


def least_squares():
    """A problem in float64 and its batches: x, y and again x, y, held out."""
    rng = np.random.default_rng(0)
    batches = [
        tuple(a for _ in range(2) for a in (rng.normal(size=(BATCH, 3)), 2 * rng.normal(size=BATCH)))
        for _ in range(STEPS)
    ]

    def losses(params, stats, x, y):
        return (x @ params["w"] - y) ** 2 / 2, {"mean": jnp.mean(x, axis=0)}

    params = {"w": jnp.asarray(rng.normal(size=3))}
    return Problem(losses, params, {"mean": jnp.zeros(3)}, batches[0]), batches


def train(name, devices=1):
    """The states before and after each step."""
    problem, batches = least_squares()
    states = [steps.first_state(METHODS[name], problem.params, problem.stats, devices)]
    step = steps.make_step(METHODS[name], problem.losses, "data" if devices > 1 else None)
    if devices > 1:
        step = step_cost.on_each_device(step, devices)
    step = jax.jit(step)
    for batch in batches:
        states.append(step(states[-1], *(batch if devices == 1 else batch[:2])))
    return states


def losses_and_gradients(w, x, y):
    residuals = x @ w - y
    return residuals**2 / 2, residuals[:, None] * x


def sgd(path, batches):
    return [losses_and_gradients(w, *batch[:2])[1].mean(0) for w, batch in zip(path, batches, strict=True)]


def softmax(path, batches):
    directions = []
    for w, batch in zip(path, batches, strict=True):
        losses, gradients = losses_and_gradients(w, *batch[:2])
        exponentials = np.exp(losses / TEMPERATURE)
        directions.append(exponentials / exponentials.sum() @ gradients)
    return directions


def recover(path, batches):
    def g_and_gradient(w, x, y):
        losses, gradients = losses_and_gradients(w, x, y)
        exponentials = np.exp(losses / TEMPERATURE)
        return exponentials.mean(), exponentials @ gradients / TEMPERATURE / len(y)

    u, v = g_and_gradient(path[0], *batches[0][:2])
    directions = [TEMPERATURE * v / u]
    for before, w, batch in zip(path, path[1:], batches[1:], strict=False):
        (g, gradient), (g_before, gradient_before) = (g_and_gradient(at, *batch[:2]) for at in (w, before))
        u, v = g + 0.1 * (u - g_before), gradient + 0.1 * (v - gradient_before)
        directions.append(TEMPERATURE * v / u)
    return directions


def meta(path, batches):
    directions = []
    for w, (x, y, held_out, held_out_y) in zip(path, batches, strict=True):
        gradients = losses_and_gradients(w, x, y)[1]
        ahead = w - RATE * gradients.sum(0)
        v = losses_and_gradients(ahead, held_out, held_out_y)[1].mean(0)
        weights = 1 + 0.01 * RATE * gradients @ v
        directions.append(weights @ gradients / len(y))
    return directions


@pytest.mark.parametrize(
    ("name", "directions"), [("SGD", sgd), ("mini-batch softmax", softmax), ("RECOVER", recover), ("META", meta)]
)
def test_steps_are_those_of_the_method(name, directions):
    with jax.enable_x64(True):
        path = [np.asarray(state.params["w"]) for state in train(name)]
        batches = least_squares()[1]
    w, v = path[0], 0
    for direction in directions(path[:-1], batches):
        v = MOMENTUM * v + direction + DECAY * w
        w = w - RATE * v
    np.testing.assert_allclose(path[-1] - path[0], w - path[0], rtol=1e-9)


def test_steps_of_absgd_are_algorithm_1():
    with jax.enable_x64(True):
        path = [np.asarray(state.params["w"]) for state in train("ABSGD")]
        batches = least_squares()[1]
    losses, gradients = zip(
        *(losses_and_gradients(w, *batch[:2]) for w, batch in zip(path[:-1], batches, strict=True)), strict=True
    )
    settings = {"learning_rate": RATE, "momentum": MOMENTUM, "weight_decay": DECAY}
    w, *_ = algorithm1(np.array(losses), np.array(gradients), path[0], temperature=TEMPERATURE, gamma=0.9, **settings)
    np.testing.assert_allclose(path[-1] - path[0], np.float64(w) - path[0], rtol=1e-9)


@pytest.mark.parametrize("name", SPREAD)
def test_on_devices_a_step_is_that_of_the_whole_batch(name):
    with jax.enable_x64(True):
        alone, spread = train(name), train(name, DEVICES)
        *_, batch = least_squares()[1]
    np.testing.assert_allclose(
        spread[-1].params["w"] - spread[0].params["w"], alone[-1].params["w"] - alone[0].params["w"], rtol=1e-9
    )
    np.testing.assert_allclose(
        spread[-1].stats["mean"].reshape(DEVICES, 3), batch[0].reshape(DEVICES, -1, 3).mean(axis=1)
    )
    np.testing.assert_allclose(alone[-1].stats["mean"], batch[0].mean(axis=0))


def test_networks_give_a_loss_for_each_example():
    options = Options(batch_size=4, hidden=8, embedding=64, tokens=2)
    sizes = {"MLP": 784 * 8 + 8 * 8 + 8 * 10 + 8 + 8 + 10, "transformer": 12 * 64**2 + 64 * 10}
    for name, size in sizes.items():
        losses = []

        def arrays(name=name, losses=losses):
            problem = step_cost.MODELS[name](options)
            losses.append(problem.losses)
            return problem[1:]

        params, stats, batch = jax.eval_shape(arrays)
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == size
        assert jax.eval_shape(losses[0], params, stats, *batch[:2])[0].shape == (4,)
        assert batch[2].shape == batch[0].shape

    losses, init = steps.network(8, 2, 10)
    params, stats = jax.eval_shape(init)
    # the stem; two convolutions in each stage, which doubles the channels but for the first; scales and biases; the end
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == (
        9 * (3 * 2 + 2 * 2 * 2 + 2 * 4 + 4 * 4 + 4 * 8 + 8 * 8) + 2 * (2 + 2 * (2 + 4 + 8)) + 8 * 10 + 10
    )
    images, labels = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)
    each, after = jax.eval_shape(losses, params, stats, images, labels)
    assert each.shape == (4,)
    assert jax.tree.structure(after) == jax.tree.structure(stats)


@pytest.fixture(scope="module")
def measured() -> dict[str, Record]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "LEAST_SECONDS", 0)
        patch.setattr(step_cost, "METHODS", {name: METHODS[name] for name in NAMES})
        return {record["method"]: record for record in step_cost.measure(SMALL)}


def test_absgd_adds_one_meeting_of_the_devices_between_the_passes(measured):
    sgd, absgd = measured["SGD"], measured["ABSGD"]
    parameters = 784 * 4 + 4 * 4 + 4 * 10 + 4 + 4 + 10
    assert sgd["parameters"] == parameters
    assert sum(sgd["collective_bytes"]) == 4 * parameters
    assert absgd["collectives"] == sgd["collectives"] + 1
    assert sum(absgd["collective_bytes"]) == 4 * (parameters + 3 * DEVICES)
    assert sgd["collectives_before_backward"] == 0
    assert absgd["collectives_before_backward"] == 1


def test_absgd_keeps_five_numbers(measured):
    assert [measured[name]["extra_state_bytes"] for name in NAMES] == [0, 20, 0]


def test_costs_are_relative_to_sgd(measured):
    for name in step_cost.COMPARED:
        assert measured["SGD"][f"{name}_ratio"] == 1
    assert (measured["SGD"]["time_ratio"], measured["SGD"]["time_ratio_quartiles"]) == (1, [1, 1])
    flops = 2 * 8 * (784 * 4 * 2 + 4 * 4 * 3 + 4 * 10 * 3)  # of the products; none for the gradient of the images
    assert flops < measured["SGD"]["flops"] < 2 * flops
    assert 1 < measured["ABSGD"]["flops_ratio"] < 1.2
    assert measured["META"]["flops_ratio"] > 2
    assert [measured[name]["timings"] for name in NAMES] == [8, 8, 2]
    json.dumps(list(measured.values()), allow_nan=False)


def record(method, **changes):
    same = {"flops_ratio": 1.0, "bytes_ratio": 1.0, "temporary_bytes_ratio": 1.0, "time_ratio": 1.0}
    meetings = {"collectives": 2, "collectives_before_backward": 0, "collective_bytes": [404, 96]}
    counts = {"parameters": 100, "flops": 4e4, "batch_size": 8, "compile_seconds": 0.25, "extra_state_bytes": 16}
    counts["seconds_of_baseline"] = 5e-5
    if method == "SGD":
        meetings |= {"collectives": 1, "collective_bytes": [404]}
        counts["extra_state_bytes"] = 0
    common = {"model": "MLP", "method": method, "platform": "cpu", "time_ratio_quartiles": [0.9, 1.1]}
    return common | same | meetings | counts | changes


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, None),
        ({"flops_ratio": 1.0011}, "FLOPs / SGD's"),
        ({"bytes_ratio": 1.006}, "bytes accessed / SGD's"),
        ({"time_ratio": 1.015}, None),
        ({"time_ratio": 1.021}, "time / SGD's, median"),
        ({"time_ratio": 1.015, "platform": "gpu"}, "time / SGD's, median"),
        ({"extra_state_bytes": 24}, "bytes of state beyond SGD's"),
        ({"collectives_before_backward": 2}, "collectives between the passes"),
        ({"collectives": 3}, "collectives beyond SGD's"),
        ({"collective_bytes": [404, 100]}, "bytes of collectives beyond SGD's"),
    ],
)
def test_targets_are_met_or_missed(change, missed):
    text = step_cost.markdown([record("SGD"), record("ABSGD", **change)])
    verdicts = {line.split(" | ")[0][2:]: line.split()[-2] for line in text.splitlines() if "| ≤" in line}
    assert len(verdicts) == 7
    assert {aim for aim, verdict in verdicts.items() if verdict == "missed"} == ({missed} if missed else set())
    assert set(verdicts.values()) <= {"met", "missed"}


def test_table_and_figure(tmp_path):
    records = [record("SGD"), record("ABSGD", time_ratio=1.01), record("SGD", model="B"), record("ABSGD", model="B")]
    records.append({name: value for name, value in record("META").items() if not name.startswith("collective")})
    text = step_cost.markdown(records)
    assert "MLP 0.250%; B 0.250%" in text
    assert "a step of SGD takes: MLP 50.0 µs; B 50.0 µs." in text
    assert "| ABSGD | 1.0000 | 1.0000 | 1.0000 | 1.010 (0.900 to 1.100) | 0.2 | 16 | 2 (0) |" in text
    assert "| META | 1.0000 | 1.0000 | 1.0000 | 1.000 (0.900 to 1.100) | 0.2 | 16 | – |" in text
    style.save(step_cost.figure(records), tmp_path / "step_cost.png")
    assert (tmp_path / "step_cost.png").stat().st_size > 0
