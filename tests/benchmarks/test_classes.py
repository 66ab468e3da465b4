"""The cost of classes: every loss is measured, and no step grows faster than its classifier."""

from functools import partial

import jax
import numpy as np

from benchmarks import classes
from benchmarks.harness import programs
from benchmarks.harness.records import RESULTS, read
from examples import style
from examples.lab.config import Stage
from examples.lab.task import Split
from examples.lab.train_step import Facts, first_state, train_step


def test_a_record_for_each_loss_none_of_which_grows_with_the_square_of_the_classes(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "LEAST_SECONDS", 0)
    records = classes.measure(classes.Options(classes=(400,), features=8, batch_size=16, rounds=3, most_seconds=0.1))
    assert [(r["classes"], r["loss"]) for r in records] == [(400, x) for x in (classes.BARE, *classes.MEASURED)]
    # A loss for every label would take 400 times the FLOPs of one loss, which are a fifth of a bare step's here.
    for record in records:
        assert record["flops_ratio"] < 2, record
        assert record["temporary_bytes_ratio"] < 4, record
    ratio = next(r for r in records if r["loss"] == "focal")["flops_ratio"]
    (line,) = [line for line in classes.markdown(records).splitlines() if line.startswith("| focal | FLOPs")]
    assert line.endswith(f"{ratio:.2f} |")
    style.save(classes.figure(records), tmp_path / "classes.png")
    assert (tmp_path / "classes.png").stat().st_size > 5000


def test_the_bare_step_is_the_laboratory_s_with_sgd():
    task, stage = classes.Linear(3, 5), Stage(epochs=1, rate=(0.1, 0.0), weight_decay=0.01)
    rng = np.random.default_rng(0)
    batch = Split(rng.normal(size=(4, 3)).astype(np.float32), rng.integers(0, 5, 4))
    facts = Facts(np.ones(5), 10, np.zeros(4, bool))
    state = jax.jit(lambda: first_state(task, stage, (4, 5), 0))()
    one = jax.jit(classes.bare(stage))(state, batch, np.arange(4), facts)
    other, _ = jax.jit(partial(train_step, task, stage))(state, batch, np.arange(4), None, facts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), one.params, other.params)


def test_the_published_figures_are_flat():
    found = read("classes", RESULTS)
    assert max(record["temporary_bytes_ratio"] for record in found) < 1.2
