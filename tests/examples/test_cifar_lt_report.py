"""The report: what it chooses, computes, draws, and says about bad input, from cells made up here."""

import json
import subprocess
import sys
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from examples.cifar_lt import report
from examples.cifar_lt.errors import UserError
from examples.cifar_lt.report import against, choose, expected, groups, load, markdown, rows, table

COLUMN = "cifar10-lt-100"
COUNTS = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def cell(method="sgd", loss="ce", strength: Any = "inf", seed=0, top1: Any = 70.0, val: Any = None, **more):
    rng = np.random.default_rng(seed)
    ramp, epochs = np.linspace(20, -20, len(COUNTS)), np.arange(1, 11)
    per_class = (top1 or 50) + ramp + rng.normal(0, 1, len(COUNTS))
    floor = 0.6 if method == "sgd" else 0.5
    return {
        "preset": "paper", "column": COLUMN, "method": method, "loss": loss, "temperature": strength,
        "kl_radius": None, "gamma": 0.9, "seed": seed, "epochs": 10, "second_stage": 8, "top1": top1, "val_top1": val,
        "per_class": per_class.tolist(), "head": per_class[:5].mean(), "tail": per_class[5:].mean(),
        "many": per_class[:8].mean(), "medium": per_class[8:].mean(), "class_counts": COUNTS,
        "ess_by_epoch": [1.0] * 8 + [0.5, 0.4], "loss_by_epoch": [*(2 / epochs + floor)],
        "temperature_by_epoch": ["inf"] * 8 + [strength] * 2, "top1_by_epoch": [[e, 40 + 3.0 * e] for e in (5, 10)],
        "seconds": 100.0, "compile_seconds": 5.0, "hardware": "2 CPU cores", "versions": {"jax": "0.8.2"},
        "command": "", "config": {"validation": 0.0, "ratio": 100.0}, **more,
    }  # fmt: skip


def write(folder, cells, column=COLUMN):
    """Writes the cells under names that the report need not understand, and returns their paths."""
    (folder / column).mkdir(parents=True, exist_ok=True)
    paths = [folder / column / f"{c['method']}-{c['loss']}-{i}-s{c['seed']}.json" for i, c in enumerate(cells)]
    for path, content in zip(paths, cells, strict=True):
        path.write_text(json.dumps(content))
    return paths


SGD = [70.1, 70.9, 69.8]
ABSGD = {0.1: [60.0, 61.0, 62.0], 1.0: [72.0, 73.5, 72.9], 10.0: [73.4, 73.6, 73.9]}


def study(val=True):
    """SGD and three temperatures, of which validation prefers λ = 1 and the test λ = 10."""
    means = {0.1: 61.0, 1.0: 74.0, 10.0: 73.0}
    cells = [cell(seed=s, top1=t) for s, t in enumerate(SGD)]
    for strength, tops in ABSGD.items():
        cells += [
            cell("absgd", "ce", strength, s, t, means[strength] + (s - 1) if val else None) for s, t in enumerate(tops)
        ]
    return cells


def text_of(cells, method="absgd", column=COLUMN):
    return [text for text in table(column, rows(cells)) if text["method"] == report.METHODS[method]]


def test_the_strength_is_chosen_by_validation():
    (text,) = text_of(study())
    assert text["λ or ρ"] == "λ = 1"
    assert text["best λ on test (not to be trusted)"].startswith("λ = 10: 73.63 ± ")
    assert text["seeds"] == "3"


def test_tuning_runs_serve_the_choice_alone():
    tuning = [cell("absgd", "ce", t, 1000, None, v) for t, v in ((0.1, 60.0), (1.0, 74.0), (10.0, 73.0))]
    tuning += [cell("absgd", "ce", 10.0, 1001, 99.0, 74.5)]  # on average still below λ = 1
    tested = [c for c in study(val=False) if c["temperature"] in ("inf", 1.0)]
    assert choose([c for c in tested + tuning if c["method"] == "absgd"]) == ("λ", 1.0)
    (text,) = text_of(tested + tuning)
    assert (text["λ or ρ"], text["seeds"]) == ("λ = 1", "3")
    assert text["best λ on test (not to be trusted)"] == "–"  # one strength only was tested
    assert "λ = 0.1: 60.00 (1), λ = 1: 74.00 (1), λ = 10: 73.75 (2)" in markdown(COLUMN, tested + tuning)


def test_a_chosen_strength_without_a_test_is_not_run():
    cells = [c for c in study() if c["temperature"] != 1.0]
    cells += [cell("absgd", "ce", 1.0, 1000, None, 99.0)]
    assert text_of(cells) == []
    assert "ABSGD (ce)" in markdown(COLUMN, cells).split("Not run: ")[1]


def test_without_validation_nothing_is_chosen():
    texts = text_of(study(val=False))
    assert [t["λ or ρ"] for t in texts] == [f"λ = {s} (not chosen)" for s in ("0.1", "1", "10")]


