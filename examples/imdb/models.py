"""A bidirectional LSTM over the words of a review."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from examples.imdb.data import PADDING


class ReviewClassifier(nnx.Module):
    """Vectors of words, an LSTM in both directions, and a linear classifier of the maximum over the words.

    Args:
      words: size of the table of vectors, with padding and unknown words.
      embedding: numbers of a vector.
      hidden: units of the LSTM in each direction.
      rngs: the source of the initial parameters.
    """

    def __init__(self, words: int, embedding: int, hidden: int, rngs: nnx.Rngs):
        # Of variance 1, as PyTorch begins; with Flax's 1 / embedding SGD stays at the frequencies of the classes.
        self.embedding = nnx.Embed(words, embedding, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        cells = [nnx.OptimizedLSTMCell(embedding, hidden, rngs=rngs) for _ in range(2)]
        self.forward = nnx.RNN(cells[0], rngs=False)
        self.backward = nnx.RNN(cells[1], reverse=True, keep_order=True, rngs=False)
        self.classifier = nnx.Linear(2 * hidden, 2, rngs=rngs)

    def features(self, tokens: jax.Array, *, train: bool) -> jax.Array:
        """The largest state of each unit, shape (N, 2 * hidden), of numbered words, shape (N, L), padded behind."""
        del train
        there = tokens != PADDING
        x = self.embedding(tokens)
        options: Any = {"seq_lengths": jnp.sum(there, axis=1), "rngs": nnx.Rngs(0)}  # of the first state, which is 0
        states: Any = [rnn(x, **options) for rnn in (self.forward, self.backward)]
        return jnp.max(jnp.concatenate(states, axis=-1), axis=1, initial=-jnp.inf, where=there[..., None])

    def __call__(self, tokens: jax.Array, *, train: bool) -> jax.Array:
        return self.classifier(self.features(tokens, train=train))
