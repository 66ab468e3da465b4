"""The safety benchmark: its truth, its verdicts and its cases."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import safety
from benchmarks.safety import INF, NAN, OURS, PUBLISHED, Case, Options, Truth
from examples import style
from tests.reference import algorithm1

CASES = {case.name: case for case in safety.cases(0)}
SOME = ["losses of about 1, λ = 1", "all losses 100 λ", "a loss is nan, λ = 1", "a masked loss is nan, λ = 0.1"]


def make_case(losses, temperatures, gamma=0.9, where=None) -> Case:
    losses = np.asarray(losses, np.float32)
    where = np.ones(losses.shape, bool) if where is None else np.asarray(where)
    return Case("a kind", "a case", losses, where, np.asarray(temperatures, np.float32), gamma)


def weights_of(losses, temperature, gamma):
    unused = np.zeros((*losses.shape, 1))
    settings = {"temperature": temperature, "gamma": gamma, "learning_rate": 0.0}
    return algorithm1(losses, unused, np.zeros(1), **settings)[1]


@pytest.mark.parametrize("keeps_risk", [False, True])
@pytest.mark.parametrize(("temperature", "gamma"), [(0.5, 0.9), (-2.0, 0.25)])
def test_truth_is_algorithm_1(temperature, gamma, keeps_risk):
    case = make_case(np.random.default_rng(0).exponential(size=(6, 4)), [temperature] * 6, gamma)
    expected = weights_of(case.losses.astype(float), temperature, gamma)
    np.testing.assert_allclose(safety.truth(case, keeps_risk).weights, np.float64(expected), rtol=1e-14)


def test_condition_number_is_that_of_perturbed_losses():
    case, step = make_case(np.random.default_rng(1).normal(size=(3, 4)), [0.5] * 3), 1e-7
    losses = case.losses.astype(np.longdouble)
    expected = np.zeros((3, 4))
    for place in np.ndindex(3, 4):
        up, down = losses.copy(), losses.copy()
        up[place] *= 1 + step
        down[place] *= 1 - step
        logs = [np.log(weights_of(perturbed, 0.5, 0.9)) for perturbed in (up, down)]
        expected += np.float64(abs(logs[0] - logs[1]) / (2 * step))
    np.testing.assert_allclose(safety.truth(case, keeps_risk=True).condition, expected, rtol=1e-6)


def test_what_is_carried_over_when_the_temperature_changes():
    case = make_case(np.ones((2, 3)), [1.0, 2.0])
    # After the first batch m = γ, s = γ e and R = 1, which at λ = 2 is s = γ e^½, as is that of the second batch.
    np.testing.assert_allclose(safety.truth(case, keeps_risk=True).weights[1], 1 / (0.9 * 1.1), rtol=1e-14)
    np.testing.assert_allclose(
        safety.truth(case, keeps_risk=False).weights[1], 1 / (0.9 + 0.09 * np.e**0.5), rtol=1e-14
    )


def test_batches_without_an_answer_and_masked_ones_are_left_out():
    with_nan = make_case(
        [[1, 2], [NAN, 1], [3, 1], [5, 5], [2, 1]], [1.0] * 5, where=np.arange(10).reshape(5, 2) // 2 != 3
    )
    truth = safety.truth(with_nan, keeps_risk=True)
    kept = weights_of(np.array([[1.0, 2], [3, 1], [2, 1]]), 1.0, 0.9)
    np.testing.assert_allclose(truth.weights[[0, 2, 4]], np.float64(kept), rtol=1e-14)
    assert np.isnan(truth.weights[1]).all()
    assert (truth.weights[3] == 0).all()


def test_there_are_enough_cases_and_none_is_like_another():
    assert len(CASES) == len(list(safety.cases(0))) >= 60
    contents = {(c.losses.tobytes(), c.where.tobytes(), c.temperatures.tobytes(), c.gamma) for c in CASES.values()}
    assert len(contents) == len(CASES)
    temperatures = np.unique(np.concatenate([case.temperatures for case in CASES.values()]))
    assert {float(np.float32(sign * size)) for size in (1e-4, 1e8) for sign in (1, -1)} < set(temperatures.tolist())


def verdict(weights, case):
    return safety.judge(case, np.asarray(weights)[None], safety.truth(case, keeps_risk=True))


def test_verdicts():
    case = CASES["losses of about 1, λ = 1"]
    truth = safety.truth(case, keeps_risk=True).weights
    exact = verdict(truth.astype(np.float32), case)
    assert exact["right"]
    assert exact["recovers"]
    assert exact["relative_error"] < 1e-7

    wrong = verdict(truth * (1 + 1e-4), case)
    assert wrong["finite"]
    assert not wrong["right"]
    assert not wrong["recovers"]
    assert wrong["relative_error"] == pytest.approx(1e-4, rel=1e-2)

    before = np.arange(len(truth))[:, None] < safety.BEFORE + 1
    poisoned = verdict(np.where(before, truth, NAN), case)
    assert poisoned["relative_error"] is None
    assert [poisoned[key] for key in ("finite", "right", "recovers")] == [False] * 3
    recovered = verdict(np.where(before, 1.0, truth), case)
    assert recovered["recovers"]
    assert not recovered["right"]


def test_no_verdict_allows_more_than_the_cap():
    case = make_case(np.ones((safety.AFTER, 2)), [1.0] * safety.AFTER)
    truth = Truth(np.ones(case.losses.shape), np.full(case.losses.shape, 1e9))
    assert safety.judge(case, np.full((1, safety.AFTER, 2), 1.0 + 0.99 * safety.CAP), truth)["right"]
    assert not safety.judge(case, np.full((1, safety.AFTER, 2), 1.0 + 1.01 * safety.CAP), truth)["right"]


def test_nothing_is_to_recover_where_algorithm_1_gives_no_weight():
    case = CASES["losses of about 1e30, λ = 1"]
    assert verdict(safety.truth(case, keeps_risk=True).weights, case)["recovers"] is None


def test_the_exponential_of_the_paper_in_float32_is_wrong():
    case = CASES["all losses 100 λ"]
    s, weights = np.float32(0), []
    with np.errstate(over="ignore", invalid="ignore"):
        for losses in case.losses:
            exponentials = np.exp(losses)
            s = np.float32(0.1) * s + np.float32(0.9) * exponentials.mean()
            weights.append(exponentials / s)
    found = verdict(weights, case)
    assert [found[key] for key in ("finite", "right", "recovers")] == [False] * 3


@pytest.mark.parametrize("name", {case.kind: name for name, case in CASES.items()}.values())
def test_ours_is_right_on_a_case_of_each_kind(name):
    found = safety.judge(CASES[name], safety.ours(CASES[name]), safety.truth(CASES[name], keeps_risk=True))
    assert found["right"]
    assert found["recovers"] in (True, None)


def test_the_published_package_is_right_where_float32_reaches():
    pytest.importorskip("torch")
    pytest.importorskip("absgd")

    def of(name):
        return safety.judge(CASES[name], safety.published(CASES[name]), safety.truth(CASES[name], keeps_risk=False))

    for name in ("losses of about 1, λ = 1", "λ from 100 to 1e+08", "λ from ∞ to 0.5", "bfloat16, λ = 1"):
        assert of(name)["right"], name
    assert not of("all losses 100 λ")["recovers"]
    assert of("all masked")["note"] == "has no mask"


def test_records_table_and_figure(monkeypatch, tmp_path):
    monkeypatch.setattr(safety, "cases", lambda seed: (CASES[name] for name in SOME))
    monkeypatch.setattr(
        safety, "METHODS", {OURS: safety.METHODS[OURS], PUBLISHED: safety.Method(lambda case: None, False)}
    )
    records = safety.measure(Options())
    assert len(json.loads(json.dumps(records, allow_nan=False))) == 2 * len(SOME)
    assert "right on all" in safety.markdown(records)
    style.save(safety.figure(records), tmp_path / "safety.png")
    assert (tmp_path / "safety.png").stat().st_size > 0

    alone = [record | {"right": False} for record in records if record["method"] == OURS]
    assert "not run" in safety.markdown(alone)
    assert "wrong on: losses of about 1, λ = 1" in safety.markdown(alone)


def test_a_method_that_cannot_be_imported_is_left_out(monkeypatch):
    monkeypatch.setattr(safety, "cases", lambda seed: iter([CASES[SOME[0]]]))
    missing = safety.METHODS[PUBLISHED]._replace(needs=("there_is_no_such_package",))
    monkeypatch.setattr(safety, "METHODS", {OURS: safety.METHODS[OURS], PUBLISHED: missing})
    assert [record["method"] for record in safety.measure(Options())] == [OURS]


def test_infinite_temperature_and_bfloat16_are_in_the_cases():
    assert any(np.isinf(case.temperatures).any() for case in CASES.values())
    assert any(case.losses.dtype == jnp.bfloat16 for case in CASES.values())
    assert any(case.losses[0].max() == INF or np.isnan(case.losses[0]).any() for case in CASES.values())
