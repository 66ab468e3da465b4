"""Puts generated tables into READMEs, so that no number there is typed by hand."""

from pathlib import Path

BEGIN, END = "<!-- generated -->\n", "<!-- /generated -->"


def fill(readme: Path, text: str) -> None:
    """Replaces what stands between the two marks."""
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + BEGIN + "\n" + text.strip() + "\n\n" + END + after)
