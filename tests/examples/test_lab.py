"""The laboratory: shared stages, stops and kills, runs together and alone, records, and an experiment from outside."""

import dataclasses
import itertools
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from examples.lab import checkpoint, cli, evaluate, figures, files, plan, processes, records, report, search, trainer
from examples.lab.config import SGD, Run, Stage, describe, fingerprint
from examples.lab.errors import OutOfTimeError, UsageError, UserError
from examples.lab.input_pipeline import by_length
from examples.lab.methods import Annealed
from examples.lab.methods.absgd import Absgd
from examples.lab.methods.early_learning import EarlyLearning
from examples.lab.methods.look_ahead import L2rw, Meta
from examples.lab.methods.recover import Recover
from examples.lab.methods.robust_losses import RobustLoss
from examples.lab.methods.small_loss import SmallLoss
from examples.lab.methods.within_class import WithinClass
from examples.lab.recipe import METHODS, Recipe
from examples.lab.task import Split
from tests.examples.toy_experiment import EXPERIMENT, Clouds, Sorted, Streamed

ROOT = Path(__file__).parents[2]
FIRST = Stage(epochs=2, rate=(0.1, 0.1), batch_size=40)
QUIET = Console(quiet=True)


def run_of(*stages, seed=0):
    return Run(task=Clouds(), seed=seed, stages=stages)


def settings(tmp_path, **changes):
    return trainer.Settings(tmp_path, tmp_path / "work", 1)._replace(**changes)


def end_of(run, where):
    return jax.tree.map(np.asarray, trainer.left_by(run, where)[0])


def train(runs, where):
    trainer.train(runs, where, QUIET, lambda run: None, str)
    return [end_of(run, where) for run in runs]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def second(method, **changes):
    return dataclasses.replace(FIRST, method=method, **{"rate": (0.1, 0.0)} | changes)


WAYS = {
    "SGD": second(SGD),
    "ABSGD": second(Absgd(1.0)),
    "bounded": second(Absgd(1.0, max_weight=3.0)),
    "negative": second(Absgd(-2.0)),
    "KL radius": second(Absgd(kl_radius=0.5)),
    "trust": second(Absgd(trusted=0.7)),
    "focus": second(Absgd(focus=0.5)),
    "within class": second(WithinClass(1.0, 0.1)),
    "annealed": second(Absgd(Annealed(-4.0, -1.0, 4))),
    "annealed within class": second(WithinClass(Annealed(-4.0, -1.0, 4), 0.1)),
    "annealed loss": second(RobustLoss("gce", Annealed(5.0, 1.4, 4))),
    "SCENT": second(Absgd(1.0, log_alpha=-1.0)),
    "TERM": second(Absgd(1.0, gamma=1.0)),
    "META": second(Meta(), class_weights=True),
    "L2RW": second(L2rw()),
    "RECOVER": second(Recover(1.0)),
    "balanced batches": second(SGD, balanced_batches=True),
    "forward correction": second(RobustLoss("forward", 0.1)),
    "RGD": second(RobustLoss("rgd", 1.0)),
    "small losses": second(SmallLoss(0.7, 2.0)),
    "ELR": second(EarlyLearning(3.0)),
    "balanced softmax": second(SGD, loss="balanced-softmax"),
    "classifier only": second(SGD, trained="classifier"),
    "no momentum": second(SGD, momentum=0.0),
    **{name: Stage(classifier=name) for name in ("ncm", "crt", "tau-norm", "lws")},
}


def test_every_method_trains_after_a_first_stage_that_is_trained_once(tmp_path):
    where, finished = settings(tmp_path), []
    runs = {name: run_of(FIRST, stage) for name, stage in WAYS.items()}
    assert len(list(plan.groups(runs.values(), lambda run: False, 1))) == len(runs) + 1
    trainer.train(list(runs.values()), where, QUIET, finished.append, str)
    assert set(finished) == set(runs.values())
    assert len(finished) == len(runs)

    first, sgd = (trainer.left_by(run, where)[0] for run in (run_of(FIRST), runs["SGD"]))
    seen = set()
    for name, stage in WAYS.items():
        state, lines = trainer.left_by(runs[name], where)
        assert [line["epoch"] for line in lines] == ([1, 2, 3, 4] if stage.epochs else [1, 2, 2]), name
        assert all(math.isfinite(line.get("loss", 0)) for line in lines), name
        assert lines[-1]["test_accuracy"] > 50, name
        seen.add(tuple(line["loss"] for line in lines[:2]))
        other = sgd if stage.epochs and name != "classifier only" else first
        different = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, other.params)
        changed = {path[0].key for path, d in jax.tree_util.tree_leaves_with_path(different) if d}
        all_parts = stage.epochs and stage.trained == "all"
        expected = {"hidden", "norm", "classifier"} if all_parts else {"classifier"}
        assert changed == (set() if name == "SGD" else expected), name
    assert len(seen) == 1


