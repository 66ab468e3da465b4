"""Tables and figures of records, drawn from the JSON files alone.

``python -m examples.<experiment> report FOLDER`` writes table.md and PNGs beside the records of each dataset. Without a
folder it does so for all results inside the experiment, and fills its README.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from examples import style
from examples.lab import figures, records
from examples.lab.errors import UserError
from examples.lab.experiment import TUNING_SEED, Experiment
from examples.lab.recipe import SYMBOLS
from examples.readme import fill

Frame = Any  # of pandas, whose own types do not know what a column holds
STRENGTH = list(SYMBOLS)
FAMILY = ["method", "loss"]
GROUPS = ["many", "medium", "few"]
NOTHING = "–"
MISSING = {"log_alpha": None, "anneal_from": None}  # of older records


def load(folder: Path) -> Frame:
    """The records of a preset, a row each."""
    rows = [MISSING | records.read(path) for path in sorted(folder.glob("*/*.json"))]
    if not rows:
        raise UserError(f"{folder} holds no records: they are in <dataset>/<method>-….json.")
    frame = pd.DataFrame(rows)
    numbers = [*STRENGTH, "accuracy", "balanced_accuracy", "validation_accuracy"]
    frame[numbers] = frame[numbers].apply(pd.to_numeric)
    frame["strength"] = frame.apply(strength, axis=1)
    for _, family in frame.groupby(["dataset", *FAMILY, "strength", frame.seed < TUNING_SEED], sort=False):
        settings = [{k: v for k, v in config.items() if k not in ("seed", "run")} for config in family.config]
        if any(each != settings[0] for each in settings):
            one = family.iloc[0]
            which = f"{one.dataset}, {one.method}, {one.loss}, {one.strength}"
            raise UserError(f"{folder} has runs of {which} that differ in more than their seed: report them apart.")
    return frame


def strength(record: Any) -> str:
    """What says how uneven the weights are, in words."""
    given = {name: record[name] for name in STRENGTH if pd.notna(record[name]) and np.isfinite(record[name])}
    return ", ".join(f"{SYMBOLS[name]} = {value:g}" for name, value in given.items()) or NOTHING


def spread(values: Frame, digits: str = ".2f") -> str:
    """Mean ± standard deviation, as far as there are values for it."""
    values = values.dropna()
    if len(values) < 2:
        return f"{values.iloc[0]:{digits}}" if len(values) else NOTHING
    return f"{values.mean():{digits}} ± {values.std():.2f}"


def tested(frame: Frame) -> Frame:
    """The records that are not for choosing, with the gain over SGD with the same loss and seed."""
    frame = frame[frame.seed < TUNING_SEED].copy()
    base = frame[frame.method == "sgd"].set_index(["loss", "seed"]).accuracy
    frame["gain"] = frame.accuracy - base.reindex(pd.MultiIndex.from_frame(frame[["loss", "seed"]])).to_numpy()
    return frame


def chosen(frame: Frame) -> Frame:
    """For each method and loss the strength with the highest mean validation accuracy, or the only one there is.

    Of those that were tested: what was only tried to choose by is no row.
    """
    strengths = [*FAMILY, "strength"]
    frame = frame.merge(frame.loc[frame.seed < TUNING_SEED, strengths].drop_duplicates(), on=strengths)
    frame = frame.sort_values([*FAMILY, *STRENGTH])  # of equals the first, as in a sweep
    scores = frame.groupby([*FAMILY, "strength"], sort=False).validation_accuracy.mean().reset_index()
    best = scores.sort_values("validation_accuracy", ascending=False, na_position="last", kind="stable")
    best = best.groupby(FAMILY, sort=False)
    only = scores.groupby(FAMILY, sort=False).strength.size() == 1
    first = best.first()
    return first.strength.where(only | first.validation_accuracy.notna())


def at_the_chosen(frame: Frame) -> Frame:
    """The runs that were tested, with the strength that is chosen for their method and loss."""
    runs = tested(frame)
    choice = chosen(frame).reindex(pd.MultiIndex.from_frame(runs[FAMILY]))
    return runs[runs.strength == choice.to_numpy()]


def rows(frame: Frame, paper: dict[str, Any], expected: Sequence[tuple[str, str]]) -> Frame:
    """The table of a dataset: a row for each method and loss at the strength that validation chose."""
    runs, picked, out = tested(frame), at_the_chosen(frame), []
    by_class = columns_by_class(runs)
    there = dict.fromkeys(zip(runs.method, runs.loss, strict=True))
    for method, loss in dict.fromkeys([*(pair for pair in expected if pair in there), *there]):
        shown = picked[(picked.method == method) & (picked.loss == loss)]
        number = paper.get(f"{method}/{loss}")
        out.append(
            {
                "method": style.name(method),
                "loss": loss,
                "hyper-parameters": shown.strength.iloc[0] if len(shown) else "not chosen",
                "accuracy": spread(shown.accuracy),
                "by class": " / ".join(_mean(shown[name]) for name in by_class),
                "gain over SGD": "" if method == "sgd" else spread(shown.gain, "+.2f"),
                "paper": f"{number['top1']:.2f}" if number else NOTHING,
                "seeds": len(shown),
            }
        )
    table = pd.DataFrame(out)
    spare = [name for name, needed in (("by class", by_class), ("paper", paper)) if not needed]
    table = table.drop(columns=spare, errors="ignore")  # there are none in a table without rows
    return table.rename(columns={"by class": " / ".join(by_class).replace("_", " ")})


def columns_by_class(runs: Frame) -> list[str]:
    """What the accuracy of all test examples hides: that of rare classes, or the mean of the classes, if it differs."""
    groups = [name for name in GROUPS if runs[name].notna().any()]
    if len(groups) > 1:
        return groups
    return [] if np.allclose(runs.accuracy, runs.balanced_accuracy, atol=0.1) else ["balanced_accuracy"]


def not_run(frame: Frame, expected: Sequence[tuple[str, str]]) -> str:
    """The methods and losses that have no row yet, in a sentence."""
    runs, missing = tested(frame), {}
    there = set(zip(runs.method, runs.loss, strict=True))
    for method, loss in expected:
        if (method, loss) not in there:
            missing.setdefault(style.name(method), []).append(loss)
    return "; ".join(f"{method} ({', '.join(losses)})" for method, losses in missing.items())


def _mean(values: Frame) -> str:
    mean = values.astype(float).mean()
    return NOTHING if pd.isna(mean) else f"{mean:.1f}"


def validation_table(frame: Frame) -> str:
    """Validation accuracies by which strengths were chosen, a row for each method and loss with several."""
    ordered = frame.dropna(subset=["validation_accuracy"]).sort_values([*FAMILY, *STRENGTH])
    out = []
    for (method, loss), family in ordered.groupby(FAMILY, sort=False):
        means = family.groupby("strength", sort=False).validation_accuracy.mean()
        if len(means) > 1:
            shown = "; ".join(f"{strength}: {mean:.2f}" for strength, mean in means.items())
            out.append({"method": style.name(method), "loss": loss, "validation accuracy": shown})
    return pd.DataFrame(out).to_markdown(index=False, disable_numparse=True)


def made_with(frame: Frame) -> str:
    hardware = "; ".join(sorted(set(frame.hardware)))
    versions = ", ".join(sorted({f"{name} {number}" for each in frame.versions for name, number in each.items()}))
    median, all_of_them = duration(frame.seconds.median()), duration(cost(frame))
    durations = f"{median} in the median, {all_of_them} in total with what they share counted once"
    return f"Runs: {len(frame)}; {durations}. {hardware}. {versions}."


def cost(frame: Frame) -> float:
    """Seconds of all runs, where equal first stages are counted once."""
    stages = {}
    for run, lengths, seconds in zip(frame.config.str["run"], frame.stages, frame.seconds, strict=True):
        for number, length in enumerate(lengths, start=1):
            shared = json.dumps([run["task"], run["seed"], run["stages"][:number]])
            stages.setdefault(shared, length * seconds / sum(lengths))
    return sum(stages.values())


def duration(seconds: float) -> str:
    size, unit = next(((s, u) for s, u in ((3600, "h"), (60, "min")) if seconds >= s), (1, "s"))
    return f"{seconds / size:.{0 if size == 1 else 1}f} {unit}"


def section(experiment: Experiment, preset: str, dataset: str, frame: Frame) -> str:
    """The table of a dataset and what belongs to it alone, in Markdown."""
    pairs = {(row.title, row.loss) for row in experiment.recipes(preset, dataset) if not row.validation}
    order = list(style.NAMES)
    expected = sorted(
        pairs, key=lambda pair: (pair[1], order.index(pair[0]) if pair[0] in order else len(order), pair[0])
    )
    table = rows(frame, experiment.paper.get(dataset, {}), expected)
    parts = [] if table.empty else [table.to_markdown(index=False, disable_numparse=True)]
    if missing := not_run(frame, expected):
        parts.append(f"Not run: {missing}.")
    if frame.validation_accuracy.notna().any():
        parts.append(f"<details>\n<summary>Validation accuracy</summary>\n\n{validation_table(frame)}\n\n</details>")
    return "\n\n".join([*parts, made_with(frame)])


LEGEND = """\
Accuracy: on the test set after the last epoch, in %, mean ± standard deviation over the seeds. Many, medium, few:
mean accuracy of the classes of over 100, of 20 to 100 and of less than 20 training examples; balanced accuracy: that of
all classes. Gain: over SGD with the same loss, seed by seed. Hyper-parameters: λ, the KL radius ρ, the fraction, the
bound c, log α or a method's own number p, chosen by accuracy on a validation split (see "Validation accuracy" below a
table; it has a seed of its own) or fixed in advance."""


def legend(experiment: Experiment) -> str:
    source = experiment.paper.get("source")
    return f"{LEGEND} Paper: {source}." if source else LEGEND


def report(experiment: Experiment, folders: Sequence[Path]) -> None:
    """Tables and figures of presets' results; those of all that the experiment holds are in its README, too."""
    if not folders:
        raise UserError(f"{experiment.folder / 'results'} holds no results: sweep first, or name a folder.")
    console, sections, own = Console(), [], (experiment.folder / "results").glob("*")
    all_of_them = {folder.resolve() for folder in folders} == {folder.resolve() for folder in own}
    for folder in map(Path.resolve, folders):
        for dataset, frame in load(folder).groupby("dataset"):
            place = folder / str(dataset)
            text = section(experiment, folder.name, str(dataset), frame)
            (place / "table.md").write_text(f"{text}\n\n{legend(experiment)}\n", encoding="utf-8")
            drawn = figures.draw(frame, at_the_chosen(frame), place)
            pictures = [f"![{path.stem}]({'/'.join(path.parts[-4:])})" for path in drawn]
            sections.append("\n\n".join([f"### {dataset}, preset {folder.name}", text, *pictures]))
            console.print(f"{place / 'table.md'} and {', '.join(path.name for path in drawn)}")
    if all_of_them:
        fill(experiment.folder / "README.md", "\n\n".join([legend(experiment), *sections]))
