"""The rivals for wrong labels: their losses from probabilities in float64 NumPy, and what they keep."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.lab.losses import LOG_PROBABILITIES, LOSSES
from examples.lab.methods import Annealed, Batch, Outputs, with_steps
from examples.lab.methods.absgd import Absgd
from examples.lab.methods.early_learning import EarlyLearning
from examples.lab.methods.robust_losses import FUNCTIONS, RobustLoss
from examples.lab.methods.small_loss import SmallLoss
from examples.lab.methods.within_class import WithinClass

B, D, C = 7, 4, 5
RNG = np.random.default_rng(0)
X, LABELS, WEIGHTS = RNG.normal(size=(B, D)), RNG.integers(0, C, B), RNG.uniform(0.5, 1.5, B)
KERNEL = RNG.normal(size=(D, C))


def losses(kernel, batch):
    logits = batch.inputs @ kernel
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels), Outputs(logits, ())


def probabilities(kernel, x=X):
    exponentials = np.exp(x @ kernel)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def given(p):
    return p[np.arange(len(p)), LABELS]


def smoothed(p, part):
    target = (1 - part) * np.eye(C)[LABELS] + part / C
    return -(target * np.log(p)).sum(axis=1)


def reverse(p, alpha):
    """Cross entropy, and the one of the label under the prediction, where log 0 is taken as log 10⁻⁴."""
    return -alpha * np.log(given(p)) - (p * np.log(np.maximum(np.eye(C)[LABELS], 1e-4))).sum(axis=1)


def corrected(p, rate):
    transition = np.full((C, C), rate / (C - 1))
    np.fill_diagonal(transition, 1 - rate)
    return -np.log(given(p @ transition))


BY_HAND = {
    "gce": (0.7, lambda p, q: (1 - given(p) ** q) / q),
    "sce": (0.1, reverse),
    "smoothing": (0.2, smoothed),
    "forward": (0.4, corrected),
}


def difference_quotient(f, x, step=1e-6):
    out = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        out[place] = (f(up) - f(down)) / (2 * step)
    return out


def gradient(method, state, indices=None, kernel=KERNEL):
    with jax.enable_x64(True):
        batch = Batch(jnp.asarray(X), jnp.asarray(LABELS), jnp.asarray(WEIGHTS), indices)
        grads, after, info = jax.jit(method.gradient, static_argnums=0)(losses, jnp.asarray(kernel), state, batch, None)
    np.testing.assert_allclose(info.losses, WEIGHTS * -np.log(given(probabilities(kernel))), rtol=1e-9)
    return np.asarray(grads), after, info


@pytest.mark.parametrize("name", BY_HAND)
def test_losses_of_probabilities(name):
    number, by_hand = BY_HAND[name]
    mean = lambda kernel: np.mean(WEIGHTS * by_hand(probabilities(kernel), number))  # noqa: E731
    grads, state, info = gradient(RobustLoss(name, number), 0)
    assert int(state) == 1
    assert float(info.risk) == pytest.approx(mean(KERNEL), rel=1e-9)
    np.testing.assert_allclose(grads, difference_quotient(mean, KERNEL), rtol=1e-6, atol=1e-9)


def test_every_function_is_tested():
    assert set(FUNCTIONS) == {*BY_HAND, "rgd"}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_a_probability_sum_to_one_over_the_labels(name):
    logits, counts = jnp.tanh(jnp.asarray(X @ KERNEL)), jnp.arange(1, C + 1)
    each_label = jax.vmap(lambda label: LOSSES[name](logits, jnp.full(B, label), counts))(jnp.arange(C))
    total = jnp.exp(-each_label).sum(axis=0)
    assert jnp.allclose(total, 1, atol=1e-5) == (name in LOG_PROBABILITIES)


@pytest.mark.parametrize(("name", "number"), [("gce", 1e-7), ("smoothing", 0.0), ("forward", 0.0)])
def test_at_the_end_of_its_range_it_is_cross_entropy(name, number):
    with jax.enable_x64(True):
        loss, logits = losses(jnp.asarray(KERNEL), Batch(jnp.asarray(X), jnp.asarray(LABELS), None))
        np.testing.assert_allclose(FUNCTIONS[name](loss, logits.logits, number), loss, rtol=1e-6)


def test_reweighted_gradients_have_constant_weights():
    values = -np.log(given(probabilities(KERNEL)))
    weights = WEIGHTS * np.exp(np.minimum(values, 1.5) / 2.5)
    assert values.max() > 1.5 > values.min()
    grads, _, info = gradient(RobustLoss("rgd", 1.5), 0)
    mean = lambda kernel: np.mean(weights * -np.log(given(probabilities(kernel))))  # noqa: E731
    np.testing.assert_allclose(grads, difference_quotient(mean, KERNEL), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(info.weights, weights, rtol=1e-9)


@pytest.mark.parametrize(("done", "kept"), [(0, 7), (5, 5), (10, 4), (1000, 4)])  # round(7 · (1, 0.75, 0.5, 0.5))
def test_small_losses(done, kept):
    grads, after, info = gradient(SmallLoss(0.5, 10.0), jnp.int32(done))
    assert int(after) == done + 1
    chosen = np.argsort(-given(probabilities(KERNEL)))[:kept]
    mean = lambda kernel: np.mean((WEIGHTS * -np.log(given(probabilities(kernel))))[chosen])  # noqa: E731
    np.testing.assert_allclose(grads, difference_quotient(mean, KERNEL), rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(np.flatnonzero(info.weights), np.sort(chosen))


@pytest.mark.parametrize("lam", [-0.5, 0.8])
def test_within_a_class(lam):
    """Algorithm 1 with bias correction, in plain exponentials, for each class on its own; one class does not occur."""
    gamma, present = 0.1, np.unique(LABELS)
    method = WithinClass(lam, gamma)
    assert 1 < len(present) < C
    assert np.bincount(LABELS).max() > 1
    with jax.enable_x64(True):
        state = method.init(None, (9, C))
    s, mass = np.zeros(C), np.zeros(C)
    for kernel in (KERNEL, 2 * KERNEL, -KERNEL):
        grads, state, info = gradient(method, state, kernel=kernel)
        values = -WEIGHTS * np.log(given(probabilities(kernel)))
        for c in present:
            s[c] = (1 - gamma) * s[c] + gamma * np.mean(np.exp(values[c == LABELS] / lam))
            mass[c] = (1 - gamma) * mass[c] + gamma
        weights = np.exp(values / lam) / s[LABELS] * mass[LABELS]
        mean = lambda k, w=weights: np.mean(w * WEIGHTS * -np.log(given(probabilities(k))))  # noqa: E731
        np.testing.assert_allclose(info.weights, weights, rtol=1e-6)
        np.testing.assert_allclose(grads, difference_quotient(mean, kernel), rtol=1e-5, atol=1e-8)
    assert set(np.flatnonzero(state.mass)) == set(present)


def test_annealing_takes_a_third_of_the_epochs():
    """Four epochs of three steps: λ goes from -4 to -1, and q from 1/4 to 1, in the first four steps."""
    batch = Batch(jnp.array(X), jnp.array(LABELS), jnp.ones(B))
    methods = [
        with_steps(method, 3)
        for method in (
            Absgd(Annealed(-4.0, -1.0, 4)),
            WithinClass(Annealed(-4.0, -1.0, 4), 0.1),
            RobustLoss("gce", Annealed(4.0, 1.0, 4)),
        )
    ]
    states = [method.init(KERNEL, (12, C)) for method in methods]
    p = given(probabilities(KERNEL))
    for step in range(12):
        lam = np.interp(step, [0, 4], [-4, -1])
        infos = []
        for i, method in enumerate(methods):
            _, states[i], info = method.gradient(losses, jnp.array(KERNEL), states[i], batch, None)
            infos.append(info)
        for info in infos[:2]:
            np.testing.assert_allclose(info.temperature, lam, rtol=1e-6)
        np.testing.assert_allclose(infos[2].weights, p ** (-1 / lam), rtol=1e-4)  # q = -1/λ
    assert with_steps(Absgd(-1.0), 3) == Absgd(-1.0)


def test_weights_within_a_class_are_bounded():
    """The first batch is taken by SGD; then a loss is compared to its class's mean in that batch, and bounded."""
    lam, bound = 0.8, 1.2
    method = WithinClass(lam, 0.1, bound)
    with jax.enable_x64(True):
        state = method.init(None, (9, C))
    first, second = (-WEIGHTS * np.log(given(probabilities(kernel))) for kernel in (KERNEL, 2 * KERNEL))
    _, state, info = gradient(method, state)
    np.testing.assert_allclose(info.weights, 1, rtol=1e-9)
    _, _, info = gradient(method, state, kernel=2 * KERNEL)
    largest = 0
    for c in np.unique(LABELS):
        own = c == LABELS
        tilted = np.exp((second[own] - first[own].mean()) / lam)
        largest = max(largest, tilted.max())
        tilted = np.minimum(tilted, bound)
        np.testing.assert_allclose(info.weights[own], tilted / tilted.mean(), rtol=1e-6)
    assert largest > bound


def test_early_learning():
    """Two visits of the same examples, the target without a gradient."""
    places, method = np.array([8, 1, 3, 0, 5, 6, 2]), EarlyLearning(3.0, beta=0.7)
    with jax.enable_x64(True):
        state = method.init(None, (9, C))
    memory = np.zeros((9, C))
    for _ in range(2):
        grads, state, _ = gradient(method, state, places)
        memory[places] = 0.7 * memory[places] + 0.3 * probabilities(KERNEL)
        target = memory[places]

        def mean(kernel, target=target):
            p = probabilities(kernel)
            return np.mean(WEIGHTS * (-np.log(given(p)) + 3 * np.log(1 - (p * target).sum(axis=1))))

        np.testing.assert_allclose(state, memory, rtol=1e-6)
        np.testing.assert_allclose(grads, difference_quotient(mean, KERNEL), rtol=1e-5, atol=1e-8)
