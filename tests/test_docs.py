"""Every Python block of the README and the guides runs, every file they link to exists, every command is a target."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROSE = [
    *PAGES,
    ROOT / "CONTRIBUTING.md",
    *sorted(page for folder in ("benchmarks", "examples") for page in (ROOT / folder).rglob("*.md")),
]


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text()], ids=name_of)
def test_python_blocks_run_in_order(page):
    namespace = {}
    for match in re.finditer(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        line = page.read_text()[: match.start()].count("\n") + 1
        exec(compile("\n" * line + match.group(1), name_of(page), "exec"), namespace)


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not re.match(r"https?:", target):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in re.findall(r"^make ([a-z -]+?)(?:\s{2,}|$)|`make ([a-z-]+)`", page.read_text(), re.MULTILINE):
        assert set(" ".join(command).split()) <= targets
