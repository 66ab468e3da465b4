"""CIFAR example: the network, the schedule, the losses and the compiled epoch."""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from examples.cifar_lt.augment import MEAN, STD, crop_and_flip, normalise, pad
from examples.cifar_lt.configs import CONFIGS
from examples.cifar_lt.conv import conv3x3
from examples.cifar_lt.models import ConvNorm, ResNet, shortcut
from examples.cifar_lt.objective import class_weights, index_of, make_objective
from examples.cifar_lt.programs import over_runs, stack
from examples.cifar_lt.schedule import learning_rate, make_hyper
from examples.cifar_lt.train import Batch, Data, Functions, augmented, make_functions

COUNTS = np.array([12, 10, 9, 8, 7, 6, 5, 4, 4, 3])  # 68 images: 4 steps of 16, 4 images dropped
TINY = dataclasses.replace(CONFIGS["smoke"], batch_size=16, epochs=5, width=2, temperature=1.0)
STEPS = 4


@pytest.mark.parametrize(
    ("depth", "count"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_parameter_counts_are_the_published_ones(depth, count):
    model = nnx.eval_shape(lambda key: ResNet(depth, 10, rngs=nnx.Rngs(key)), jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count


def test_shapes_and_cosines():
    @jax.jit
    def cosines_of(images):
        return ResNet(8, 100, width=2, cosine=True, rngs=nnx.Rngs(jax.random.key(0)))(images, train=True)

    cosines = cosines_of(jax.random.normal(jax.random.key(0), (2, 32, 32, 3)))
    assert cosines.shape == (2, 100)
    assert float(jnp.max(jnp.abs(cosines))) <= 1 + 1e-6
    with pytest.raises(ValueError, match=r"depth=9.*6n \+ 2"):
        ResNet(9, 10, rngs=nnx.Rngs(0))


def test_in_bfloat16_only_the_images_between_the_layers_are():
    def loss(model, images):
        logits = model(images, train=True)
        return jnp.sum(logits[:, 0]), (logits, nnx.state(model, nnx.BatchStat))

    @partial(jax.jit, static_argnums=0)
    def run(dtype, images):
        model = ResNet(8, 10, width=4, dtype=dtype, rngs=nnx.Rngs(0))
        (_, seen), grads = nnx.value_and_grad(loss, has_aux=True)(model, images)
        return seen, grads, model.stem(images.astype(dtype), train=True)

    images = jax.random.normal(jax.random.key(0), (16, 32, 32, 3))
    half, single = run(jnp.bfloat16, images), run(jnp.float32, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(half[:2])} == {jnp.dtype("float32")}
    assert half[2].dtype == jnp.bfloat16
    (logits, _), (truth, _) = half[0], single[0]
    assert 0 < float(jnp.max(jnp.abs(logits - truth))) < 0.1 * float(jnp.max(jnp.abs(truth)))


def test_initialisation_is_he():
    kernel = ConvNorm(64, 64, rngs=nnx.Rngs(0)).kernel[...]
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
    assert (paper.depth, paper.epochs, paper.batch_size) == (32, 200, 128)
    assert (paper.momentum, paper.weight_decay, paper.learning_rate) == (0.9, 2e-4, 0.1)
    counts, steps = np.array([12_406]), 96
    hyper = make_hyper(paper, counts, 0)
    for epoch, expected in [(0, 0.02), (3, 0.08), (4, 0.1), (159, 0.1), (160, 1e-3), (179, 1e-3), (180, 1e-5)]:
        assert float(learning_rate(paper, hyper, jnp.int32(epoch))) == pytest.approx(expected, rel=1e-5)
        for step in (epoch * steps, (epoch + 1) * steps - 1):
            assert float(hyper.temperature(step)) == (2.0 if epoch >= 160 else math.inf)


def test_losses_by_index_and_class_weights():
    logits, labels = jax.random.normal(jax.random.key(0), (6, 10)), jnp.array([0, 9, 5, 0, 9, 9])
    objective, prior = make_objective(COUNTS), np.log(COUNTS)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)[np.arange(6), labels]
    adjusted = np.asarray(jax.nn.log_softmax(logits + prior), np.float64)[np.arange(6), labels]
    truths = {
        "ce": -log_p,
        "focal": -((1 - np.exp(log_p)) ** 2) * log_p,
        "balanced-softmax": -adjusted,
        "logit-adjustment": -adjusted,  # the same at τ = 1: the logits differ by a constant
    }
    for name, truth in truths.items():
        np.testing.assert_allclose(objective(jnp.int32(index_of(name)), logits, labels), truth, rtol=1e-4)
    assert index_of("cb-focal") == index_of("focal") == 1
    # All at once, as when runs with several losses train together, gradients included.
    together = jax.vmap(jax.grad(lambda x, i: objective(i, x, labels).sum()), (None, 0))(100 * logits, jnp.arange(4))
    for i, gradient in enumerate(together):
        alone = jax.grad(lambda x, i=i: objective(i, x, labels).sum())(100 * logits)
        np.testing.assert_allclose(gradient, alone, rtol=1e-4, atol=1e-6)
    effective = (1 - 0.9999) / (1 - 0.9999 ** COUNTS.astype(float))
    np.testing.assert_allclose(class_weights("cb-ce", COUNTS), effective / effective.sum() * 10, rtol=1e-3)
    np.testing.assert_array_equal(class_weights("ce", COUNTS), 1)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), COUNTS)
    images = rng.integers(0, 100, (len(labels), 32, 32, 3), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[3 * label : 3 * label + 3] += 150
    return Data(jnp.asarray(images), jnp.asarray(labels, jnp.int32))


class Compiled(NamedTuple):
    functions: Functions
    init: Any
    step: Any
    train_epoch: Any
    evaluate: Any


@pytest.fixture(scope="module")
def compiled():
    functions = make_functions(TINY, COUNTS)
    init, step, evaluate = jax.jit(functions.init), jax.jit(functions.step), jax.jit(functions.evaluate)
    return Compiled(functions, init, step, jax.jit(functions.train_epoch), evaluate)


def tiny_network():
    model = nnx.eval_shape(lambda key: ResNet(8, 10, width=2, rngs=nnx.Rngs(key)), jax.random.key(0))
    return nnx.split(model, nnx.Param, nnx.BatchStat)[0]


def hyper_of(epoch=0, **changes):
    return make_hyper(dataclasses.replace(TINY, **changes), COUNTS, epoch)


def in_second_stage(compiled, state, hyper):
    """A state as the first stage hands it over."""
    absgd_state = state.opt_state[0]._replace(count=jnp.int32(4 * STEPS), temperature=jnp.float32(jnp.inf))
    state = state._replace(epoch=jnp.int32(4), opt_state=(absgd_state, *state.opt_state[1:]))
    return compiled.functions.take_over(state, hyper)


def close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.parametrize("method", ["absgd", "kl-radius"])
def test_the_compiled_epoch_is_its_steps_in_a_loop(compiled, data, method):
    hyper = hyper_of(4, **({} if method == "absgd" else {"temperature": math.inf, "kl_radius": 0.5}))
    state = in_second_stage(compiled, compiled.init(hyper), hyper)
    assert float(state.opt_state[0].temperature) == (1 if method == "absgd" else math.inf)
    end, metrics = compiled.train_epoch(state, data, data, hyper)

    batches, keys = compiled.functions.plan(state, data.labels, hyper)
    assert len(np.unique(batches)) == batches.size == 64
    losses, sizes = [], []
    for batch, key in zip(batches, keys, strict=True):
        images, labels = normalise(crop_and_flip(pad(data.images), batch, key)), data.labels[batch]
        state, seen = compiled.step(state, Batch(images, labels, labels, 1), None, hyper)
        losses.append(float(seen.loss))
        sizes.append(float(seen.ess))
    close(end.params, state.params, rtol=1e-3, atol=1e-5)
    close(end.batch_stats, state.batch_stats, rtol=1e-3, atol=1e-5)
    close(end.opt_state, state.opt_state, rtol=1e-3, atol=1e-4)
    assert int(end.epoch) == 5
    assert float(metrics.loss) == pytest.approx(np.mean(losses), rel=1e-4)
    assert float(metrics.ess) == pytest.approx(np.mean(sizes), rel=1e-3)
    assert 0 < float(metrics.ess) < 1
    assert 0 < float(metrics.temperature) < math.inf
    assert float(metrics.lr) == pytest.approx(0.01)  # one decay by 0.1


def test_a_step_at_infinity_is_momentum_sgd_of_the_mean(compiled, data):
    hyper, graphdef = hyper_of(), tiny_network()
    state = compiled.init(hyper)
    images, labels = normalise(data.images[:64:4]), data.labels[:64:4]

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def gradient(params, batch_stats):
        model = nnx.merge(graphdef, params, batch_stats, copy=True)
        logits = model(images, train=True)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), nnx.state(model, nnx.BatchStat)

    params, stats = state.params, state.batch_stats
    momentum = jax.tree.map(jnp.zeros_like, params)
    for _ in range(2):
        (loss, stats), grads = gradient(params, stats)
        momentum = jax.tree.map(lambda m, g, p: 0.9 * m + g + 2e-4 * p, momentum, grads, params)
        params = jax.tree.map(lambda p, m: p - 0.1 * m, params, momentum)  # the only epoch of warm-up has 0.1 at once
        state, metrics = compiled.step(state, Batch(images, labels, labels, 1), None, hyper)
        assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-4)
        assert float(metrics.ess) == pytest.approx(1)
    close(state.params, params, rtol=1e-3, atol=1e-5)
    close(state.batch_stats, stats, rtol=1e-3, atol=1e-5)


