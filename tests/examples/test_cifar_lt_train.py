"""CIFAR example: the network, the schedule, the losses and the compiled epoch."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import absgd_jax
from examples.cifar_lt.augment import MEAN, STD, crop_and_flip, normalise, pad
from examples.cifar_lt.configs import CONFIGS
from examples.cifar_lt.conv import conv3x3
from examples.cifar_lt.models import ResNet, shortcut
from examples.cifar_lt.objective import make_objective
from examples.cifar_lt.schedule import make_learning_rate, temperature_rules
from examples.cifar_lt.train import Data, make_functions

COUNTS = np.array([12, 10, 9, 8, 7, 6, 5, 4, 4, 3])  # 68 images: 4 steps of 16, 4 images dropped
TINY = dataclasses.replace(CONFIGS["smoke"], batch_size=16, epochs=5, width=2)


@pytest.mark.parametrize(
    ("depth", "count"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_parameter_counts_are_the_published_ones(depth, count):
    model = nnx.eval_shape(lambda key: ResNet(depth, 10, rngs=nnx.Rngs(key)), jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


def test_shapes_and_cosines():
    model = ResNet(8, 100, width=4, cosine=True, rngs=nnx.Rngs(0))
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    cosines = model(images, train=True)
    assert cosines.shape == (2, 100)
    assert float(jnp.max(jnp.abs(cosines))) <= 1 + 1e-6
    with pytest.raises(ValueError, match="depth=9.*6n \\+ 2"):
        ResNet(9, 10, rngs=nnx.Rngs(0))


def test_initialisation_is_he():
    kernel = ResNet(8, 10, width=64, rngs=nnx.Rngs(0)).blocks[0].first.kernel[...]
    assert float(jnp.std(kernel)) == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.02)


def test_shortcut_is_option_a():
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
    y = np.asarray(shortcut(jnp.asarray(x), 2, 8))
    assert y.shape == (2, 4, 4, 8)
    for row in range(4):
        for column in range(4):
            np.testing.assert_array_equal(y[:, row, column, 2:6], x[:, 2 * row, 2 * column])
    assert not y[..., :2].any()
    assert not y[..., 6:].any()
    np.testing.assert_array_equal(shortcut(jnp.asarray(x), 1, 4), x)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_and_its_gradient(stride):
    x, kernel = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jax.random.normal(jax.random.key(1), (3, 3, 3, 4))
    framed = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = sum(
        framed[:, i : i + 8 : stride, j : j + 8 : stride] @ np.asarray(kernel[i, j], np.float64)
        for i in range(3)
        for j in range(3)
    )
    np.testing.assert_allclose(conv3x3(x, kernel, stride), expected, atol=1e-5)

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    direction = jax.random.normal(jax.random.key(2), expected.shape)
    ours = jax.vjp(lambda *a: conv3x3(*a, stride), x, kernel)[1](direction)
    for gradient, truth in zip(ours, jax.vjp(plain, x, kernel)[1](direction), strict=True):
        np.testing.assert_allclose(gradient, truth, atol=2e-5)


def test_crops_and_flips_are_parts_of_the_framed_image():
    images = np.random.default_rng(0).integers(1, 256, (3, 32, 32, 3), np.uint8)
    batch = jnp.array([2, 0, 1] * 40)
    crops = np.asarray(crop_and_flip(pad(jnp.asarray(images)), batch, jax.random.key(0)))
    framed = np.zeros((3, 40, 40, 3), np.uint8)
    framed[:, 4:36, 4:36] = images
    seen = set()
    for crop, i in zip(crops, np.asarray(batch), strict=True):
        found = [
            (top, left, flipped)
            for top in range(9)
            for left in range(9)
            for flipped in (False, True)
            if np.array_equal(framed[i, top : top + 32, left : left + 32][:, :: -1 if flipped else 1], crop)
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert 0.3 < np.mean([flipped for *_, flipped in seen]) < 0.7


def test_normalisation():
    pixels = jnp.full((1, 1, 1, 3), 255, jnp.uint8)
    np.testing.assert_allclose(normalise(pixels)[0, 0, 0], (1 - np.array(MEAN)) / np.array(STD), rtol=1e-6)


def test_the_paper_s_schedule():
    paper = dataclasses.replace(CONFIGS["paper"], temperature=2.0)
    assert (paper.depth, paper.epochs, paper.batch_size, paper.momentum, paper.weight_decay) == (32, 200, 128, 0.9, 2e-4)
    steps = 96
    rate, rule = make_learning_rate(paper, steps), temperature_rules(paper, steps)[0]
    for epoch, expected in [(0, 0.02), (3, 0.08), (4, 0.1), (159, 0.1), (160, 1e-3), (179, 1e-3), (180, 1e-5)]:
        for step in (epoch * steps, (epoch + 1) * steps - 1):
            assert float(rate(jnp.asarray(step))) == pytest.approx(expected, rel=1e-5)
            assert float(rule(step)) == (2.0 if epoch >= 160 else math.inf)


@pytest.mark.parametrize("name", ["ce", "focal", "ldam", "balanced-softmax", "logit-adjustment"])
def test_class_weights_are_deferred(name):
    logits, labels = jax.random.normal(jax.random.key(0), (6, 10)), jnp.array([0, 9, 5, 0, 9, 9])
    plain = make_objective(name, COUNTS, 4)(logits, labels, jnp.int32(4))
    if name in ("ce", "focal", "ldam"):
        weighted = make_objective(f"cb-{name}", COUNTS, 4)
        np.testing.assert_allclose(weighted(logits, labels, jnp.int32(3)), plain, rtol=1e-6)
        effective = (1 - 0.9999) / (1 - 0.9999 ** COUNTS.astype(float))
        weights = effective / effective.sum() * 10
        np.testing.assert_allclose(weighted(logits, labels, jnp.int32(4)), weights[labels] * plain, rtol=1e-3)
    if name == "balanced-softmax":
        prior = jnp.log(jnp.asarray(COUNTS, jnp.float32))
        truth = optax.softmax_cross_entropy_with_integer_labels(logits + prior, labels)
        np.testing.assert_allclose(plain, truth, rtol=1e-5)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), COUNTS)
    images = rng.integers(0, 100, (len(labels), 32, 32, 3), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[3 * label : 3 * label + 3] += 150
    return Data(jnp.asarray(images), jnp.asarray(labels, jnp.int32))


def close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.parametrize("changes", [{"temperature": 1.0}, {"kl_radius": 0.5}], ids=["absgd", "kl-radius"])
def test_the_compiled_epoch_is_its_steps_in_a_loop(data, changes):
    config = dataclasses.replace(TINY, **changes)
    functions, rules = make_functions(config, COUNTS), temperature_rules(config, 4)
    train_epoch, step = jax.jit(functions.train_epoch), jax.jit(functions.step)
    state = jax.jit(functions.init)(0)._replace(epoch=jnp.int32(4))  # the second stage
    opt_state = state.opt_state[0]._replace(count=jnp.int32(16), temperature=rules[1](16) if callable(rules[1]) else jnp.float32(jnp.inf))
    state = state._replace(opt_state=(opt_state, *state.opt_state[1:]))
    end, metrics = train_epoch(state, data, rules[1])

    batches, keys = functions.plan(state, 68)
    assert len(np.unique(batches)) == batches.size == 64
    losses, sizes = [], []
    for batch, key in zip(batches, keys, strict=True):
        images = normalise(crop_and_flip(pad(data.images), batch, key))
        state, seen = step(state, images, data.labels[batch], rules[1])
        losses.append(float(seen.loss))
        sizes.append(float(seen.ess))
    close(end.params, state.params, rtol=1e-4, atol=1e-6)
    close(end.batch_stats, state.batch_stats, rtol=1e-4, atol=1e-6)
    close(end.opt_state, state.opt_state, rtol=1e-4, atol=1e-5)
    assert int(end.epoch) == 5
    assert float(metrics.loss) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(metrics.ess) == pytest.approx(np.mean(sizes), rel=1e-4)
    assert 0 < float(metrics.ess) < 1
    assert float(metrics.lr) == pytest.approx(1e-3, rel=1e-5)  # 0.1 after two decays by 0.1


def test_a_step_at_infinity_is_momentum_sgd_of_the_mean(data):
    functions, rule = make_functions(TINY, COUNTS), temperature_rules(TINY, 4)[0]
    state = jax.jit(functions.init)(0)
    images, labels = normalise(data.images[::4]), data.labels[::4]
    graphdef, *_ = nnx.split(ResNet(8, 10, width=2, rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def mean_loss(params, batch_stats):
        model = nnx.merge(graphdef, params, batch_stats, copy=True)
        logits = model(images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), nnx.state(model, nnx.BatchStat)

    params, stats = state.params, state.batch_stats
    momentum = jax.tree.map(jnp.zeros_like, params)
    step = jax.jit(functions.step)
    gradient = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))
    for _ in range(2):
        (loss, stats), grads = gradient(params, stats)
        momentum = jax.tree.map(lambda m, g, p: 0.9 * m + g + 2e-4 * p, momentum, grads, params)
        params = jax.tree.map(lambda p, m: p - 0.1 * m, params, momentum)  # one epoch of warm-up: 0.1 at once
        state, metrics = step(state, images, labels, rule)
        assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-5)
        assert float(metrics.ess) == pytest.approx(1)
    close(state.params, params, rtol=1e-3, atol=1e-5)
    close(state.batch_stats, stats, rtol=1e-3, atol=1e-5)


def test_epochs_reduce_the_loss_and_draw_other_batches(data):
    config = dataclasses.replace(TINY, learning_rate=0.05, width=4)
    functions, rule = make_functions(config, COUNTS), temperature_rules(config, 4)[0]
    state, train_epoch = jax.jit(functions.init)(0), jax.jit(functions.train_epoch, donate_argnums=0)
    losses, plans = [], []
    for _ in range(4):
        plans.append(np.asarray(functions.plan(state, 68)[0]))
        state, metrics = train_epoch(state, data, rule)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0]
    assert not np.array_equal(plans[0], plans[1])
    assert set(plans[0].ravel()) != set(plans[1].ravel())  # another set of examples is dropped
    assert train_epoch._cache_size() == 1  # nothing is compiled again


def test_evaluation_counts_each_example_once(data):
    functions = make_functions(TINY, COUNTS)
    state = jax.jit(functions.init)(0)
    correct = jax.jit(functions.evaluate)(state, data)
    graphdef, *_ = nnx.split(ResNet(8, 10, width=2, rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
    model = nnx.merge(graphdef, state.params, state.batch_stats, copy=True)
    hits = np.argmax(model(normalise(data.images), train=False), -1) == np.asarray(data.labels)
    assert correct.tolist() == np.bincount(np.asarray(data.labels), hits, minlength=10).tolist()


def test_seeds_and_temperatures_can_be_vectorised(data):
    config = dataclasses.replace(TINY, temperature=1.0, epochs=1, batch_size=32)
    functions, (rule, _) = make_functions(config, COUNTS), temperature_rules(config, 2)
    rules = jax.tree.map(lambda *x: jnp.stack(x), *(_with_temperature(rule, t) for t in (0.5, 2.0)))
    states = jax.vmap(functions.init)(jnp.arange(2))
    _, metrics = jax.jit(jax.vmap(functions.train_epoch, (0, None, 0)))(states, data, rules)
    for i, temperature in enumerate((0.5, 2.0)):
        alone = jax.jit(functions.train_epoch)(functions.init(i), data, _with_temperature(rule, temperature))[1]
        assert float(metrics.loss[i]) == pytest.approx(float(alone.loss), rel=1e-3)


def _with_temperature(rule, temperature):
    _, start = rule.args
    return jax.tree_util.Partial(rule.func, jnp.float32(temperature), jnp.int32(start))


def test_kl_radius_follows_the_state_of_the_first_stage(data):
    config = dataclasses.replace(TINY, kl_radius=0.5)
    functions, (first, second) = make_functions(config, COUNTS), temperature_rules(config, 4)
    train_epoch = jax.jit(functions.train_epoch)
    state, metrics = train_epoch(jax.jit(functions.init)(0), data, first)
    assert math.isinf(metrics.temperature)
    state, metrics = train_epoch(state, data, second)
    assert 0 < float(metrics.temperature) < math.inf
    assert isinstance(state.opt_state[0], absgd_jax.ScaleByAbsgdState)
