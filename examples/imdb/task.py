"""Movie reviews of which most negative ones are removed from the training set."""

import dataclasses
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from examples.imdb.data import PADDING, UNKNOWN, encode, read, read_glove, vocabulary
from examples.imdb.models import ReviewClassifier
from examples.lab.errors import UsageError
from examples.lab.task import NUMBER, Data, Split, Task

BUCKET = 25  # words; batches are padded to a multiple of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imdb(Task):
    """The fields identify the reviews and the network."""

    dataset: str  # imdb-10: 10 % of the negative reviews are kept
    words: int = 20_000  # in the vocabulary, which is that of the training set
    length: int = 200  # words of a review that are read
    embedding: int = 100
    hidden: int = 64
    glove: str | None = None  # a file with vectors of words
    validation: float = 0.0
    subset_seed: int = 0

    classes = 2
    streamed = True

    @property
    def kept(self) -> float:
        found = re.fullmatch(f"imdb-{NUMBER}", self.dataset)
        if not found or not 0 < float(found[1]) <= 100:
            raise UsageError(
                f"--dataset {self.dataset}: it should be like imdb-10, where 10 % of the negative are kept."
            )
        return float(found[1]) / 100

    def load(self, data_dir: Path) -> Data:
        train, test = read(data_dir)
        rng = np.random.default_rng(self.subset_seed)
        of_class = [rng.permutation(np.flatnonzero(train.labels == label)) for label in (0, 1)]
        held_out = [round(self.validation * len(members)) for members in of_class]
        validation = np.concatenate([members[:n] for members, n in zip(of_class, held_out, strict=True)])
        negative, positive = (members[n:] for members, n in zip(of_class, held_out, strict=True))
        if not (left := round(self.kept * len(negative))):
            raise UsageError(f"--dataset {self.dataset} keeps none of the {len(negative):,} negative reviews.")
        chosen = np.concatenate([negative[:left], positive])
        numbers = vocabulary([train.words[i] for i in chosen], self.words)

        def split(reviews, places) -> Split:
            tokens = encode([reviews.words[i] for i in places], numbers, self.length)
            order = np.argsort(_lengths(tokens), kind="stable")  # so that the batches of a test are of one length
            return Split(tokens[order], reviews.labels[places][order])

        return Data(
            train=split(train, chosen),
            test=split(test, np.arange(len(test.labels))),
            validation=split(train, validation) if self.validation else None,
            held_out=split(train, np.concatenate([negative[-10:], positive[:10]])),
            pretrained=numbers,
        )

    def batch(self, split, indices, mine=slice(None)):
        tokens, labels = split.inputs[indices], split.labels[indices]
        longest = -(-_lengths(tokens).max() // BUCKET) * BUCKET
        return Split(tokens[mine, :longest], labels[mine])

    def lengths(self, split):
        return _lengths(split.inputs)

    def network(self, loss, rngs):
        return ReviewClassifier(self.words + UNKNOWN + 1, self.embedding, self.hidden, rngs)

    def calibrate(self, params, rest, data):
        if self.glove is not None:
            table = np.array(params["embedding"]["embedding"][...])
            for number, vector in read_glove(Path(self.glove), data.pretrained, self.embedding).items():
                table[number] = vector
            params["embedding"]["embedding"][...] = jnp.asarray(table)
        return params, rest


def _lengths(tokens: np.ndarray) -> np.ndarray:
    return (tokens != PADDING).sum(axis=1)