def test_radii_and_temperatures_are_told_apart():
    cells = study() + [cell("kl-radius", "ce", "inf", 0, 73.0, v, kl_radius=r) for r, v in ((0.3, 70.0), (2.0, 75.0))]
    (text,) = text_of(cells, "kl-radius")
    assert text["λ or ρ"] == "ρ = 2"
    assert text["gain over SGD"] == "+2.90"


def test_mean_deviation_and_paired_gain():
    (text,) = text_of(study())
    ours, gain = np.array(ABSGD[1.0]), np.array(ABSGD[1.0]) - np.array(SGD)
    assert text["top-1"] == f"{ours.mean():.2f} ± {ours.std(ddof=1):.2f}"
    assert text["gain over SGD"] == f"{gain.mean():+.2f} ± {gain.std(ddof=1):.2f}"
    means = [np.mean([c[k] for c in study() if c["temperature"] == 1.0]) for k in ("head", "tail")]
    assert text["head / tail"] == f"{means[0]:.1f} / {means[1]:.1f}"
    assert text["effective sample size at the end"] == "40%"


def test_gains_pair_the_seeds_not_the_order():
    (text,) = text_of(study()[1:][::-1])  # SGD's seed 0 is missing
    gain = np.array(ABSGD[1.0][1:]) - np.array(SGD[1:])
    assert text["gain over SGD"] == f"{gain.mean():+.2f} ± {gain.std(ddof=1):.2f} (2 pairs)"
    other_loss = [*study(), cell("absgd", "focal", 1.0, 0, 80.0)]
    assert text_of(other_loss)[1]["gain over SGD"] == "–"


def test_against_the_paper():
    values = np.array(ABSGD[1.0])
    error = values.std(ddof=1) / np.sqrt(len(values))
    for reference, within in ((values.mean() + 1.99 * error, True), (values.mean() - 2.01 * error, False)):
        assert against(values.tolist(), reference) == (pytest.approx(values.mean() - reference), within)
    assert against([70.0], 71.0) == (-1.0, None)
    (text,) = text_of(study())
    assert (text["paper"], text["ours − paper"]) == ("73.10", f"{values.mean() - 73.1:+.2f}")
    assert text["within 2 standard errors of our mean"] == ("yes" if abs(values.mean() - 73.1) <= 2 * error else "no")


def test_other_presets_are_not_compared_with_the_paper():
    (text,) = text_of([c | {"preset": "mini"} for c in study()])
    assert text["paper"] == "73.10"
    assert not any("2 standard errors" in heading or "ours" in heading for heading in text)


def test_paper_numbers_are_those_known():
    numbers = {key: entry["top1"] for key, entry in report.PAPER[COLUMN].items()}
    assert numbers == {"sgd/ce": 70.46, "absgd/ce": 73.10, "sgd/cb-ce": 72.37, "absgd/cb-ce": 79.48}
    assert set(report.PAPER) == {COLUMN, report.PACKAGE}
    assert "| ABSGD | ce | λ = 0.1 | NaN |" in markdown(COLUMN, study())


def test_what_is_missing_is_not_run():
    text = markdown(COLUMN, study()).split("Not run: ")[1].split(".\n")[0].split("), ")
    assert len(text) == len(expected("paper", COLUMN)) - 2
    assert "TERM (ce" in text
    assert "META (ldam" in text
    assert ("sgd", "logit-adjustment") in expected("paper", COLUMN)
    assert len(expected("paper", COLUMN)) == len(set(expected("paper", COLUMN))) == 33
    assert expected("paper", COLUMN)[:3] == [("sgd", "ce"), ("absgd", "ce"), ("kl-radius", "ce")]


def test_columns_with_wrong_labels_expect_less():
    assert (
        expected("paper", "cifar10-lt-1-sym0.4")
        == expected("mini", "cifar100-lt-1-noisy")
        == [("sgd", "ce"), ("absgd", "ce")]
    )
    cells = [c | {"column": "cifar10-lt-1-sym0.4"} for c in study()]
    assert "Not run" not in markdown("cifar10-lt-1-sym0.4", cells)


def test_a_family_that_was_only_tuned_without_validation_is_not_run():
    cells = [*study(), *(cell("absgd", "focal", t, 1000) for t in (0.1, 1.0))]
    assert "ABSGD (focal)" in markdown(COLUMN, cells).split("Not run: ")[1]


def test_the_groups_of_the_table():
    def of(*present, ratio=100.0):
        return groups([{"config": {"ratio": ratio}} | dict.fromkeys(present, 1)])

    assert of("many", "medium", "few", "head", "tail") == ["many", "medium", "few"]
    assert of("many", "medium", "head", "tail") == ["head", "tail"]
    assert of("many", "medium") == ["many", "medium"]
    assert of("many", "head", "tail", ratio=1.0) == []