def test_a_run_that_branches_off_sgd_is_the_run_from_the_start(compiled, data):
    sgd, absgd = hyper_of(temperature=math.inf), hyper_of(temperature=0.5, start=1)
    straight, _ = compiled.train_epoch(compiled.init(absgd), data, data, absgd)
    branched, _ = compiled.train_epoch(compiled.init(sgd), data, data, sgd)
    assert branched.opt_state[0].temperature == np.finfo(np.float32).max  # ∞
    branched = compiled.functions.take_over(branched, absgd)
    ends = [compiled.train_epoch(state, data, data, absgd)[0] for state in (straight, branched)]
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_epochs_reduce_the_loss_and_draw_other_batches(compiled, data):
    hyper, programs = hyper_of(), compiled.train_epoch._cache_size()
    state, losses, plans = compiled.init(hyper), [], []
    for _ in range(4):
        plans.append(np.asarray(compiled.functions.plan(state, data.labels, hyper)[0]))
        state, metrics = compiled.train_epoch(state, data, data, hyper)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0]
    assert not np.array_equal(plans[0], plans[1])
    assert set(plans[0].ravel()) != set(plans[1].ravel())  # another set of examples is dropped
    assert compiled.train_epoch._cache_size() <= programs + 1  # nothing is compiled between epochs


