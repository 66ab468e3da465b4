"""What the README says of gains is what the committed records say."""

import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from examples import gains

EXAMPLES = Path(gains.__file__).parent


@pytest.fixture(scope="module")
def collected():
    return gains.collect(EXAMPLES)


def test_a_gain_is_over_sgd_with_the_same_loss_and_seed(collected):
    folder = EXAMPLES / "imdb" / "results" / "fast" / "imdb-10"
    accuracy = {path.name: json.loads(path.read_text())["accuracy"] for path in folder.glob("*.json")}
    runs = [(name, name.split("-")[-1]) for name in accuracy if name.startswith("bounded-absgd-cb-ce-t0.5-c3-s")]
    expected = [accuracy[name] - accuracy[f"sgd-cb-ce-{seed}"] for name, seed in runs if seed != "s1000.json"]
    [row] = collected.query("dataset == 'imdb-10' and loss == 'cb-ce' and method == 'bounded-absgd'").itertuples()
    assert len(expected) > 1
    np.testing.assert_allclose(sorted(row.gains), sorted(expected))


def test_the_readme_has_the_table(collected):
    readme = (EXAMPLES.parent / "README.md").read_text()
    assert gains.table(collected) in readme
    [row] = collected.query("dataset == 'cifar10-lt-1-sym0.4' and method == 'absgd'").itertuples()
    spread = f"{statistics.mean(row.gains):+.2f} ± {statistics.stdev(row.gains):.2f}"
    [line] = [line for line in readme.splitlines() if re.match(r"\| 40 % symmetric noise +\|", line)]
    assert spread in line


def test_what_does_not_fit_is_written_at_the_edge(collected):
    figure = gains.figure(collected)
    [axis] = figure.axes
    means = [float(np.mean(row.gains)) for row in collected.itertuples() if row.method not in gains.BASELINES]
    beyond = [mean for mean in means if abs(mean) > gains.WIDEST]
    assert len(axis.containers) == len(means) - len(beyond)
    assert sorted(text.get_text().strip("◂▸ ") for text in axis.texts) == sorted(f"{mean:+.0f}" for mean in beyond)
