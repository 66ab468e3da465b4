"""Benchmark: KL-DRO linear regression."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy.optimize import minimize

from benchmarks import kl_dro
from benchmarks.harness import records
from examples.lab import files
from examples.lab.errors import UserError


def problem(n=250, d=3):
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=(n, d)), np.ones((n, 1))], axis=1)
    return x, x @ rng.normal(size=d + 1) + rng.standard_t(4, size=n)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 5.0])
def test_newton_finds_what_scipy_finds(temperature):
    x, y = problem()
    found = minimize(lambda w: kl_dro.objective(w, x, y, temperature), np.linalg.lstsq(x, y)[0], method="BFGS")
    assert kl_dro.optimum(x, y, temperature) == pytest.approx(found.fun, rel=1e-6)


def test_the_features_are_those_of_scikit_learn(tmp_path):
    # longitude, latitude, age, rooms, bedrooms, population, households, income, value
    blocks = np.array([[-122, 37, 41, 880, 130, 320, 160, 8.3, 452600], [-120, 35, 20, 900, 200, 750, 250, 2.5, 90000]])
    np.savetxt(tmp_path / "cal_housing.data", blocks, delimiter=",")
    x, y = kl_dro.load(tmp_path)
    assert x.shape == (2, 9)
    assert y.tolist() == [4.526, 0.9]
    # income, age, rooms, bedrooms, population, occupancy, latitude, longitude, of which two blocks make 1 and -1
    np.testing.assert_allclose(x[0], [1, 1, 1, 1, -1, -1, 1, -1, 1])


def test_missing_data_are_named(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no network\nand a long story")

    monkeypatch.setattr(files.pooch, "retrieve", offline)
    with pytest.raises(UserError, match=r"cal_housing.data is missing, .* \(no network\).*--data-dir"):
        kl_dro.load(tmp_path)


def test_umax_is_that_of_its_authors():
    lam, risks = 0.5, [1.0, 3.0, 2.0, 0.1, 2.5]
    transform = kl_dro.scale_by_umax(lam)
    state, log_s = transform.init(None), -np.inf
    for risk in risks:
        updates, state = transform.update(jnp.float32(1), state, value=jnp.float32(risk))
        log_s = max(log_s, risk / lam)
        log_s += lam * 0.1 * (np.exp(risk / lam - log_s) - 1)
        assert float(updates) == pytest.approx(np.exp(risk / lam - log_s), rel=1e-5)


@pytest.mark.parametrize("name", list(kl_dro.METHODS))
def test_every_method_descends(name, monkeypatch):
    monkeypatch.setattr(kl_dro, "EPOCHS", 4)
    monkeypatch.setattr(kl_dro, "EVERY", 2)
    x, y = problem()
    start = np.zeros(4)
    method = kl_dro.METHODS[name]
    run = kl_dro.Run(jnp.float32(5), jnp.float32(1e-5), jnp.float32(method.parameters[2]), jnp.int32(0))
    path = jax.jit(lambda run: kl_dro.train(method, *(jnp.float32(a) for a in (x, y, start)), run))(run)
    values = [kl_dro.objective(np.asarray(w, float), x, y, 5.0) for w in path]
    assert len(values) == 3
    assert values[0] > values[1] > values[2]


def test_a_failed_seed_is_counted_and_not_averaged(tmp_path):
    common = {"method": "m", "temperature": 1.0, "optimum": 2.0}
    path = records.write("kl_dro", [common | {"seed": i, "gap": gap} for i, gap in enumerate([1, 3, None])], tmp_path)
    assert path.exists()
    lines = kl_dro.markdown(records.read("kl_dro", tmp_path)).splitlines()
    assert [line for line in lines if line.startswith("| m ")] == ["| m | 2 (1 to 3), 1 failed |"]


def test_the_target_is_missed_by_one_bad_seed():
    def verdict(ours):
        return kl_dro.verdict({kl_dro.OURS: {1.0: ours}, kl_dro.SCENT: {1.0: [0.4, 0.3]}})

    assert "0.29 against 0.3: met" in verdict([0.1, 0.29])
    assert "0.31 against 0.3: missed" in verdict([0.1, 0.31])
    assert "inf against 0.3: missed" in verdict([0.1, float("inf")])


def test_seeds_share_their_batches_and_nothing_else(monkeypatch):
    monkeypatch.setattr(kl_dro, "EPOCHS", 2)
    monkeypatch.setattr(kl_dro, "EVERY", 2)
    x, y, start = (jnp.float32(a) for a in (*problem(), np.zeros(4)))
    method = kl_dro.METHODS["SOX"]
    columns = jnp.float32([0.5, 1, 5]), jnp.float32([1e-4, 1e-5, 1e-5]), jnp.float32([0.5, 0.4, 0.8])
    paths = kl_dro.train_all(method, x, y, start, kl_dro.Run(*columns, jnp.arange(2)))
    for i in range(3):
        for seed in range(2):
            alone = kl_dro.train(method, x, y, start, kl_dro.Run(*(column[i] for column in columns), jnp.int32(seed)))
            np.testing.assert_allclose(paths[i, seed], alone, rtol=1e-5)


def test_a_table_that_cannot_be_drawn_replaces_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    records.publish("a", lambda: [{"seed": 1}], lambda found: "", lambda found: Figure())
    with pytest.raises(IndexError):
        records.publish("a", lambda: [{"seed": 2}], lambda found: found[1]["seed"], lambda found: Figure())
    assert [record["seed"] for record in records.read("a", tmp_path)] == [1]
    assert [record["seed"] for record in records.read("a", tmp_path / "unfinished")] == [2]
