"""CIFAR example: every method on real data in seconds, what runs share, how they stop and go on, and bad input."""

import dataclasses
import itertools
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console
from sklearn.datasets import load_digits

from examples.cifar_lt import cells, checkpoint, pack, plan, profile, search, sweep
from examples.cifar_lt.configs import CONFIGS
from examples.cifar_lt.data import Split
from examples.cifar_lt.errors import OutOfTimeError, UserError, exit_code
from examples.cifar_lt.imbalance import class_counts, subset
from examples.cifar_lt.main import parse
from examples.cifar_lt.models import ResNet
from examples.cifar_lt.run import run
from examples.cifar_lt.subsets import Splits, identity, packed_file

SMOKE = CONFIGS["smoke"]
METHODS = [
    *({"loss": loss} for loss in ("ce", "ldam", "cb-focal", "balanced-softmax", "logit-adjustment")),
    *({"loss": loss, "temperature": 1.0} for loss in ("ce", "cb-ldam")),
    {"kl_radius": 1.0},
    {"log_alpha": -1.0, "temperature": 1.0},
    {"gamma": 1.0, "temperature": 1.0},
    {"momentum": 0.0},
    {"start": 0, "temperature": 1.0},
    {"balanced_batches": True},
    *({"algorithm": name} for name in ("meta", "l2rw")),
    {"algorithm": "recover", "temperature": 1.0},
    *({"classifier": name} for name in ("ncm", "crt", "tau-norm", "lws")),
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Handwritten digits, as images of CIFAR's size, packed."""
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    grey = np.repeat(np.repeat((pixels * 15.9).astype(np.uint8).reshape(-1, 8, 8), 4, 1), 4, 2)
    images, labels = np.stack([grey] * 3, -1), labels.astype(np.int32)
    chosen = subset(labels[:1200], class_counts("lt", 100, 10, 100), 0)

    def part(indices):
        return Split(images[indices], labels[indices])

    held_out = np.concatenate([1200 + np.flatnonzero(labels[1200:1500] == c)[:10] for c in range(10)])
    splits = Splits(part(chosen), part(held_out), part(np.arange(0)), part(np.arange(1500, 1797)))
    folder = tmp_path_factory.mktemp("packed")
    pack.write(packed_file(SMOKE, folder), splits._asdict(), identity(SMOKE))
    return folder


def test_every_method_trains_and_stops_and_goes_on(packed, tmp_path):
    configs = [dataclasses.replace(SMOKE, packed=packed, **changes) for changes in METHODS]
    results = {config: tmp_path / "results" / f"{config.name}.json" for config in configs}
    assert len({path.name for path in results.values()}) == len(METHODS)

    def start(**options):
        return run(results, tmp_path / "work", sweep.command, Console(quiet=True), **options)

    with pytest.raises(OutOfTimeError):
        start(deadline=time.monotonic() - 1)
    assert not list((tmp_path / "work").glob("*/metrics.json"))
    found = start()
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/*.json")}
    assert start() == found
    assert {path: path.stat().st_mtime_ns for path in times} == times  # nothing is done twice

    for config, cell in found.items():
        assert cell["method"] == config.method
        assert len(cell["loss_by_epoch"]) == config.epochs
        assert np.all(np.isfinite(cell["loss_by_epoch"]))
        assert cell["top1"] == pytest.approx(np.mean(cell["per_class"]), abs=0.01)
        assert cell["val_top1"] is None
        assert cell["class_counts"][0] == 100
        assert parse(cell["command"].split()[3:]) == dataclasses.replace(config, packed=None)
    by_name = {config.name: cell for config, cell in found.items()}
    sgd = by_name["sgd-ce-s0"]
    assert sgd["ess_by_epoch"] == [1.0] * 5
    assert sgd["loss_by_epoch"][3] < sgd["loss_by_epoch"][0]
    first_stage = sgd["loss_by_epoch"][:4]
    for name in ("absgd-ce-t1-s0", "kl-radius-ce-r1-s0", "meta-ce-s0", "l2rw-ce-s0", "recover-ce-t1-s0", "crt-ce-s0"):
        assert by_name[name]["loss_by_epoch"][:4] == first_stage
    for name in ("absgd-ce-t1-s0", "kl-radius-ce-r1-s0", "l2rw-ce-s0", "recover-ce-t1-s0"):
        assert by_name[name]["ess_by_epoch"][4] < 0.99
        assert by_name[name]["loss_by_epoch"][4] != sgd["loss_by_epoch"][4]
    assert by_name["absgd-one-stage-ce-t1-s0"]["ess_by_epoch"][0] < 0.99
    assert by_name["resample-ce-s0"]["loss_by_epoch"][0] != first_stage[0]
    balanced, adjusted = (by_name[f"sgd-{loss}-s0"] for loss in ("balanced-softmax", "logit-adjustment"))
    assert adjusted["per_class"] == balanced["per_class"]
    assert adjusted["loss_by_epoch"] == balanced["loss_by_epoch"] != sgd["loss_by_epoch"]
    features = np.load(tmp_path / "results" / "sgd-ce-s0-features.npz")
    assert features["features"].shape == (297, 16)
    assert np.bincount(features["labels"], minlength=10).min() > 20


def test_what_runs_have_in_common_is_trained_once():
    paper = CONFIGS["paper"]
    configs = [dataclasses.replace(paper, temperature=t, seed=s) for t in (math.inf, 1.0, 10.0) for s in (0, 1)]
    configs += [dataclasses.replace(paper, loss="cb-ce"), dataclasses.replace(paper, classifier="crt")]
    configs += [dataclasses.replace(paper, temperature=1.0, start=0)]
    configs += [dataclasses.replace(paper, temperature=1.0, start=100)]
    configs += [dataclasses.replace(paper, loss=loss) for loss in ("balanced-softmax", "logit-adjustment")]
    ends = plan.segments(configs)
    assert set(ends) == set(configs)
    for config, end in ends.items():
        parts = list(plan.chain(end))
        assert parts[0].first == 0
        assert parts[-1].until == config.epochs
        assert all(a.until == b.first for a, b in itertools.pairwise(parts))
    every = {segment for end in ends.values() for segment in plan.chain(end)}
    # Both seeds: 160 epochs, and from there 40 for each of SGD, λ = 1, λ = 10; seed 0 also for the class weights. The
    # classifier needs none. λ = 1 from epoch 100 has 100 of its own, from epoch 0 all 200. Two losses are one.
    assert sum(s.until - s.first for s in every) == 2 * 160 + 7 * 40 + 100 + 200 + 200
    for at_most in (1, 3, 64):
        groups = plan.together(ends.values(), lambda s: s.config.classifier, at_most)
        done = {None}
        for group in groups:
            assert len(group) <= at_most
            assert len({(s.first, s.until) for s in group}) == 1
            assert all(s.parent in done for s in group)
            done.update(group)
        assert done == every | {None}


def test_what_an_epoch_costs(packed):
    """The counts of operations are those of the compiler, which leaves out products with the padding's zeros."""
    network = nnx.eval_shape(lambda: ResNet(32, 10, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(network)
    forwards = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, train=False))
    counted = forwards.lower(state, jnp.zeros((1, 32, 32, 3))).cost_analysis()["flops"]
    assert profile.training_flops(CONFIGS["paper"]) / 3 == pytest.approx(counted, rel=0.1)
    image, one, two, three = (pixels * pixels * channels for pixels, channels in ((32, 3), (32, 16), (16, 32), (8, 64)))
    moved = 3 * image + 2 * one + 10 * 5 * one + 3 * one + 2 * two + 9 * 5 * two + 3 * two + 2 * three + 9 * 5 * three
    assert profile.least_bytes(CONFIGS["paper"], 2) == 2 * moved
    measured = profile.profile([dataclasses.replace(SMOKE, packed=packed)])
    assert measured["images_per_epoch"] == 224
    assert 0 < measured["fraction_of_matrix_product"] < 1
    assert 0 < measured["fraction_of_copy"] < 1


def test_the_tables_have_their_cells():
    columns = list(cells.cells(CONFIGS["mini"], "1", "cifar10-st-100", range(3)))
    assert len(columns) == 3 * (6 + 18 + 3)
    assert {c.column for c in columns} == {"cifar10-st-100"}
    tuned = [c for c in cells.cells(CONFIGS["paper"], "1", "cifar100-lt-10", [0]) if c.seed >= cells.TUNING_SEED]
    assert len(tuned) == 18
    assert all(c.validation for c in tuned)
    assert {c.method for c in cells.cells(CONFIGS["mini"], "2", "cifar10-lt-100", [0])} >= {"term", "crt", "kl-radius"}
    noisy = list(cells.cells(CONFIGS["mini"], "noise", "cifar10-lt-1-sym0.4", [0]))
    assert [c.temperature for c in noisy] == [math.inf, -1.0, -2.0, -5.0]
    assert {c.symmetric_noise for c in noisy} == {0.4}
    assert cells.parse_column("cifar100-lt-1-noisy")["human_labels"] == "noisy"
    with pytest.raises(UserError, match="'imagenet-lt-100'"):
        cells.parse_column("imagenet-lt-100")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("adam",)}, "--methods adam: tables"),
        ({"columns": ("cifar10-xx-3",)}, "column 'cifar10-xx-3'"),
        ({"columns": ("cifar10-lt-0.5",)}, "--ratio must be at least 1"),
        ({"seeds": 0}, "--seeds 0"),
    ],
)
def test_wrong_options_exit_with_two(options, message, tmp_path, capsys):
    assert exit_code(lambda: sweep.sweep(sweep.Options(out=tmp_path, work=tmp_path, **options))) == 2
    assert message in capsys.readouterr().err


def test_what_goes_wrong_exits_with_one_and_names_it(packed, tmp_path, capsys, monkeypatch):
    options = sweep.Options(preset="smoke", packed=tmp_path, methods=("sgd",), seeds=1, out=tmp_path, work=tmp_path)
    assert exit_code(lambda: sweep.sweep(options)) == 1
    assert "smoke-cifar10-lt-100.pack is missing" in capsys.readouterr().err

    stale = tmp_path / "smoke" / "cifar10-lt-100" / "sgd-ce-s0.json"
    checkpoint.write_json(stale, {"config": SMOKE.identity() | {"epochs": 7}})
    assert exit_code(lambda: sweep.sweep(dataclasses.replace(options, packed=packed))) == 1
    assert "sgd-ce-s0.json is of a run with other settings (epochs: 7 there, 5 here)" in capsys.readouterr().err
    stale.unlink()

    finished = tmp_path / "smoke" / "cifar10-lt-100" / "sgd-focal-s0.json"
    checkpoint.write_json(finished, {"config": dataclasses.replace(SMOKE, loss="focal").identity()})

    def full(folder, *_):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(checkpoint, "open_manager", full)
    assert exit_code(lambda: sweep.sweep(dataclasses.replace(options, packed=packed))) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert json.loads(finished.read_text())["config"]["loss"] == "focal"


def test_a_search_draws_pairs_that_differ_in_the_weighting_only(tmp_path):
    options = search.Options(recipes=60)
    drawn = list(search.draw(options))
    assert drawn == list(search.draw(options))
    for recipe, sgd, absgd in drawn:
        assert set(recipe) == set(search.FACTORS)
        assert sgd.weighting == "sgd"
        assert absgd.weighting in ("absgd", "absgd-one-stage", "kl-radius")
        differing = {f.name for f in dataclasses.fields(sgd) if getattr(sgd, f.name) != getattr(absgd, f.name)}
        assert differing <= {"temperature", "kl_radius", "gamma", "start"}
        assert sgd.validation == absgd.validation == 0.1
    levels = {(factor, level) for recipe, *_ in drawn for factor, level in recipe.items()}
    assert len(levels) == sum(map(len, search.FACTORS.values()))
    search.figure({"recipes": [{"recipe": recipe, "gain": 1.0} for recipe, *_ in drawn]}, tmp_path / "search.png")
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")


def test_a_search_runs_the_best_of_either_method_again(tmp_path, monkeypatch):
    def run(paths, *_):
        # λ = 2 is best, and label smoothing for both; a later seed is a point better
        return {
            c: {
                "val_top1": (c.temperature == 2) + 0.5 * (c.label_smoothing > 0) + c.seed - cells.TUNING_SEED,
                "command": "", "ess_by_epoch": [1.0], "hardware": "", "versions": {},
            }
            for c in paths
        }  # fmt: skip

    monkeypatch.setattr(search, "run", run)
    found = search.search(search.Options(recipes=300, finalists=2, seeds=3), search.Console())
    assert [f["weighting"] for f in found["finalists"]] == ["absgd"] * 2 + ["sgd"] * 2
    assert [f["val_top1"] for f in found["finalists"]] == [[1.5, 2.5, 3.5]] * 2 + [[0.5, 1.5, 2.5]] * 2
    assert "--temperature 2.0" in found["finalists"][0]["command"]
    assert "--label-smoothing 0.1" in found["finalists"][0]["command"]
    assert len(found["recipes"]) == 300
    assert max(recipe["gain"] for recipe in found["recipes"]) == 1.0
    search.figure(found, tmp_path / "search.png")
