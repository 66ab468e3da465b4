"""A bidirectional LSTM over the words of a review."""

import jax
import jax.numpy as jnp
from flax import nnx

from examples.imdb.data import PADDING


class ReviewClassifier(nnx.Module):
    """Vectors of words, an LSTM in both directions, and a linear classifier of what they end with.

    Args:
      words: size of the table of vectors, with padding and unknown words.
      embedding: numbers of a vector.
      hidden: units of the LSTM in each direction.
      rngs: the source of the initial parameters.
    """

    def __init__(self, words: int, embedding: int, hidden: int, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(words, embedding, rngs=rngs)
        self.forward = nnx.RNN(nnx.OptimizedLSTMCell(embedding, hidden, rngs=rngs), return_carry=True)
        self.backward = nnx.RNN(
            nnx.OptimizedLSTMCell(embedding, hidden, rngs=rngs), return_carry=True, reverse=True, keep_order=True
        )
        self.classifier = nnx.Linear(2 * hidden, 2, rngs=rngs)

    def features(self, tokens: jax.Array, *, train: bool) -> jax.Array:
        """The last states of both directions, shape (N, 2 * hidden), of numbered words, shape (N, L), padded behind."""
        del train
        lengths = jnp.sum(tokens != PADDING, axis=1)
        x = self.embedding(tokens)
        ends = [rnn(x, seq_lengths=lengths)[0] for rnn in (self.forward, self.backward)]
        return jnp.concatenate([h for _, h in ends], axis=-1)

    def __call__(self, tokens: jax.Array, *, train: bool) -> jax.Array:
        return self.classifier(self.features(tokens, train=train))