def test_momentum_sgd_by_hand(tmp_path):
    """The whole trainer against a loop over NumPy batches and Optax's own SGD."""
    stages = (
        dataclasses.replace(FIRST, weight_decay=1e-2, nesterov=True),
        second(SGD, weight_decay=1e-2, nesterov=True),
    )
    run, data = run_of(*stages), Clouds().load(tmp_path)
    (end,) = train([run], settings(tmp_path))
    state = jax.jit(lambda: trainer.first_state(run.task, FIRST, (200, 2), 0))()
    graphdef = nnx.split(nnx.eval_shape(lambda: run.task.network("ce", nnx.Rngs(0))), nnx.Param, ...)[0]

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(params, rest, x, y):
        module = nnx.merge(graphdef, params, rest, copy=True)
        logits = module(x, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), nnx.state(module, nnx.Not(nnx.Param))

    params, rest, step = jax.tree.map(np.asarray, state.params), state.rest, 0
    momentum = jax.tree.map(np.zeros_like, params)
    for epoch in range(4):
        key = trainer.epoch_key(state.key, jnp.int32(step), trainer.STEPS)
        for batch in np.asarray(jax.random.permutation(key, 200)).reshape(5, 40):
            x, y = data.train.inputs[batch], data.train.labels[batch]
            grads, rest = gradient(params, rest, x, y)
            grads = jax.tree.map(lambda g, p: np.asarray(g) + 1e-2 * p, grads, params)
            momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, grads)
            rate = 0.1 if epoch < 2 else 0.1 * (1 - (step - 10) / 10)
            params = jax.tree.map(lambda p, m, g: p - rate * (0.9 * m + g), params, momentum, grads)  # noqa: B023
            step += 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), end.params, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), end.rest, rest)


def test_rates_by_step_and_by_epoch():
    at = lambda stage: [float(stage.rate_at(jnp.int32(s), jnp.int32(2))) for s in range(stage.epochs * 2)]  # noqa: E731
    np.testing.assert_allclose(at(Stage(epochs=2, rate=(1.0, 0.0))), [1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(at(Stage(epochs=3, rate=(1.0, 0.0), rate_by_epoch=True)), [1, 1, 0.5, 0.5, 0, 0])
    np.testing.assert_allclose(at(Stage(epochs=1, rate=(1.0, 0.0), rate_by_epoch=True)), [1, 1])


def test_runs_together_are_the_runs_alone(tmp_path):
    methods = (SGD, Absgd(1.0), Absgd(-2.0))
    runs = [run_of(FIRST, second(method), seed=seed) for seed in (0, 1) for method in methods]
    runs.append(run_of(FIRST, Stage(classifier="crt"), seed=1))
    together = settings(tmp_path / "together", together=4)
    assert [len(members) for members in plan.groups(runs, lambda run: False, 4)] == [2, 4, 2, 1]
    for one, other in zip(train(runs, together), train(runs, settings(tmp_path / "alone")), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), one, other)


def test_a_batch_over_devices_is_the_batch_on_one(tmp_path):
    runs = [run_of(FIRST, second(method)) for method in (Absgd(1.0), Meta(), EarlyLearning(3.0))]
    over = train(runs, settings(tmp_path / "over", devices=8))
    for one, other in zip(over, train(runs, settings(tmp_path / "alone")), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), one, other)


def test_each_device_evaluates_its_part():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over, seen = NamedSharding(mesh, PartitionSpec("data")), []
    split = Split(np.zeros((1030, 2)), np.arange(1030))

    def labels(batch):
        seen.extend(shard.data.shape for shard in batch.labels.addressable_shards)
        return batch.labels[None]

    np.testing.assert_array_equal(evaluate._over(Clouds(), split, over, labels), split.labels[None])
    assert seen == 3 * 8 * [(63,)]


def test_batches_from_the_host_are_those_from_the_device(tmp_path):
    stages = [(FIRST, second(method)) for method in (Meta(), EarlyLearning(3.0))]
    alone, over = settings(tmp_path / "alone", together=3), settings(tmp_path / "over", devices=8)
    in_memory, streamed = ([Run(task=task, seed=0, stages=each) for each in stages] for task in (Clouds(), Streamed()))
    batches_of_their_own_length = [Run(task=Sorted(), seed=0, stages=(FIRST,))]
    ends = train([*in_memory, *batches_of_their_own_length], alone)
    for one, other in zip(ends, train([*streamed, *batches_of_their_own_length], over), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), one, other)


def test_batches_of_one_length():
    lengths = np.random.default_rng(0).integers(1, 200, 1000)
    order = np.asarray(by_length(jax.random.key(0), lengths, steps=99, batch_size=10))
    assert len(set(order.flat)) == 990
    spread = np.ptp(lengths[order], axis=1)
    at_random = np.random.default_rng(1).permutation(order.reshape(-1)).reshape(99, 10)
    assert np.median(spread) < 10 < 100 < np.median(np.ptp(lengths[at_random], axis=1))
    means = lengths[order].mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(99))[0, 1]) < 0.3  # short ones do not come first
    again = by_length(jax.random.key(1), lengths, steps=99, batch_size=10)
    assert not np.array_equal(order, again)