def test_balanced_classes_have_no_groups():
    name = "cifar10-lt-1-sym0.4"
    cells = [c | {"column": name, "config": {"validation": 0.1, "ratio": 1.0}} for c in study()]
    headings = list(table(name, rows(cells))[0])
    assert headings[2:5] == ["λ or ρ", "top-1", "gain over SGD"]
    shown = report.terminal(name, table(name, rows(cells)))
    assert [c.header for c in shown.columns] == ["method", "λ or ρ", "top-1", "gain over SGD", "seeds"]


def test_the_command_writes_tables_figures_and_the_readme(tmp_path, capsys):
    folder = tmp_path / "results" / "mini"
    cells = [c | {"preset": "mini"} for c in study()]
    cells += [cell(m, "ce", "inf", s, 71.0 + s, preset="mini") for m in ("meta", "crt", "ncm") for s in range(2)]
    cells += [cell(m, "ce", 1.0, 0, 71.0, preset="mini") for m in ("absgd-no-momentum", "absgd-one-stage")]
    for path, content in zip(write(folder, cells), cells, strict=True):
        if content["seed"] == 0 and content["method"] in ("sgd", "absgd"):
            rng = np.random.default_rng(0)
            labels = rng.integers(0, 10, 60)
            features = rng.normal(size=(60, 4)) + labels[:, None]
            np.savez(path.with_name(path.stem + "-features.npz"), features=features, labels=labels)
    write(folder, [c | {"column": "cifar10-st-100"} for c in cells[:6]], "cifar10-st-100")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- generated -->\nold\n<!-- /generated -->\nafter\n")

    report.report([folder], package=tmp_path)
    for name in ("per_class", "curves", "gains", "tsne"):
        assert (folder / COLUMN / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "cifar10-st-100" / "tsne.png").exists()
    filled, written = readme.read_text(), (folder / COLUMN / "table.md").read_text()
    assert filled.startswith("before\n")
    assert filled.endswith("after\n")
    assert "old" not in filled
    assert "### mini: cifar10-st-100" in filled
    assert f"[t-SNE of the features](results/mini/{COLUMN}/tsne.png)" in filled
    assert filled.count("Top-1: test accuracy") == written.count("Top-1: test accuracy") == 1
    table_lines = [line.count("|") for line in written.split("\n\n")[1].splitlines()]
    assert len(set(table_lines)) == 1
    assert "ABSGD" in capsys.readouterr().out


def test_a_broken_cell_is_named_and_the_others_are_shown(tmp_path, capsys):
    paths = write(tmp_path, study())
    paths[0].write_text("{")
    paths[1].write_text("[]")
    paths[2].write_text(json.dumps(cell(column="cifar100-lt-100")))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- generated -->\nold\n<!-- /generated -->\n")
    with pytest.raises(UserError) as caught:
        report.report([tmp_path], package=tmp_path)
    assert all(path.name in str(caught.value) for path in paths[:3])
    assert "ABSGD" in capsys.readouterr().out
    assert (tmp_path / COLUMN / "table.md").exists()
    assert "old" in readme.read_text()  # half of the results must not pass for all of them


def test_broken_features_are_named(tmp_path):
    for path in write(tmp_path, [cell(), cell("absgd", "ce", 1.0)]):
        path.with_name(path.stem + "-features.npz").write_text("nonsense")
    with pytest.raises(UserError, match=r"features\.npz cannot be read"):
        report.report([tmp_path])
    assert (tmp_path / COLUMN / "curves.png").exists()


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="There is no folder"):
        report.report([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="holds no results"):
        report.report([tmp_path])
    write(tmp_path, [cell()])[0].write_text("{")
    with pytest.raises(UserError, match=r"sgd-ce-0-s0\.json cannot be read"):
        load(tmp_path)
    for arguments, code in (([], 2), ([str(tmp_path)], 1)):
        command = [sys.executable, "-m", "examples.cifar_lt.report", *arguments]
        assert subprocess.run(command, capture_output=True, timeout=60).returncode == code


def test_the_table_has_every_family_once():
    cells = [cell(m, loss, "inf", s, 70.0) for m, loss in expected("paper", COLUMN) for s in range(2)] + [
        cell("new", "ce", 3.0)
    ]
    seen = defaultdict(int)
    for row in rows(cells):
        seen[row.method, row.loss] += 1
    assert list(seen) == [*expected("paper", COLUMN), ("new", "ce")]
    assert set(seen.values()) == {1}
    assert "Not run" not in markdown(COLUMN, cells)


def test_resampled_runs_are_compared_with_resampled_runs():
    assert expected("best", COLUMN) == [("resample", "ce"), ("resample-absgd", "ce")]
    cells = [cell("resample", "ce", "inf", s, 80.0 + s, preset="best") for s in range(2)]
    cells += [cell("resample-absgd", "ce", 10.0, s, 81.5 + s, preset="best") for s in range(2)]
    cells += [cell("sgd", "ce", "inf", s, 70.0, preset="best") for s in range(2)]
    gains = {row.method: row.gains for row in rows(cells)}
    assert gains == {"resample": [10.0, 11.0], "resample-absgd": [1.5, 1.5], "sgd": []}
