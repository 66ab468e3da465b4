"""Which runs have which epochs in common: a run is a chain of segments, and equal segments are trained once.

All runs of one seed and loss have the first stage in common, whatever λ they have in the second. The balanced softmax
and the logit adjustment (at τ = 1) are one loss by two names, so their runs have everything in common.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import Any, NamedTuple

from examples.cifar_lt.config import ALIASES, Config

SECOND_STAGE_ONLY = {"algorithm": "absgd", "temperature": math.inf, "kl_radius": None, "start": None}
SECOND_STAGE_ONLY |= {"gamma": 0.9, "log_alpha": None, "trained": "all", "decay": 1.0}


class Segment(NamedTuple):
    """The epochs ``first`` to ``until`` of a run (none at all if a classifier is fitted at the end)."""

    config: Config
    first: int
    until: int
    parent: "Segment | None"

    @property
    def name(self) -> str:
        """A name for its folder, with a checksum of all that it depends on."""
        identity = self.config.identity() | {"first": self.first, "until": self.until}
        checksum = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.config.preset}-{self.config.column}-{self.config.name}-{self.first}-{self.until}-{checksum}"


def trunk(config: Config) -> tuple[Config, int]:
    """The run from which another one branches off, and after how many epochs; itself and 0 if there is none."""
    if config.classifier != "joint":
        return dataclasses.replace(config, classifier="joint"), config.epochs
    plain = dataclasses.replace(config, loss=config.loss.removeprefix("cb-"), **SECOND_STAGE_ONLY)
    if plain == config:
        return config, 0
    finite = math.isfinite(config.temperature) or config.kl_radius is not None
    branch = min(config.second_stage, config.finite_from) if finite else config.second_stage
    return (plain, branch) if branch else (config, 0)


def segments(configs: Iterable[Config]) -> dict[Config, Segment]:
    """The last segment of each run."""
    configs = list(configs)
    cuts = {branch for _, branch in map(trunk, configs)}

    def segment(config: Config, until: int) -> Segment:
        source, branch = trunk(config)
        if source != config:
            return Segment(config, branch, until, segment(source, branch))
        earlier = max((cut for cut in cuts if 0 < cut < until), default=0)
        return Segment(config, earlier, until, segment(config, earlier) if earlier else None)

    named = {config: dataclasses.replace(config, loss=ALIASES.get(config.loss, config.loss)) for config in configs}
    return {config: segment(same, config.epochs) for config, same in named.items()}


def chain(segment: Segment | None) -> Iterator[Segment]:
    """A segment and all before it, the first one first."""
    if segment is not None:
        yield from chain(segment.parent)
        yield segment


def together(ends: Iterable[Segment], kind: Any, at_most: int) -> list[list[Segment]]:
    """All segments that lead to ``ends``, in groups of equal ``kind(segment)``: parents first, then low seeds."""
    needed = {segment: len(list(chain(segment))) for end in ends for segment in chain(end)}
    keys = {segment: (depth, segment.first, segment.until, kind(segment)) for segment, depth in needed.items()}
    waiting = []
    for _, members in groupby(sorted(needed, key=lambda s: (keys[s], s.config.seed, s.name)), key=keys.__getitem__):
        waiting += batched(members, at_most)
    waiting.sort(key=lambda group: max(segment.config.seed for segment in group))
    done, groups = {None}, []
    while waiting:
        ready = next(group for group in waiting if all(segment.parent in done for segment in group))
        waiting.remove(ready)
        groups.append(ready)
        done.update(ready)
    return groups


def batched(items: Iterable[Segment], size: int) -> Iterator[list[Segment]]:
    """Lists of at most ``size`` items."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