def test_a_run_that_stops_in_every_epoch_ends_like_one_that_does_not(tmp_path):
    runs = [run_of(FIRST, second(method)) for method in (Absgd(kl_radius=0.5), Meta(), EarlyLearning(3.0))]
    stopped, stops = settings(tmp_path / "stopped", deadline=0.0), 0
    while True:
        try:
            ends = train(runs, stopped)
            break
        except OutOfTimeError:
            stops += 1
    assert stops == 8
    straight = settings(tmp_path / "straight")
    for one, other, run in zip(ends, train(runs, straight), runs, strict=True):
        same(one, other)
        lines = [trainer.left_by(run, where)[1] for where in (stopped, straight)]
        assert [{k: v for k, v in line.items() if k != "seconds"} for line in lines[0]] == [
            {k: v for k, v in line.items() if k != "seconds"} for line in lines[1]
        ]
    assert not list((tmp_path / "stopped" / "work").glob("together-*"))


def command(*arguments):
    return [sys.executable, "-W", "error", "-m", "tests.examples.toy_experiment", *map(str, arguments)]


def start(*arguments):
    return subprocess.Popen(command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_killed_runs_go_on_and_a_second_process_is_kept_out(tmp_path):
    arguments = ["sweep", "--seeds", 1, "--methods", "absgd", "--out", tmp_path / "out", "--work", tmp_path / "work"]
    first = start(*arguments)
    for _ in itertools.takewhile(lambda _: not list(tmp_path.glob("work/*/checkpoints/*")), range(600)):
        time.sleep(0.1)
    first.send_signal(signal.SIGSTOP)  # so that it is not done before the other asks
    other = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
    assert other.returncode == 1
    assert other.stderr.startswith("Another process trains in")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    once = [*map(str, arguments[:5]), "--out", str(tmp_path / "once"), "--work", str(tmp_path / "once-work")]
    assert cli.main(EXPERIMENT, once) == 0
    files = sorted(path.relative_to(tmp_path / "out") for path in tmp_path.glob("out/tiny/clouds/*.json"))
    assert len(files) == 3  # two runs to choose a strength by, and the run with it
    for name in files:
        two = [records.read(tmp_path / folder / name) for folder in ("out", "once")]
        for record in two:
            del record["seconds"]
        assert two[0] == two[1]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    arguments = ["sweep", "--seeds", "2", "--out", str(folder / "out"), "--work", str(folder / "work")]
    assert cli.main(EXPERIMENT, arguments) == 0
    return folder


def test_a_record_says_what_was_asked_for_and_what_came_out(swept):
    (path,) = swept.glob("out/tiny/clouds/absgd-ce-t*-s1.json")
    record, chosen = records.read(path), float(path.name.split("-")[2][1:])
    assert {
        "experiment": "toy", "preset": "tiny", "dataset": "clouds", "method": "absgd", "loss": "ce",
        "temperature": chosen,
        "kl_radius": None, "max_weight": "inf", "seed": 1, "class_counts": [180, 20], "diverged": False,
        "command": f"python -m examples.toy train --preset tiny --method absgd --temperature {chosen} --seed 1",
    }.items() <= record.items()  # fmt: skip
    assert record["balanced_accuracy"] == pytest.approx(np.mean(record["per_class"]))
    assert record["accuracy"] == pytest.approx(record["balanced_accuracy"])  # of a balanced test set
    assert (record["many"], record["medium"], record["few"]) == (*record["per_class"], None)
    assert record["validation_accuracy"] is None
    assert float(records.read(swept / "out/tiny/clouds/sgd-ce-s0.json")["temperature"]) == math.inf
    chosen_by = records.read(swept / "out/tiny/clouds/absgd-ce-t5-s1000.json")
    assert chosen_by["validation_accuracy"] > 50
    assert {"versions", "hardware", "seconds", "config"} <= set(record)


def test_the_report_is_drawn_from_the_records(swept, capsys):
    assert cli.main(EXPERIMENT, ["report", str(swept / "out/tiny")]) == 0
    text = (swept / "out/tiny/clouds/table.md").read_text()
    lines = text.partition("<details>")[0].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ")]
    table = {(row[0], row[1]): dict(zip(rows[0], row, strict=True)) for row in rows[1:]}
    runs = [records.read(swept / f"out/tiny/clouds/sgd-ce-s{seed}.json")["accuracy"] for seed in (0, 1)]
    assert table["SGD", "ce"]["accuracy"] == f"{np.mean(runs):.2f} ± {np.std(runs, ddof=1):.2f}"
    by_validation = {
        t: records.read(swept / f"out/tiny/clouds/absgd-ce-t{t}-s1000.json")["validation_accuracy"] for t in (1, 5)
    }
    best = max(by_validation, key=by_validation.get)
    assert table["ABSGD", "ce"]["hyper-parameters"] == f"λ = {best}"
    gains = [records.read(swept / f"out/tiny/clouds/absgd-ce-t{best}-s{s}.json")["accuracy"] - runs[s] for s in (0, 1)]
    assert table["ABSGD", "ce"]["gain over SGD"] == f"{np.mean(gains):+.2f} ± {np.std(gains, ddof=1):.2f}"
    assert table["SGD", "cb-ce"]["seeds"] == "2"
    scores = "; ".join(f"λ = {t}: {score:.2f}" for t, score in by_validation.items())
    assert f"| {scores} " in text
    assert (swept / "out/tiny/clouds/gains.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("many", "medium", "balanced", "shown"),
    [(71.0, 42.0, 65.2, ["many", "medium"]), (65.2, None, 65.2, []), (58.0, None, 58.0, ["balanced_accuracy"])],
)
def test_a_table_shows_the_classes_where_accuracy_hides_them(many, medium, balanced, shown):
    runs = [{"accuracy": 65.2, "balanced_accuracy": balanced, "many": many, "medium": medium, "few": None}]
    assert report.columns_by_class(pd.DataFrame(runs)) == shown


def test_the_report_of_a_sweep_that_has_only_chosen_so_far(swept, tmp_path):
    (tmp_path / "tiny/clouds").mkdir(parents=True)
    for path in swept.glob("out/tiny/clouds/*-s1000.json"):
        shutil.copy(path, tmp_path / "tiny/clouds")
    assert cli.main(EXPERIMENT, ["report", str(tmp_path / "tiny")]) == 0
    table, _, choosing = (tmp_path / "tiny/clouds/table.md").read_text().partition("<details>")
    assert "Not run: SGD" in table
    assert "| ABSGD" not in table
    assert "| ABSGD" in choosing


def test_what_runs_share_costs_once():
    def of(stages, seconds, seed=0, lengths=(8, 2)):
        run = {"task": {"is": "Clouds"}, "seed": seed, "stages": [{"rate": stage} for stage in stages]}
        return {"config": {"run": run}, "stages": list(lengths), "seconds": seconds}

    branches = [of([0.1, 0.2], 100.0), of([0.1, 0.3], 120.0), of([0.1, 0.2], 200.0, seed=1)]
    assert report.cost(pd.DataFrame(branches)) == pytest.approx(100 + 0.2 * 120 + 200)
    assert [report.duration(seconds) for seconds in (59, 60, 5400)] == ["59 s", "1.0 min", "1.5 h"]


def test_lines_that_are_compared_are_of_the_same_seeds():
    runs = [("sgd", "ce", 0), ("sgd", "ce", 1), ("sgd", "ce", 2), ("absgd", "ce", 2), ("absgd", "ce", 0)]
    runs = pd.DataFrame([*runs, ("sgd", "focal", 1)], columns=["method", "loss", "seed"])
    kept = figures.with_the_same_seeds(runs)
    assert sorted(zip(kept.method, kept.loss, kept.seed, strict=True)) == [
        ("absgd", "ce", 0), ("absgd", "ce", 2), ("sgd", "ce", 0), ("sgd", "ce", 2), ("sgd", "focal", 1),
    ]  # fmt: skip


def test_a_readme_shows_all_results_or_stays(swept, tmp_path):
    experiment = dataclasses.replace(EXPERIMENT, folder=tmp_path)
    for preset in ("one", "two"):
        shutil.copytree(swept / "out/tiny/clouds", tmp_path / "results" / preset / "clouds")
    experiment = dataclasses.replace(experiment, presets=dict.fromkeys(("one", "two"), EXPERIMENT.presets["tiny"]))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- generated -->\nold\n<!-- /generated -->\n")
    assert cli.main(experiment, ["report", str(tmp_path / "results" / "one")]) == 0
    assert "old" in readme.read_text()
    with pytest.raises(UserError, match="holds no results: sweep first"):
        report.report(experiment, [])
    assert "old" in readme.read_text()
    assert cli.main(experiment, ["report"]) == 0
    headings = [line for line in readme.read_text().splitlines() if line.startswith("### ")]
    assert headings == ["### clouds, preset one", "### clouds, preset two"]
    for picture in re.findall(r"\((.*png)\)", readme.read_text()):
        assert (tmp_path / picture).is_file()


def test_where_the_second_stage_begins():
    late = dataclasses.replace(FIRST, rate=(0.01, 0.01))
    stages = lambda *stages: describe(run_of(*stages))["stages"]  # noqa: E731
    assert figures.second_stage(stages(FIRST, late)) is None
    assert figures.second_stage(stages(FIRST, late, second(Absgd(1.0)), second(Absgd(1.0), epochs=9))) == 4
    assert figures.second_stage(stages(FIRST, second(SGD, class_weights=True))) == 2


def test_a_method_that_was_not_run_says_so(swept, tmp_path):
    kept = tmp_path / "tiny" / "clouds"
    kept.mkdir(parents=True)
    names = ["sgd-ce-s0", *(path.stem for path in swept.glob("out/tiny/clouds/absgd-ce-t*-s0.json"))]
    for name in names:
        (kept / f"{name}.json").write_text((swept / f"out/tiny/clouds/{name}.json").read_text())
    another = records.read(kept / f"{names[1]}.json") | {"temperature": 50.0}  # and no validation to choose by
    files.write_json(kept / "absgd-ce-t50-s0.json", another)
    report.report(EXPERIMENT, [tmp_path / "tiny"])
    text = (kept / "table.md").read_text()
    assert "not chosen" in next(line for line in text.splitlines() if line.startswith("| ABSGD"))
    (missing,) = [line for line in text.splitlines() if line.startswith("Not run: ")]
    assert "NCM (ce)" in missing
    assert "ABSGD (" not in missing.replace("bounded", "")
    with pytest.raises(UserError, match="holds no records"):
        report.report(EXPERIMENT, [tmp_path])


def test_runs_of_other_settings_are_no_more_seeds_of_a_row(swept, tmp_path):
    kept = tmp_path / "tiny" / "clouds"
    kept.mkdir(parents=True)
    for seed in (0, 1):
        content = records.read(swept / f"out/tiny/clouds/sgd-ce-s{seed}.json")
        content["config"] |= {"rate": 0.1 * (1 + seed)}
        files.write_json(kept / f"sgd-ce-s{seed}.json", content)
    with pytest.raises(UserError, match="clouds, sgd, ce, – that differ in more than their seed"):
        report.load(tmp_path / "tiny")


@pytest.mark.parametrize("missing", ["accuracy", "by_epoch", "config", "diverged", "hardware"])
def test_a_record_that_lacks_something_is_told(swept, tmp_path, missing):
    content = json.loads((swept / "out/tiny/clouds/sgd-ce-s0.json").read_text())
    del content[missing]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"a\.json is not the record of a run"):
        records.read(tmp_path / "a.json")


