"""From a recipe to stages: the learning rate as lines, and the second stage, which begins somewhere on them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from examples.lab.config import SGD, Stage
from examples.lab.errors import UsageError
from examples.lab.recipe import Recipe

Line = tuple[int, tuple[float, float]]  # epochs in which the learning rate is linear, and its ends


def two_stages(
    recipe: Recipe,
    lines: Iterable[Line],
    *,
    second_rate: float = 1.0,
    second: Mapping[str, Any] | None = None,
    **shared: Any,
) -> tuple[Stage, ...]:
    """SGD, after a part of the epochs the recipe's method and class weights, and the classifier that it asks for.

    Args:
      recipe: what the user asked for.
      lines: the learning rate, line by line.
      second_rate: factor on the learning rate in the second stage.
      second: other fields of the second stage's :class:`Stage`.
      shared: fields of both.

    Raises:
      UsageError: if the second stage is asked for something and has no epoch.
    """
    loss, second_loss = recipe.losses
    turn = round(recipe.begin * recipe.epochs)
    weighted = {"loss": second_loss, "class_weights": recipe.loss.startswith("cb-"), "method": recipe.make_method()}
    copied = ("batch_size", "momentum", "weight_decay", "balanced_batches")
    first = {"loss": loss, "method": SGD} | {name: getattr(recipe, name) for name in copied} | shared
    then = first | weighted | dict(second or {})
    if turn == recipe.epochs and (second_rate != 1 or Stage(**then) != Stage(**first)):
        raise UsageError(f"--begin {recipe.begin} --epochs {recipe.epochs}: no epoch is left for the second stage.")
    stages, done = [], 0
    for epochs, (begin, end) in _cut(lines, turn, shared.get("rate_by_epoch", False)):
        if done < turn:
            stages.append(Stage(epochs=epochs, rate=(begin, end), **first))
        else:
            rate = second_rate * begin, second_rate * end
            stages.append(Stage(epochs=epochs, rate=rate, **then))
        done += epochs
    if recipe.classifier is not None:
        stages.append(Stage(classifier=recipe.classifier, loss=second_loss))
    return tuple(stages)


def thirds(epochs: int, rate: float) -> list[Line]:
    """The learning rate of the paper's text and X-ray experiments: divided by 100, then by 10,000."""
    first, second = round(epochs / 3), round(2 * epochs / 3)
    low, lowest = rate / 100, rate / 10_000
    return [(first, (rate, rate)), (second - first, (low, low)), (epochs - second, (lowest, lowest))]


def _cut(lines: Iterable[Line], turn: int, by_epoch: bool) -> Iterator[Line]:
    """The lines with one that contains the epoch ``turn`` cut there; lines without epochs are left out."""
    begin = 0
    for epochs, (first, last) in lines:
        at = turn - begin
        if 0 < at < epochs:
            step = (last - first) / ((epochs - 1) if by_epoch else epochs)
            middle = first + step * at
            yield at, (first, middle - step if by_epoch else middle)
            yield epochs - at, (middle, last)
        elif epochs:
            yield epochs, (first, last)
        begin += epochs
