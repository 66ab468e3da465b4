"""Tables: Adult's official files, scikit-learn's datasets, and a sweep end to end."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from examples.lab import cli, records
from examples.lab.errors import UserError
from examples.tabular.experiment import EXPERIMENT, make_run
from examples.tabular.task import COLUMNS, Tabular, adult

ROW = (
    "39, {work}, 77516, Bachelors, 13, Never-married, Sales, Husband, White, {sex}, {gain}, 0, 40, {country}, {income}"
)


def write(folder, train, test):
    folder.mkdir(exist_ok=True)
    (folder / "adult.data").write_text("\n".join(train) + "\n\n")
    (folder / "adult.test").write_text("|1x3 Cross validator\n" + "\n".join(f"{row}." for row in test) + "\n\n")


def row(work="Private", sex="Male", gain=0, country="Cuba", income="<=50K"):
    return ROW.format(work=work, sex=sex, gain=gain, country=country, income=income)


def test_adult_s_files(tmp_path):
    write(tmp_path, [row(), row(work="?", gain=7, income=">50K")], [row(sex="Female", income=">50K")])
    train, test = adult(tmp_path)
    # Six numbers; of the eight categories these have two values, and the others one.
    assert train.inputs.shape == (2, 6 + 2 + 2 + 6)
    assert test.inputs.shape == (1, 16)
    np.testing.assert_array_equal(train.labels, [False, True])
    np.testing.assert_array_equal(test.labels, [True])
    np.testing.assert_array_equal(train.inputs[:, 3], [0, 7])  # capital-gain is the fourth number
    np.testing.assert_array_equal(np.abs(train.inputs[1] - train.inputs[0])[6:].sum(), 2)  # another workclass
    np.testing.assert_array_equal(np.abs(test.inputs[0] - train.inputs[0])[6:].sum(), 2)  # another sex
    assert len(COLUMNS) == 15


@pytest.mark.parametrize("text", [None, "", "1, 2\n", row(income="rich"), row(work="")])
def test_other_files_are_refused(text, tmp_path):
    write(tmp_path, [row()], [row()])
    path = tmp_path / "adult.data"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=r"adult\.data.*archive\.ics\.uci\.edu"):
        adult(tmp_path)


def test_shipped_tables_are_split_and_scaled(tmp_path):
    data = Tabular(dataset="digits", validation=0.1).load(tmp_path)
    assert [len(part.labels) for part in (data.train, data.validation, data.test)] == [1131, 126, 540]
    np.testing.assert_allclose(data.train.inputs.mean(axis=0), 0, atol=1e-5)
    assert data.train.inputs.dtype == np.float32
    np.testing.assert_allclose(np.bincount(data.test.labels), 54, atol=2)
    other = Tabular(dataset="digits", subset_seed=1).load(tmp_path)
    assert not np.array_equal(other.test.labels, data.test.labels)


def test_wrong_labels_are_those_of_training(tmp_path):
    clean, noisy = (Tabular(dataset=f"breast-cancer{noise}").load(tmp_path) for noise in ("", "-sym0.4"))
    for part in ("train", "test"):
        np.testing.assert_array_equal(getattr(noisy, part).inputs, getattr(clean, part).inputs)
    np.testing.assert_array_equal(noisy.test.labels, clean.test.labels)
    np.testing.assert_array_equal(noisy.clean, clean.train.labels)
    assert np.count_nonzero(noisy.train.labels != clean.train.labels) == round(0.4 * 398)


@pytest.mark.parametrize("rate", [0, 0.4])
def test_labels_to_choose_by_are_as_wrong(rate, tmp_path):
    data = Tabular(dataset=f"breast-cancer-sym{rate}" if rate else "breast-cancer", validation=0.3).load(tmp_path)
    judge = LogisticRegression().fit(data.train.inputs, data.clean)  # right for 97 % of the rows
    assert np.mean(data.train.labels != data.clean) == pytest.approx(rate, abs=0.06)
    assert np.mean(judge.predict(data.validation.inputs) != data.validation.labels) == pytest.approx(rate, abs=0.1)


@pytest.mark.parametrize("dataset", ["digits", "digits-sym0.4"])
def test_rows_are_runs_of_their_own(dataset):
    rows = EXPERIMENT.recipes("small", dataset)
    assert len({EXPERIMENT.name_of(row) for row in rows}) == len({make_run(row) for row in rows}) == len(rows)


def test_one_run_end_to_end_and_bad_options(tmp_path, capsys):
    options = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    bounded = ["--method", "absgd", "--temperature", "1", "--max-weight", "3"]
    assert cli.main(EXPERIMENT, ["train", "--preset", "small", *bounded, "--epochs", "10", *options]) == 0
    record = records.read(tmp_path / "out/small/digits/bounded-absgd-ce-t1-c3-epochs10-s0.json")
    assert record["accuracy"] > 85
    assert 1 < max(weight for _, weight in record["by_epoch"]["largest_weight"]) <= 3.1
    for bad in ("iris", "adult-sym1.5", "adult-sym", "adult-asym0.2"):
        assert cli.main(EXPERIMENT, ["train", "--dataset", bad, *options]) == 2
        assert f"--dataset {bad}: choose from adult" in capsys.readouterr().err
    for option in ("--epochs", "--rate", "--batch-size"):
        assert cli.main(EXPERIMENT, ["train", option, "0", *options]) == 2
    for command in (["train", *options], ["profile"]):
        assert cli.main(EXPERIMENT, [*command, "--preset", "small", "--method", "meta"]) == 2
        assert "Meta needs held-out examples" in capsys.readouterr().err
    assert cli.main(EXPERIMENT, ["train", "--preset", "small", "--validation", "0.001", *options]) == 2
    assert "--validation 0.001 of 1257 rows" in capsys.readouterr().err
    assert cli.main(EXPERIMENT, ["train", "--data-dir", str(tmp_path), *options]) == 1
    write(tmp_path / "adult", [row()], [row()])
    assert cli.main(EXPERIMENT, ["train", "--data-dir", str(tmp_path), *options]) == 1
    assert "lacks some categories" in capsys.readouterr().err
