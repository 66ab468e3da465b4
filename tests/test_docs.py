"""Every Python block of the README and the guides runs, every tutorial runs in small, every link leads somewhere."""

import inspect
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import absgd_jax
from tests.test_api import PUBLIC

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
PROSE = [
    *PAGES,
    *TUTORIALS,
    ROOT / "CONTRIBUTING.md",
    *sorted(page for folder in ("benchmarks", "examples") for page in (ROOT / folder).rglob("*.md")),
]
SMALLER = {  # `make docs` runs the tutorials as they are
    "long_tail": [("batches=100", "batches=10"), ("range(100, 103)", "range(100, 101)"), ("range(5)", "range(2)")],
    "noisy_labels": [
        ("passes, batch_size = 0.4, 20, 32", "passes, batch_size = 0.4, 2, 128"),
        ("seeds = np.arange(3)", "seeds = np.arange(1)"),
    ],
    "own_rule": [("steps=300", "steps=20"), ("range(5)", "range(2)")],
}


def name_of(path):
    return str(path.relative_to(ROOT))


def blocks(text, opening):
    """The code of every fence with this opening, each with the number of lines before it."""
    for match in re.finditer(rf"^```{opening}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield text[: match.start()].count("\n") + 1, re.sub(r"\A:tags:", "# tags:", match.group(1))


def run(page, text, opening):
    namespace = {}
    for line, code in blocks(text, opening):
        exec(compile("\n" * line + code, name_of(page), "exec"), namespace)


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=name_of)
def test_python_blocks_run_in_order(page):
    run(page, page.read_text(), "python")


@pytest.mark.parametrize("page", TUTORIALS, ids=name_of)
def test_tutorials_run_in_small(page, monkeypatch):
    monkeypatch.setattr(plt, "rcParams", plt.rcParams.copy())
    text = page.read_text()
    for old, new in SMALLER[page.stem]:
        assert old in text, old
        text = text.replace(old, new)
    # Hidden cells hold the claims of the prose, which are about the tutorial as it is.
    text = re.sub(r"^```\{code-cell\}\n:tags: \[remove-cell\].*?^```\n", "", text, flags=re.DOTALL | re.MULTILINE)
    plt.switch_backend("Agg")
    try:
        run(page, text, r"\{code-cell\}")
    finally:
        plt.close("all")


@pytest.mark.parametrize("page", [*PAGES[1:], *TUTORIALS], ids=name_of)
def test_lines_of_code_are_not_wider_than_the_page(page):
    for line, code in blocks(page.read_text(), r"(?:python|\{code-cell\})"):
        for i, text in enumerate(code.splitlines(), line + 1):
            assert len(text) <= 92, f"{page.name}:{i}"


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"https?:", target):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in re.findall(r"^make ([a-z -]+?)(?:\s{2,}|$)|`make ([a-z-]+)`", page.read_text(), re.MULTILINE):
        assert set(" ".join(command).split()) <= targets


def test_every_public_name_is_on_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text()
    documented = set(re.findall(r"^\.\. auto(?:function|class):: (\w+)$", page, re.MULTILINE))
    assert documented == PUBLIC - {"losses"}
    assert ".. automodule:: absgd_jax.losses\n   :members:" in page
    # autodoc takes what has a docstring
    members = [f for f in vars(absgd_jax.losses).values() if getattr(f, "__module__", "") == "absgd_jax.losses"]
    assert all(inspect.getdoc(f) for f in members if not f.__name__.startswith("_"))


def test_what_a_step_costs_is_what_the_benchmark_says():
    page = " ".join((ROOT / "docs" / "devices.md").read_text().split())  # wherever its lines break
    said = re.search(
        r"was ([\d.]+) times SGD's with a ResNet-32 and a transformer, and ([\d.]+) times with a small MLP", page
    )
    records = json.loads((ROOT / "benchmarks" / "results" / "step_cost.json").read_text())
    ours = {record["model"]: record for record in records if record["method"] == "ABSGD"}
    ratios = {model: f"{record['time_ratio']:.2f}" for model, record in ours.items()}
    assert ratios == {"ResNet-32": said[1], "transformer": said[1], "MLP": said[2]}
    counts = {(r["collectives"], r["collectives_before_backward"], r["extra_state_bytes"]) for r in ours.values()}
    assert counts == {(2, 1, 20)}
