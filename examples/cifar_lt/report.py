"""Tables and figures of results, drawn from its cells (one JSON a run) alone.

python -m examples.cifar_lt.report examples/cifar_lt/results/mini examples/cifar_lt/results/best

Writes table.md and PNGs beside the cells of each column. For results inside this package it also fills the README.
"""

import dataclasses
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from examples.cifar_lt import figures
from examples.cifar_lt.cells import TUNING_SEED, cells as configs_of
from examples.cifar_lt.config import LOSSES, Preset
from examples.cifar_lt.configs import CONFIGS
from examples.cifar_lt.errors import UsageError, UserError, exit_code
from examples.readme import BEGIN, fill

HERE = Path(__file__).parent
PAPER: dict[str, Any] = json.loads((HERE / "paper.json").read_text(encoding="utf-8"))
PACKAGE = "published package, one seed, PyTorch"

METHODS = {
    "sgd": "SGD", "absgd": "ABSGD", "kl-radius": "ABSGD, KL radius", "adaptive-gamma": "ABSGD, adaptive γ",
    "term": "TERM", "recover": "RECOVER", "meta": "META", "l2rw": "L2RW", "resample": "Resampling",
    "ncm": "NCM", "crt": "cRT", "tau-norm": "τ-norm", "lws": "LWS", "sgd-no-momentum": "SGD, no momentum",
    "absgd-no-momentum": "ABSGD, no momentum", "absgd-one-stage": "ABSGD, one stage",
    "resample-absgd": "Resampling, ABSGD",
}  # fmt: skip
NEEDED = {
    *("preset", "column", "method", "loss", "temperature", "kl_radius", "seed", "second_stage", "top1", "val_top1"),
    *("per_class", "class_counts", "ess_by_epoch", "loss_by_epoch", "top1_by_epoch", "seconds", "compile_seconds"),
    *("hardware", "versions", "config"),
}

Cell = dict[str, Any]


class Strength(NamedTuple):
    """A finite temperature λ or a radius ρ; neither for a method that has none."""

    symbol: str = ""
    value: float = 0.0

    def __str__(self):
        return f"{self.symbol} = {self.value:g}" if self.symbol else "–"


class Row(NamedTuple):
    """The tested cells of a method, a loss and a strength. There are none where it was not run."""

    method: str
    loss: str
    strength: Strength
    chosen: bool | None  # None: there was nothing to choose by
    cells: list[Cell]
    gains: list[float]  # over SGD with the same loss and batches, seed by seed

    @property
    def name(self) -> str:
        return METHODS.get(self.method, self.method)

    @property
    def top1(self) -> list[float]:
        return [cell["top1"] for cell in self.cells]


def load(folder: Path) -> tuple[dict[str, list[Cell]], list[str]]:
    """The cells of each column, and a sentence about each file that is not one."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    columns, problems = defaultdict(list), []
    for path in sorted(folder.glob("*/*.json")):
        try:
            cell = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            problems.append(f"{path} cannot be read: {error}.")
            continue
        if missing := NEEDED - set(cell if isinstance(cell, dict) else ()):
            problems.append(f"{path} is not a result: it lacks {', '.join(sorted(missing))}.")
        elif cell["column"] != path.parent.name:
            problems.append(f"{path} is a result of {cell['column']}, not of {path.parent.name}.")
        else:
            columns[path.parent.name].append(cell | {"path": path})
    if not columns:
        raise UserError("\n".join([*problems, f"{folder} holds no results: they are in <column>/<method>-….json."]))
    return dict(columns), problems


def strength(cell: Cell) -> Strength:
    if cell["kl_radius"] is not None:
        return Strength("ρ", float(cell["kl_radius"]))
    return Strength() if cell["temperature"] in (None, "inf", "-inf") else Strength("λ", cell["temperature"])


def is_tested(cell: Cell) -> bool:
    return cell["seed"] < TUNING_SEED and cell["top1"] is not None


def validation(family: Iterable[Cell]) -> dict[Strength, list[float]]:
    """Validation accuracies of each strength, where there are any."""
    scores = defaultdict(list)
    for cell in sorted(family, key=strength):
        if cell["val_top1"] is not None:
            scores[strength(cell)].append(cell["val_top1"])
    return dict(scores)


def choose(family: Sequence[Cell]) -> Strength | None:
    """The strength with the highest mean validation accuracy. None where several were run without validation."""
    strengths, scores = {strength(cell) for cell in family}, validation(family)
    if len(strengths) == 1:
        return strengths.pop()
    return max(scores, key=lambda s: np.mean(scores[s])) if scores else None


def expected(preset: Preset, column: str) -> list[tuple[str, str]]:
    """The methods and losses of a column's tables, a loss after the other."""
    tables = ("1", "2") if re.search(r"-(lt|st)-[0-9.]+$", column) else ("noise",)
    tables = ("pair",) if preset == "best" else tables
    runs = {config for name in tables for config in configs_of(CONFIGS[preset], name, column, [0])}
    pairs = {(config.method, config.loss) for config in runs}
    return sorted(pairs, key=lambda pair: (LOSSES.index(pair[1]), list(METHODS).index(pair[0])))