def test_a_run_that_diverged_is_drawn(swept, tmp_path):
    for path in swept.glob("out/tiny/clouds/*.json"):
        content = records.read(path)
        if content["seed"] == 0:
            content["by_epoch"]["loss"][-1][1] = content["by_epoch"]["test_accuracy"][-1][1] = math.nan
            content["diverged"] = True
        (tmp_path / "tiny" / "clouds").mkdir(parents=True, exist_ok=True)
        files.write_json(tmp_path / "tiny" / "clouds" / path.name, content)
    report.report(EXPERIMENT, [tmp_path / "tiny"])
    assert (tmp_path / "tiny" / "clouds" / "training.png").is_file()


def test_two_that_write_one_file_do_not_disturb_one_another(tmp_path):
    path = tmp_path / "a"
    with files.aside(path) as slow:
        slow.write(b"whole")
        with files.aside(path) as quick:
            quick.write(b"all")
        assert path.read_bytes() == b"all"
        slow.write(b", too")
    assert path.read_bytes() == b"whole, too"

    def broken_off():
        with files.aside(path) as file:
            file.write(b"part")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken_off()
    assert path.read_bytes() == b"whole, too"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_runs_of_other_lengths_are_not_trained_together(tmp_path):
    longer = dataclasses.replace(FIRST, epochs=3)
    runs = [run_of(first, second(SGD)) for first in (FIRST, longer)]
    together = settings(tmp_path, together=8)
    train(runs, together)
    for run in runs:
        assert [line["epoch"] for line in trainer.left_by(run, together)[1]] == list(range(1, run.epochs + 1))


