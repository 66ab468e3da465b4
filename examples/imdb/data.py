"""The Large Movie Review Dataset (Maas et al. 2011) as distributed, downloaded where missing; words as numbers."""

import itertools
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pooch
from sklearn.feature_extraction.text import CountVectorizer

from examples.lab import files
from examples.lab.errors import UserError

URL = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
MD5 = "7c2ac02c03563afcf9b574c7e56c153a"
KINDS = ("neg", "pos")
PADDING, UNKNOWN = 0, 1  # numbers of no word; those of the vocabulary follow


class Reviews(NamedTuple):
    """Reviews as lists of words, and whether they are positive."""

    words: list[list[str]]
    labels: np.ndarray  # shape=(N,), dtype=int32


@lru_cache(maxsize=1)
def read(data_dir: Path) -> tuple[Reviews, Reviews]:
    """Training and test set, from ``aclImdb/{train,test}/{neg,pos}/*.txt``."""
    folder = data_dir / "aclImdb"
    if not folder.exists():
        _download(data_dir)
    split = CountVectorizer(token_pattern=r"\w+", preprocessor=lambda text: text.lower().replace("<br />", " "))
    analyse = split.build_analyzer()

    def part(name: str) -> Reviews:
        paths = [sorted((folder / name / kind).glob("*.txt")) for kind in KINDS]
        for kind, found in zip(KINDS, paths, strict=True):
            if not found:
                raise UserError(f"{folder / name / kind} holds no reviews. Delete {folder} and start again.")
        words = [analyse(path.read_text(encoding="utf-8")) for path in itertools.chain(*paths)]
        return Reviews(words, np.repeat(np.arange(2, dtype=np.int32), [len(found) for found in paths]))

    return part("train"), part("test")


def vocabulary(words: Sequence[Sequence[str]], size: int) -> dict[str, int]:
    """The most frequent words, numbered."""
    as_it_is: Any = lambda review: review  # noqa: E731  pyright knows only the names of analyzers
    found = CountVectorizer(analyzer=as_it_is, max_features=size).fit(words).vocabulary_
    return {word: number + UNKNOWN + 1 for word, number in found.items()}


def encode(words: Sequence[Sequence[str]], numbers: dict[str, int], length: int) -> np.ndarray:
    """The first words of each review by their numbers, shape (N, length), padded at the end."""
    out = np.full((len(words), length), PADDING, np.int32)
    for row, review in zip(out, words, strict=True):
        known = [numbers.get(word, UNKNOWN) for word in review[:length]] or [UNKNOWN]
        row[: len(known)] = known
    return out


def read_glove(path: Path, numbers: dict[str, int], size: int) -> dict[int, np.ndarray]:
    """Vectors of known words from a file in GloVe's format: a word and its numbers a line."""
    vectors = {}
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                word, *values = line.rstrip().rsplit(" ", size)  # a word may contain spaces
                if len(values) != size:
                    raise UserError(f"{path} has vectors of {len(values)} numbers, --embedding is {size}.")
                if word in numbers:
                    vectors[numbers[word]] = np.array(values, np.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a file in GloVe's format ({error}).") from None
    return vectors


def _download(data_dir: Path) -> None:
    unfinished = files.beside(data_dir / "aclImdb")
    unpack = pooch.Untar(extract_dir=unfinished.name)
    try:
        files.download(URL, f"md5:{MD5}", data_dir / "aclImdb_v1.tar.gz", data_dir / "aclImdb", unpack)
        (unfinished / "aclImdb").replace(data_dir / "aclImdb")
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