def families(cells: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """The cells of each method and loss: what was expected first, cells or not, then what else there is."""
    found = {pair: [] for pair in (expected(cells[0]["preset"], cells[0]["column"]) if cells else ())}
    for cell in cells:
        found.setdefault((cell["method"], cell["loss"]), []).append(cell)
    return found


def rows(cells: Sequence[Cell]) -> list[Row]:
    """A row for every strength of every method and loss. What was expected, or chosen, and not run has no cells."""
    plain, result = defaultdict(dict), []
    for cell in filter(is_tested, cells):
        if cell["method"] in ("sgd", "resample"):
            plain[cell["method"], cell["loss"]][cell["seed"]] = cell["top1"]
    for (method, loss), family in families(cells).items():
        best = choose(family) if family else Strength()
        by_strength = {} if best is None else {best: []}
        for cell in filter(is_tested, family):
            by_strength.setdefault(strength(cell), []).append(cell)
        base = {} if method == "sgd" else plain["resample" if method.startswith("resample-") else "sgd", loss]
        for key, tested in sorted(by_strength.items()) or [(Strength(), [])]:
            gains = [cell["top1"] - base[cell["seed"]] for cell in tested if cell["seed"] in base]
            result.append(Row(method, loss, key, None if best is None else key == best, tested, gains))
    return result


def spread(values: Sequence[float], style: str = ".2f") -> str:
    """Mean ± standard deviation, as far as there are values for it."""
    if len(values) < 2:
        return f"{values[0]:{style}}" if len(values) else "–"
    return f"{np.mean(values):{style}} ± {np.std(values, ddof=1):.2f}"


def against(values: Sequence[float], reference: float) -> tuple[float, bool | None]:
    """Our mean less a reference, and whether that is within two standard errors of our mean (None: a single value)."""
    difference = float(np.mean(values) - reference)
    if len(values) < 2:
        return difference, None
    return difference, bool(abs(difference) <= 2 * np.std(values, ddof=1) / np.sqrt(len(values)))


def groups(cells: Sequence[Cell]) -> list[str]:
    """Many, medium and few where the data have all of them, else head and tail: one division is enough for a table.

    Where all classes are as frequent there is none.
    """
    if figures.is_balanced(cells[0]):
        return []
    present = [[name for name in names if name in cells[0]] for names in (("many", "medium", "few"), ("head", "tail"))]
    return present[0] if len(present[0]) == 3 or not present[1] else present[1]


def best_on_test(row: Row, everything: Sequence[Row]) -> str:
    """The strength with the highest test accuracy of a family: what must not be reported as a result, yet often is."""
    family = [r for r in everything if (r.method, r.loss) == (row.method, row.loss) and r.cells]
    best = max(family, key=lambda r: np.mean(r.top1))
    return f"{best.strength}: {spread(best.top1)}" if len(family) > 1 else "–"


def table(column: str, everything: Sequence[Row]) -> list[dict[str, str]]:
    """The text of each row under its heading."""
    shown = [row for row in everything if row.cells and row.chosen is not False]
    cells = [cell for row in shown for cell in row.cells]
    known = PAPER.get(column, {})
    comparable = known and {cell["preset"] for cell in cells} == {"paper"}

    def texts(row: Row) -> dict[str, str]:
        names = groups(cells)
        means = [np.mean([cell.get(name, np.nan) for cell in row.cells]) for name in names]
        pairs = "" if len(row.gains) in (0, len(row.cells)) else f" ({len(row.gains)} pairs)"
        sizes = [float(cell["ess_by_epoch"][-1]) for cell in row.cells if cell["ess_by_epoch"]]
        how = " (not chosen)" if row.chosen is None else ""
        reference = known.get(f"{row.method}/{row.loss}")
        text = {
            "method": row.name,
            "loss": row.loss,
            "λ or ρ": "λ = ∞" if row.method.startswith("sgd") else f"{row.strength}{how}",
            "top-1": spread(row.top1),
            **({" / ".join(names): " / ".join(f"{mean:.1f}" for mean in means)} if names else {}),
            "gain over SGD": "" if row.method == "sgd" else spread(row.gains, "+.2f") + pairs,
            "paper": f"{reference['top1']:.2f}" if reference else "–",
        }
        if comparable:
            difference, within = against(row.top1, reference["top1"]) if reference else (None, None)
            text["ours − paper"] = "–" if difference is None else f"{difference:+.2f}"
            text["within 2 standard errors of our mean"] = {True: "yes", False: "no", None: "–"}[within]
        text["best λ on test (not to be trusted)"] = best_on_test(row, everything)
        text["effective sample size at the end"] = f"{np.mean(sizes):.0%}" if sizes else "–"
        return text | {"seeds": str(len(row.cells))}

    return [texts(row) for row in shown]


def as_markdown(texts: Sequence[dict[str, str]]) -> str:
    lines = [list(texts[0]), ["---"] * len(texts[0]), *(list(text.values()) for text in texts)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(column: str, cells: Sequence[Cell]) -> str:
    """The table of a column and what belongs to it alone."""
    everything = rows(cells)
    texts = table(column, everything)
    parts = [as_markdown(texts)] if texts else []
    if missing := [f"{row.name} ({row.loss})" for row in everything if not row.cells]:
        parts.append(f"Not run: {', '.join(missing)}.")
    if column in PAPER[PACKAGE] and any(row.method == "sgd" for row in everything):
        parts += [f"For reference, the {PACKAGE}:", as_markdown(package_texts(column))]
    if choices := chosen_from(cells):
        summary = "<summary>Validation accuracy that λ and ρ were chosen by (number of seeds)</summary>"
        parts.append("\n".join(["<details>", summary, "", *choices, "", "</details>"]))
    return "\n\n".join([*parts, made_with(cells)])


def package_texts(column: str) -> list[dict[str, str]]:
    split = [(*entry["row"].split("/"), entry["settings"], float(entry["top1"])) for entry in PAPER[PACKAGE][column]]
    return [
        {"method": METHODS[method], "loss": loss, "settings": settings, "top-1": f"{top1:.2f}".replace("nan", "NaN")}
        for method, loss, settings, top1 in split
    ]


def chosen_from(cells: Sequence[Cell]) -> list[str]:
    """A line for each method and loss with several strengths to choose from."""
    lines = []
    for (method, loss), family in families(cells).items():
        scores = validation(family)
        listed = ", ".join(f"{s}: {np.mean(v):.2f} ({len(v)})" for s, v in scores.items())
        if len(scores) > 1:
            lines.append(f"- {METHODS.get(method, method)} ({loss}): {listed}")
    return lines


def made_with(cells: Sequence[Cell]) -> str:
    hardware = "; ".join(sorted({cell["hardware"] for cell in cells}))
    versions = ", ".join(sorted({f"{name} {number}" for cell in cells for name, number in cell["versions"].items()}))
    seconds, compiling = (np.mean([cell[key] for cell in cells]) for key in ("seconds", "compile_seconds"))
    return f"{hardware}. On average a run takes {seconds:.0f} s and {compiling:.0f} s of compilation. {versions}."


def legend(cells: Sequence[Cell]) -> str:
    """How to read the tables."""
    lines = ["Top-1: test accuracy in % after the last epoch, mean ± standard deviation over the seeds. Gain: over SGD"]
    lines += ["with the same loss, seed by seed. Effective sample size: a part of the batch."]
    if validated := [cell for cell in cells if cell["val_top1"] is not None]:
        part = max(cell["config"].get("validation", 0) for cell in validated)
        where = "held out from these runs" if any(map(is_tested, validated)) else "in runs that are not shown"
        lines += [f"λ and ρ: chosen by accuracy on {part:.0%} of each class, set apart before the imbalance, {where}."]
        lines += ["No label there is wrong."]
    lines += ["“Best λ on test” chooses by the test accuracy itself, as the paper did: too high by construction."]
    if {cell["preset"] for cell in cells} != {"paper"}:
        lines += ["The paper's numbers are for reference only: they are of another network and more data."]
    return "\n".join([*lines, "“–” under “paper”: that number was not at hand when this was written."])


def terminal(column: str, texts: Sequence[dict[str, str]]) -> Table:
    """What fits 80 columns of a terminal."""
    shown = Table(title=column, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    first, last = list(texts[0]).index("λ or ρ"), list(texts[0]).index("paper")
    headings = [*list(texts[0])[first:last], "seeds"]
    shown.add_column("method", overflow="fold")
    for heading in headings:
        shown.add_column(heading.replace(" / ", " /\n"), justify="right", no_wrap=heading != "λ or ρ")
    for text in texts:
        shown.add_row(f"{text['method']} ({text['loss']})", *(text[heading] for heading in headings))
    return shown


def report(folders: Sequence[Path], package: Path = HERE) -> None:
    """Tables and figures of presets' results; if a package holds all of them its README is filled as well."""
    if not folders:
        raise UsageError("Which results? Give their folders, such as examples/cifar_lt/results/mini.")
    console, package, sections, everything, problems = Console(), package.resolve(), [], [], []
    for folder in [folder.resolve() for folder in folders]:
        columns, broken = load(folder)
        problems += broken
        for column, cells in columns.items():
            text, shown = markdown(column, cells), rows(cells)
            (folder / column / "table.md").write_text(f"# {column}\n\n{text}\n\n{legend(cells)}\n", encoding="utf-8")
            drawn, unreadable = figures.draw(shown, folder / column)
            problems += unreadable
            if texts := table(column, shown):
                console.print(terminal(column, texts))
            links = [f"[{title}]({folder / column / name})" for name, title in drawn.items()]
            links = [link.replace(f"{package}/", "") for link in links]
            sections += [f"### {folder.name}: {column}", text] + ([f"Figures: {', '.join(links)}."] if links else [])
            everything += cells
    if problems:
        raise UserError("\n".join(problems))
    # Half of the results must not pass for all of them, so a broken cell leaves the README as it is.
    readme, inside = package / "README.md", all(folder.resolve().is_relative_to(package) for folder in folders)
    if inside and readme.exists() and BEGIN in readme.read_text("utf-8"):
        fill(readme, "\n\n".join([*sections, legend(everything)]))


@dataclasses.dataclass(frozen=True)
class Options:
    """Draws tables and figures."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Presets' results: a folder a column, a JSON a cell."""


if __name__ == "__main__":
    chosen = tyro.cli(Options)
    sys.exit(exit_code(lambda: report(chosen.folders)))
