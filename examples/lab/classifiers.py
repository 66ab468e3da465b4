"""Second-stage classifiers of Kang et al. 2019: made anew on the features of a trained backbone.

Pure functions on arrays, for ``jax.jit`` and ``jax.vmap``. Labels are integers in [0, C), and every class occurs among
them. A classifier of cosines is handed over as unit features, unit columns and a bias of 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from examples.lab.input_pipeline import class_balanced

BATCH, LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 128, 0.2, 0.9, 5e-4  # the paper's code has batches of 512


class Linear(NamedTuple):
    """A linear classifier: the logits are ``features @ kernel + bias``."""

    kernel: jax.Array  # shape=(D, C)
    bias: jax.Array  # shape=(C,)


def ncm(features: jax.Array, labels: jax.Array, classes: int) -> Linear:
    r"""Nearest class mean: the class whose mean is at the smallest angle, seen from the mean of all features.

    .. math:: \arg\max_c\, \cos(x - m, \mu_c), \qquad
              m = \frac1N \sum_i x_i, \quad \mu_c = \frac1{n_c} \sum_{i: y_i = c} \frac{x_i - m}{\|x_i - m\|}

    All classes share the length of x - m; without it the rule is linear in x. For unit means the paper's other choice,
    the Euclidean distance, is the same rule. Its code centres and normalises the features as here, but by default
    compares unit features with means that are left shorter than 1, which is not linear in x.

    Args:
      features: shape (N, D).
      labels: shape (N,).
      classes: C.

    Returns:
      Unit columns along the means, and the bias that puts the origin at m.

    References:
      Kang et al., `Decoupling Representation and Classifier for Long-Tailed Recognition
      <https://arxiv.org/abs/1910.09217>`_, 2019, section 4, as are the others below.
    """
    mean = jnp.mean(features, axis=0)
    sums = jax.ops.segment_sum(_unit(features - mean), labels, num_segments=classes)
    kernel = _unit(sums).T  # a sum has the direction of the mean
    return Linear(kernel, -mean @ kernel)


def tau_normalised(linear: Linear, tau: jax.Array | float = 1.0) -> Linear:
    r"""τ-normalisation: training makes the weights of frequent classes longer, and this evens them out.

    .. math:: \tilde w_c = w_c / \|w_c\|^\tau

    Args:
      linear: the classifier of the first stage. Its bias is dropped, as in the paper.
      tau: from 0 (the same weights) to 1 (unit weights); the paper chooses it on validation data.

    Returns:
      The weights normalised, and a bias of 0.

    References:
      Kang et al. 2019, section 4.
    """
    return Linear(linear.kernel / jnp.linalg.norm(linear.kernel, axis=0) ** tau, jnp.zeros_like(linear.bias))


def crt(features: jax.Array, labels: jax.Array, classes: int, key: jax.Array, *, steps: int = 1000) -> Linear:
    r"""Classifier re-training: a new classifier, trained on batches in which all classes are equally likely.

    .. math:: \min_{W, b}\, \frac1C \sum_c \frac1{n_c} \sum_{i: y_i = c} \mathrm{CE}(W^\top x_i + b,\, c)

    By SGD with momentum, weight decay on W and b, and a cosine learning rate, with the constants of the paper's code
    for ImageNet-LT but a quarter of its batches; 1000 steps are its 10 epochs of a long-tailed CIFAR. The features are
    fixed, while there the images are augmented anew in each epoch.

    Args:
      features: shape (N, D).
      labels: shape (N,).
      classes: C.
      key: of the initial weights (He's, as the network's) and of the batches.
      steps: number of updates.

    Returns:
      The trained classifier.

    References:
      Kang et al. 2019, section 4.
    """
    init_key, key = jax.random.split(key)
    kernel = jax.nn.initializers.he_normal()(init_key, (features.shape[-1], classes), features.dtype)
    start = Linear(kernel, jnp.zeros(classes, features.dtype))
    return _fit(lambda linear, x: x @ linear.kernel + linear.bias, start, features, labels, classes, key, steps)


def lws(features: jax.Array, labels: jax.Array, linear: Linear, key: jax.Array, *, steps: int = 500) -> Linear:
    r"""Learnable weight scaling: one factor for each class is trained, as by :func:`crt`; the directions stay.

    .. math:: \min_f\, \frac1C \sum_c \frac1{n_c} \sum_{i: y_i = c} \mathrm{CE}(f \odot (W^\top x_i + b),\, c)

    It begins at f = 1 and takes half as many steps, as in the paper's code, which scales the bias too.

    Args:
      features: shape (N, D).
      labels: shape (N,).
      linear: the classifier of the first stage.
      key: of the batches.
      steps: number of updates.

    Returns:
      The classifier of the first stage with its weights and biases multiplied by f.

    References:
      Kang et al. 2019, section 4.
    """
    kernel, bias = linear
    logits = features @ kernel + bias
    factors = _fit(jnp.multiply, jnp.ones_like(bias), logits, labels, bias.size, key, steps)
    return Linear(kernel * factors, bias * factors)


def _fit(apply, params, inputs, labels, classes, key, steps) -> Any:
    sgd = optax.sgd(optax.cosine_decay_schedule(LEARNING_RATE, steps), MOMENTUM)
    optimizer = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), sgd)

    def loss(params, batch):
        logits = apply(params, inputs[batch])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]))

    def draw(key):
        return class_balanced(key, labels, steps=1, batch_size=BATCH, classes=classes)[0]

    def body(carry, batch):
        params, opt_state = carry
        updates, opt_state = optimizer.update(jax.grad(loss)(params, batch), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    batches = jax.vmap(draw)(jax.random.split(key, steps))  # before the loop, because the labels are sorted for it
    (params, _), _ = jax.lax.scan(body, (params, optimizer.init(params)), batches)
    return params


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


Classifier = Callable[[jax.Array, jax.Array, Linear, jax.Array], Linear]
CLASSIFIERS: dict[str, Classifier] = {  # (features, labels, linear, key) -> Linear
    "ncm": lambda features, labels, linear, key: ncm(features, labels, linear.bias.size),
    "crt": lambda features, labels, linear, key: crt(features, labels, linear.bias.size, key),
    "tau-norm": lambda features, labels, linear, key: tau_normalised(linear),
    "lws": lws,
}