def test_images_are_cut_out_and_mixed_as_told(data):
    key, places, padded = jax.random.key(0), jnp.arange(68), pad(data.images)
    plain = augmented(padded, data.labels, places, key, hyper_of())
    assert float(plain.share) == 1
    np.testing.assert_array_equal(plain.images, normalise(crop_and_flip(padded, places, key)))

    cut = np.all(np.asarray(augmented(padded, data.labels, places, key, hyper_of(cutout=9)).images) == 0, -1)
    rows, columns = cut.any(2).sum(1), cut.any(1).sum(1)
    np.testing.assert_array_equal(cut.sum((1, 2)), rows * columns)  # one rectangle each
    assert max(rows) == max(columns) == 9
    assert min(*rows, *columns) < 9  # partly outside
    np.testing.assert_array_equal(cut.any(2).sum(), rows.sum())

    mixed = augmented(padded, data.labels, places, key, hyper_of(mixup=True))
    share = float(mixed.share)
    assert 0 < share < 1
    truth = share * np.asarray(plain.images) + (1 - share) * np.roll(plain.images, 1, 0)
    np.testing.assert_allclose(mixed.images, truth, atol=1e-5)
    np.testing.assert_array_equal(mixed.others, np.roll(data.labels, 1))


@pytest.mark.parametrize(("trained", "still"), [("all", 0), ("last-block", 2), ("classifier", 3)])
def test_the_second_stage_trains_what_it_is_told_to(compiled, data, trained, still):
    hyper = hyper_of(4, trained=trained, label_smoothing=0.1)
    before = in_second_stage(compiled, compiled.init(hyper), hyper)
    after, _ = compiled.train_epoch(before, data, data, hyper)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before.params, after.params)
    blocks = moved["blocks"]
    seen = [
        any(jax.tree.leaves(part)) for part in (moved["stem"], blocks[0], blocks[1], blocks[2], moved["classifier"])
    ]
    assert seen == [i >= {0: 0, 2: 3, 3: 4}[still] for i in range(5)]


