"""Records in JSON and the tables drawn from them."""

import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from benchmarks import report
from benchmarks.harness import records
from examples import style
from examples.lab.errors import UserError


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Results go to a folder of the test, figures are what can be written as text."""
    monkeypatch.setattr(style, "save", lambda figure, path: path.write_text(str(figure)))
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["main", "--sizes", "1", "--name", "two words"])
    return tmp_path / "results"


def test_records_come_back_with_what_they_depend_on(folder):
    path = records.write("speed", [{"λ": 0.1, "value": None}, {"λ": 2, "value": [1, 2.5]}])
    assert path == folder / "speed.json"
    assert len(path.read_text().splitlines()) == 4  # a record a line, and the brackets
    first, second = records.read("speed")
    assert (first["λ"], first["value"], second["value"]) == (0.1, None, [1, 2.5])
    for record in (first, second):
        assert record["command"] == "python -m benchmarks.speed --sizes 1 --name 'two words'"
        assert record["versions"]["jax"] == jax.__version__
        assert "CPU" in record["hardware"]


@pytest.mark.usefixtures("benchmark")
def test_results_of_an_accelerator_stand_beside_those_of_the_cpu(folder, monkeypatch):
    before = records.write("speed", [{"value": 1}]).read_text()
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    records.publish("speed", lambda: [{"value": 2}] * 3, lambda rows: "", len)
    assert (folder / "speed.json").read_text() == before
    assert len(records.read("speed-tpu")) == 3
    text = report.section("speed")
    assert text.index("![speed](results/speed.png)") < text.index("#### On ") < text.index("table of 3")
    assert text.index("table of 3") < text.index("![speed-tpu](results/speed-tpu.png)")
    assert (folder / "speed-tpu.png").read_text() == "3"


def test_there_are_no_records_of_what_was_not_run():
    assert records.read("speed") == []


def test_a_number_that_is_none_is_refused_and_the_last_results_stay(folder):
    before = records.write("speed", [{"value": 1.0}]).read_text()
    with pytest.raises(ValueError, match="JSON"):
        records.write("speed", [{"value": 2.0}, {"value": float("nan")}])
    assert (folder / "speed.json").read_text() == before


def test_table():
    assert records.table([{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]) == (
        "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |"
    )


def test_publish_draws_from_the_file(folder, capsys):
    records.publish(
        "speed",
        lambda: [{"pair": (1, 2)}],
        lambda rows: f"table of {rows[0]['pair']}",  # a list: JSON has no tuples
        lambda rows: rows[0]["pair"],
    )
    assert (folder / "speed.png").read_text() == "[1, 2]"
    assert "table of [1, 2]" in capsys.readouterr().out


def test_what_the_user_can_mend_is_said_without_a_traceback(folder):
    def measure():
        raise UserError("data has no such file")

    with pytest.raises(SystemExit, match="data has no such file"):
        records.publish("speed", measure, str, len)
    assert not folder.exists()


@pytest.fixture
def benchmark(monkeypatch):
    module = SimpleNamespace(
        __doc__="How fast? On two.\n\nMore.",
        markdown=lambda rows: f"table of {len(rows)}",
        figure=len,
    )
    monkeypatch.setitem(sys.modules, "benchmarks.speed", module)


@pytest.mark.usefixtures("benchmark")
def test_section(folder):
    assert report.section("speed") == "### speed\n\nNot run: `python -m benchmarks.speed`."
    records.write("speed", [{"value": 1}, {"value": 2}])
    title, question, table, plot, source = report.section("speed").split("\n\n")
    assert (title, question, table, plot) == ("### How fast?", "On two.", "table of 2", "![speed](results/speed.png)")
    assert (folder / "speed.png").read_text() == "2"
    assert source.startswith("`python -m benchmarks.speed --sizes 1 --name 'two words'` on ")
    assert f"jax {jax.__version__}" in source


def test_every_benchmark_is_in_the_report():
    files = Path(report.__file__).parent.glob("*.py")
    assert set(report.names()) == {path.stem for path in files if "publish(" in path.read_text()}


def test_the_readme_has_a_place_for_the_report():
    text = report.README.read_text()
    assert text.index("<!-- generated -->") < text.index("<!-- /generated -->")