def test_damaged_checkpoints_are_told(tmp_path):
    run, where = run_of(FIRST), settings(tmp_path)
    train([run], where)
    (folder,) = (path.parent for path in tmp_path.rglob("metrics.json"))
    whole = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text(whole[:5])
    with pytest.raises(UserError, match=f"{folder.name} is damaged.*Delete it"):
        trainer.left_by(run, where)
    (folder / "metrics.json").write_text(whole)
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "metrics.json":
            path.write_bytes(b"")
    with pytest.raises(UserError, match=f"{folder.name} is damaged.*Delete it"):
        trainer.left_by(run, where)


def test_several_processes_that_are_none(monkeypatch):
    def not_found():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", not_found)
    with pytest.raises(UserError, match=r"--distributed finds no SLURM job.*coordinator_address"):
        processes.join()


def test_a_record_of_other_settings_is_not_overwritten(swept, tmp_path):
    path = tmp_path / "tiny" / "clouds" / "sgd-ce-s0.json"
    path.parent.mkdir(parents=True)
    content = json.loads((swept / "out/tiny/clouds/sgd-ce-s0.json").read_text())
    content["config"]["subset_seed"] = 7
    path.write_text(json.dumps(content))
    recipe = EXPERIMENT.presets["tiny"]
    with pytest.raises(UserError, match="subset_seed: 7 there, None here"):
        records.is_done(path, recipe, EXPERIMENT.make_run(recipe))
    path.write_text("{")
    with pytest.raises(UserError, match="not the record of a run"):
        records.is_done(path, recipe, EXPERIMENT.make_run(recipe))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "nan"], "--temperature nan"),
        (["--temperature", "0", "--method", "absgd"], "--temperature 0"),
        (["--method", "absgd"], "needs --temperature"),
        (["--temperature", "1"], "--temperature 1.0 is for absgd"),
        (["--method", "hinge"], "--method hinge: choose from"),
        (["--loss", "cb-hinge"], "--loss cb-hinge: choose from"),
        (["--parameter", "0", "--method", "gce"], "--parameter 0"),
        (["--method", "elr"], "needs --parameter"),
        (["--kl-radius", "-1", "--method", "kl-radius"], "--kl-radius -1"),
        (["--fraction", "nan", "--method", "trust"], "--fraction nan"),
        (["--max-weight", "1", "--method", "absgd", "--temperature", "1"], "--max-weight 1"),
        (["--gamma", "0"], "--gamma 0"),
        (["--log-alpha", "nan", "--method", "adaptive-gamma", "--temperature", "1"], "--log-alpha nan"),
        (
            ["--anneal-from", "2", "--method", "absgd", "--temperature", "-1"],
            "--anneal-from 2.0: it must have the sign",
        ),
        (["--anneal-from", "nan", "--method", "gce", "--parameter", "1"], "--anneal-from nan: it must have the sign"),
        (
            ["--anneal-from", "2", "--method", "sce", "--parameter", "1", "--begin", "0"],
            "--anneal-from 2.0 is for absgd",
        ),
        (
            ["--anneal-from", "4", "--method", "absgd", "--temperature", "1", "--begin", "0.5"],
            "--anneal-from 4.0 is in the first step",
        ),
        (["--seed", "2147483648"], "--seed 2147483648"),
        (["--subset-seed", "-1"], "--subset-seed -1"),
        (["--validation", "1"], "--validation 1"),
        (["--classifier", "svm"], "--classifier svm"),
        (["--devices", "0"], "--devices 0"),
        (["--devices", "9"], "--devices 9: choose from 1 to 8"),
        (["--devices", "7"], "it must be a multiple of the 7 devices"),
        (["--devices", "2", "--distributed"], "--devices 2: --distributed takes all"),
        (["--together", "0"], "--together 0"),
        (["--loss", "ldam"], "--loss ldam needs a normalised classifier"),
        (["--loss", "cb-deferred-ce"], "choose one of cb- and deferred-"),
        (["--loss", "focal", "--method", "gce", "--parameter", "0.5"], "--method gce is a function of ce or"),
        (["--loss", "balanced-softmax", "--method", "forward", "--fraction", "0.6"], "is a function of ce, not of"),
        (["--method", "gce", "--parameter", "5"], "of gce it must be at most 1"),
        (["--method", "smoothing", "--parameter", "2"], "of smoothing it must be at most 1"),
        (["--method", "l2rw", "--loss", "cb-ce"], "--method l2rw gives the weights itself"),
        (["--begin", "1", "--loss", "cb-ce"], "--begin 1.0 --epochs 4: no epoch is left"),
        (["--epochs", "1", "--begin", "0.9", "--method", "absgd", "--temperature", "1"], "no epoch is left"),
    ],
)
def test_numbers_that_cannot_be_are_one_sentence_and_exit_2(arguments, message, capsys):
    assert cli.main(EXPERIMENT, ["train", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(message) or message in line


def test_a_loss_that_is_not_finite_ends_in_exit_1(tmp_path, capsys, monkeypatch):
    blow_up = lambda recipe: run_of(dataclasses.replace(FIRST, rate=(1e30, 1e30)))  # noqa: E731
    experiment = dataclasses.replace(EXPERIMENT, make_run=blow_up)
    arguments = ["train", "--work", str(tmp_path), "--out", str(tmp_path / "out")]
    assert cli.main(experiment, arguments) == 1
    assert "loss was not finite" in capsys.readouterr().err
    record = records.read(tmp_path / "out/tiny/clouds/sgd-ce-s0.json")
    assert record["diverged"]
    assert "NaN" not in (tmp_path / "out/tiny/clouds/sgd-ce-s0.json").read_text()


def test_unknown_commands_tables_and_methods(capsys):
    assert cli.main(EXPERIMENT, ["fly"]) == 2
    assert cli.main(EXPERIMENT, []) == 0
    assert "report   Draws tables" in capsys.readouterr().err
    assert cli.main(EXPERIMENT, ["train", "--preset", "huge"]) == 2
    assert "--preset huge: choose from tiny" in capsys.readouterr().err
    assert cli.main(EXPERIMENT, ["sweep", "--tables", "9"]) == 2
    assert cli.main(EXPERIMENT, ["sweep", "--methods", "adam"]) == 2
    assert cli.main(EXPERIMENT, ["sweep", "--seeds", "0"]) == 2
    assert "adam: choose from absgd" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        cli.main(EXPERIMENT, ["report", "--help"])
    assert "Folders of results" in capsys.readouterr().out


def test_a_command_gives_its_run_again(tmp_path):
    recipe = dataclasses.replace(EXPERIMENT.presets["tiny"], dataset="two words", begin=0.25, balanced_batches=True)
    experiment = dataclasses.replace(EXPERIMENT, presets={"tiny": dataclasses.replace(recipe, balanced_batches=True)})
    for changes in ({"balanced_batches": False}, {"dataset": "it's", "method": "trust", "fraction": 0.5}):
        asked = dataclasses.replace(recipe, **changes)
        *_, command, options = experiment.command(asked).split(maxsplit=4)
        assert command == "train"
        assert cli._one_run(experiment, "train", shlex.split(options), cli.Machine())[0] == asked


def test_names_say_what_the_preset_does_not():
    preset = EXPERIMENT.presets["tiny"]
    named = lambda **changes: EXPERIMENT.name_of(dataclasses.replace(preset, **changes))  # noqa: E731
    assert named() == named(rate=preset.rate) == "sgd-ce"
    assert named(rate=0.01, weight_decay=0.25, epochs=7) == "sgd-ce-epochs7-rate0.01-weight-decay0.25"
    changed = dataclasses.replace(preset, method="absgd", temperature=-2.0, max_weight=3.0, weight_decay=0.25)
    assert search.label(EXPERIMENT, changed) == "ABSGD, bounded, ce, λ = -2, c = 3, weight decay 0.25"
    assert search.label(EXPERIMENT, preset) == "SGD, ce"


def test_two_runs_of_one_name_are_refused(space, tmp_path, capsys):
    (tmp_path / "space.json").write_text(json.dumps(space | {"candidates": [{"momentum": 0.5}, {"momentum": 0.7}]}))
    assert cli.main(EXPERIMENT, ["search", str(tmp_path), "--work", str(tmp_path / "work")]) == 1
    assert "would be of 3 runs" in capsys.readouterr().err
    assert not list(tmp_path.glob("tiny/**/*.json"))


@pytest.fixture
def space(tmp_path):
    rows = [{"method": "absgd", "temperature": t} for t in (1.0, 5.0)]
    content = {
        "preset": "tiny", "dataset": "clouds", "baseline": {}, "candidates": [*rows, {"loss": "cb-ce"}],
        "choosing_seeds": 2, "confirmed": 1, "confirming_seeds": [100, 101, 102],
    }  # fmt: skip
    (tmp_path / "space.json").write_text(json.dumps(content))
    return content


def test_numbers_of_a_search_keep_their_sign_and_both_digits():
    baseline = {"label": "SGD", "validation": [40.0], "test": [70.0, 71.0]}
    best = {"label": "ABSGD", "validation": [42.5], "test": [72.0, 73.0], "difference": [2.0, 2.0], "interval": [2, 2]}
    lines = search.markdown([baseline, best]).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells == [
        ["SGD", "40.00", "70.50 ± 0.71", "", ""],
        ["ABSGD", "42.50", "72.50 ± 0.71", "+2.00", "+2.00 to +2.00"],
    ]


def test_a_search_confirms_what_validation_chose(space, tmp_path, capsys):
    assert cli.main(EXPERIMENT, ["search", str(tmp_path), "--work", str(tmp_path / "work")]) == 0
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["space"] == space
    baseline, *candidates = found["result"]
    read = lambda name: records.read(tmp_path / f"tiny/clouds/{name}.json")  # noqa: E731
    for line in found["result"]:
        of_record = [read(f"{line['recipe']}-s{seed}")["validation_accuracy"] for seed in (1000, 1001)]
        assert line["validation"] == of_record
    (best,) = [line for line in candidates if "test" in line]
    assert sum(best["validation"]) == max(sum(line["validation"]) for line in candidates)
    pairs = [(read(f"{best['recipe']}-s{s}"), read(f"sgd-ce-s{s}")) for s in (100, 101, 102)]
    gains = np.array([one["accuracy"] - other["accuracy"] for one, other in pairs])
    np.testing.assert_allclose(best["difference"], gains)
    assert baseline["difference"] == [0, 0, 0]
    half = 4.302652729696144 * gains.std(ddof=1) / 3**0.5  # Student's t for 2 degrees of freedom
    text = capsys.readouterr().out
    assert f"{gains.mean() - half:+.2f} to {gains.mean() + half:+.2f}" in text
    assert text.count("not confirmed") == 2
    assert "\n1 of 10: first stage of clouds, SGD, ce, seed 1000 and of 3 more\n" in f"\n{text}"
    assert re.search(r"\n9 of 9, about \d+ min left: clouds, .*, seed 102\n", text)
    assert (tmp_path / "result.md").read_text().strip() in text
    assert (tmp_path / "result.png").is_file()


def test_a_candidate_that_validation_finds_no_better_is_not_confirmed(space, tmp_path, capsys):
    """At a λ that is as good as infinite it is the baseline, and no seed is spent on the comparison."""
    equal = [{"method": "absgd", "temperature": 1e30}]
    (tmp_path / "space.json").write_text(json.dumps(space | {"candidates": equal, "choosing_seeds": 1}))
    assert cli.main(EXPERIMENT, ["search", str(tmp_path), "--work", str(tmp_path / "work")]) == 0
    baseline, candidate = json.loads((tmp_path / "result.json").read_text())["result"]
    assert candidate["validation"] == baseline["validation"]
    assert capsys.readouterr().out.count("not confirmed") == 1
    assert not [*tmp_path.glob("tiny/clouds/*-s10[0-9].json"), *tmp_path.glob("result.png")]


@pytest.mark.parametrize(
    "change",
    [
        {"preset": "x"},
        {"confirming_seeds": [1]},
        {"confirming_seeds": [100, 101, 101]},
        {"confirming_seeds": 3},
        {"confirming_seeds": [1.5, 2]},
        {"choosing_seeds": 0},
        {"choosing_seeds": "1"},
        {"confirmed": 0},
        {"candidates": [{"lambda": 1}]},
        {"extra": 1},
    ],
)
def test_a_space_that_cannot_be_searched(space, change, tmp_path, capsys):
    (tmp_path / "space.json").write_text(json.dumps(space | change))
    assert cli.main(EXPERIMENT, ["search", str(tmp_path), "--work", str(tmp_path / "work")]) in (1, 2)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(next(iter(change))) in line or str(tmp_path) in line
    (tmp_path / "space.json").unlink()
    assert cli.main(EXPERIMENT, ["search", str(tmp_path)]) == 1


@pytest.mark.parametrize("options", [[], ["--dataset", "streamed"], ["--method", "meta"]])
def test_the_parts_of_a_step(options, capsys):
    assert cli.main(EXPERIMENT, ["profile", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    on_host = ["batch on the host"] if "streamed" in options else []
    parts = ["batch", "and losses", "and gradient of their mean", "whole step"]
    assert [row[0] for row in rows[2:]] == on_host + parts
    assert all(float(row[1]) >= 0 for row in rows[2:])
    assert "product of matrices" in lines[-1]


def test_the_log_warns_of_weights_that_tip(tmp_path, capsys):
    arguments = ["train", "--method", "absgd", "--work", str(tmp_path), "--out", str(tmp_path / "out"), "--temperature"]
    assert cli.main(EXPERIMENT, [*arguments, "5"]) == 0
    assert "--max-weight" not in capsys.readouterr().out
    assert cli.main(EXPERIMENT, [*arguments, "0.05"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["--max-weight 3" in line for line in lines] == [True, True]  # of the second stage


@pytest.mark.parametrize("at", ["append_line", "save"])
def test_a_kill_on_either_side_of_the_last_line_leaves_no_gap(tmp_path, monkeypatch, at):
    run, whole, cut = run_of(FIRST), settings(tmp_path / "whole"), settings(tmp_path / "cut")
    train([run], whole)
    act, calls = getattr(checkpoint, at), itertools.count(1)

    def die(*arguments):
        if next(calls) == run.epochs:
            raise KeyboardInterrupt
        act(*arguments)

    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, at, die)
        with pytest.raises(KeyboardInterrupt):
            train([run], cut)
    train([run], cut)
    one, other = (trainer.left_by(run, where)[1] for where in (whole, cut))
    assert [line["epoch"] for line in other] == [1, 2]
    assert [line["test_accuracy"] for line in other] == [line["test_accuracy"] for line in one]


def test_short_epochs_have_no_checkpoint_and_are_trained_again_after_a_kill(tmp_path, monkeypatch):
    run, whole, cut = run_of(second(Absgd(1.0), epochs=4)), settings(tmp_path / "whole"), settings(tmp_path / "cut")
    train([run], whole)
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 1e6)
    saved, append, save = [], checkpoint.append_line, checkpoint.save

    def counted(manager, epoch, state):
        saved.append(epoch)
        save(manager, epoch, state)

    def die(path, line):
        append(path, line)
        if line["epoch"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "append_line", die)
        patched.setattr(checkpoint, "save", counted)
        with pytest.raises(KeyboardInterrupt):
            train([run], cut)
    assert saved == [1]
    (end,) = train([run], cut)
    same(end, train([run], whole)[0])
    assert [line["epoch"] for line in trainer.left_by(run, cut)[1]] == [1, 2, 3, 4]


def test_states_are_restored_by_name_wherever_they_were(tmp_path):
    with checkpoint.open_manager(tmp_path) as manager:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        spread = jax.device_put(jnp.zeros(8), NamedSharding(mesh, PartitionSpec("data")))
        checkpoint.save(manager, 0, {"a": spread, "b": jnp.ones(2)})
        swapped = checkpoint.restore(manager, {"b": jnp.empty(2), "a": jnp.empty(8)})
        np.testing.assert_array_equal(swapped["a"], 0)
        assert isinstance(swapped["a"], np.ndarray)  # so that another number of devices does
        with pytest.raises(UserError, match="is damaged"):
            checkpoint.restore(manager, {"a": jnp.empty(2), "c": jnp.empty(2)})


def test_changed_code_never_continues_an_old_stage(monkeypatch):
    run = run_of(FIRST)
    before = plan.key(run)
    plan.key.cache_clear()
    assert plan.key(run) == before
    plan.key.cache_clear()
    monkeypatch.setattr(plan, "program", lambda: "other code")
    assert plan.key(run) != before
    plan.key.cache_clear()


def test_only_code_that_is_trained_through_belongs_to_a_state(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "SOURCES", tmp_path)
    for name in ("absgd_jax/risk.py", "examples/one/task.py", "examples/lab/task.py", "examples/demo/main.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")

    def changed_by(name):
        before = plan.program.__wrapped__()
        (tmp_path / name).write_text("1")
        return plan.program.__wrapped__() != before

    assert all(map(changed_by, ("absgd_jax/risk.py", "examples/one/models.py", "examples/lab/trainer.py")))
    assert not any(map(changed_by, ("examples/gains.py", "examples/demo/main.py", "examples/lab/report.py")))


def test_new_fields_change_no_old_description():
    assert describe(SGD) == {"is": "Absgd"}
    assert describe(Absgd(2.0)) == {"is": "Absgd", "temperature": 2.0}
    assert describe(Recipe(preset="a", dataset="b", validation=0.1))["validation"] == 0.1
    assert fingerprint(run_of(FIRST)) != fingerprint(run_of(FIRST, seed=1))


def test_methods_are_found_in_their_folder():
    assert {"sgd", "absgd", "trust", "focus", "meta", "l2rw", "recover"} <= set(METHODS)
    with pytest.raises(UsageError, match="is for trust, focus, forward, small-loss, not for absgd"):
        Recipe(preset="", dataset="", method="absgd", temperature=1.0, fraction=0.5)