def test_smoothed_and_mixed_losses(compiled, data):
    """The first step's mean loss, of all labels with the weights that the definitions give them."""
    hyper = hyper_of(label_smoothing=0.2, temperature=math.inf)
    state, graphdef = compiled.init(hyper), tiny_network()
    images, labels, others = normalise(data.images[::4]), data.labels[::4], jnp.roll(data.labels[::4], 1)
    model = nnx.merge(graphdef, state.params, state.batch_stats, copy=True)
    log_p = np.asarray(jax.nn.log_softmax(model(images, train=True)), np.float64)
    target = 0.7 * np.eye(10)[labels] + 0.3 * np.eye(10)[others]
    truth = -np.mean(np.sum((0.8 * target + 0.2 / 10) * log_p, -1))
    _, metrics = compiled.step(state, Batch(images, labels, others, jnp.float32(0.7)), None, hyper)
    assert float(metrics.loss) == pytest.approx(truth, rel=1e-4)


def test_balanced_batches_have_as_many_of_each_class(compiled, data):
    hyper = hyper_of(balanced_batches=True)
    state = compiled.init(hyper)
    plan = jax.jit(compiled.functions.plan)
    drawn = [plan(state._replace(epoch=jnp.int32(e)), data.labels, hyper)[0] for e in range(40)]
    shares = np.bincount(np.asarray(data.labels)[np.ravel(drawn)], minlength=10) / np.size(drawn)
    np.testing.assert_allclose(shares, 0.1, atol=5 * math.sqrt(0.09 / np.size(drawn)))


def test_evaluation_counts_each_example_once(compiled, data):
    state = compiled.init(hyper_of())

    @jax.jit
    def guesses(images):
        model = nnx.merge(tiny_network(), state.params, state.batch_stats, copy=True)
        return jnp.argmax(model(normalise(images), train=False), -1)

    labels = np.asarray(data.labels)
    hits = np.bincount(labels, np.asarray(guesses(data.images)) == labels, minlength=10)
    assert compiled.evaluate(state, data).tolist() == hits.tolist()
    assert hits.sum() > 0


def test_runs_that_train_together_are_those_that_train_alone(compiled, data):
    changes = [{"seed": 0, "temperature": 0.5}, {"seed": 1, "temperature": 2.0, "loss": "focal", "momentum": 0.0}]
    hypers = [hyper_of(4, **change) for change in changes]
    states = [in_second_stage(compiled, compiled.init(hyper), hyper) for hyper in hypers]
    arguments = stack(states), data, data, stack(hypers)
    _, together = jax.jit(over_runs(compiled.functions.train_epoch, arguments, 2))(*arguments)
    alone = [compiled.train_epoch(s, data, data, h)[1] for s, h in zip(states, hypers, strict=True)]
    close(together, stack(alone), rtol=1e-2)
    assert together.temperature.tolist() == [0.5, 2.0]


@pytest.mark.parametrize("name", ["ncm", "lws"])
def test_a_refitted_classifier_is_evaluated_like_any(compiled, data, name):
    functions = compiled.functions
    state = compiled.init(hyper_of())
    refitted = jax.jit(functions.refit[name])(state, data)
    assert jax.tree.structure(refitted) == jax.tree.structure(state)
    features = np.asarray(jax.jit(functions.features)(refitted, data))
    assert features.shape == (68, 8)
    layer = refitted.params["classifier"]
    guesses = np.argmax(features @ np.asarray(layer["kernel"][...]) + np.asarray(layer["bias"][...]), -1)
    labels = np.asarray(data.labels)
    hits = np.bincount(labels, guesses == labels, minlength=10)
    assert compiled.evaluate(refitted, data).tolist() == hits.tolist()
    assert hits.sum() > compiled.evaluate(state, data).sum()
