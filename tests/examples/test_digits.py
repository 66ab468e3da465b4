"""The demo: its data are what they say, λ = ∞ is SGD, and the command writes what it promises."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.progress import Progress

from examples.digits import data, main, models, train
from examples.digits.experiment import SETTINGS, Setting, run


def test_splits_are_disjoint_stratified_and_complete():
    splits = data.load()
    assert [len(s.y) for s in splits] == [1077, 360, 360]
    images = {s.x[i].tobytes() for s in splits for i in range(len(s.y))}
    assert len(images) == 1797  # no image is in two splits, none is twice in one
    for split in splits:
        np.testing.assert_allclose(np.bincount(split.y) / len(split.y), 0.1, atol=0.006)


def test_the_long_tail_has_its_counts():
    full, *_ = data.load()
    tail = data.long_tail(full, np.random.default_rng(0))
    np.testing.assert_array_equal(np.bincount(tail.y), [100, 60, 36, 22, 13, 8, 5, 3, 2, 1])
    other = data.long_tail(full, np.random.default_rng(1))
    assert not np.array_equal(tail.x, other.x)


def test_the_stream_has_its_class_frequencies():
    full, *_ = data.load()
    drawn = data.stream(full, np.random.default_rng(0))
    expected = 100.0 ** (-np.arange(10) / 9)
    frequencies = np.bincount(drawn.y, minlength=10) / len(drawn.y)
    np.testing.assert_allclose(frequencies, expected / expected.sum(), atol=0.012)


def test_wrong_labels_are_wrong_and_as_many_as_asked():
    full, *_ = data.load()
    noisy = data.wrong_labels(full, np.random.default_rng(0), rate=0.4)
    assert np.sum(noisy.y != full.y) == round(0.4 * len(full.y))
    np.testing.assert_array_equal(noisy.x, full.x)
    assert set(noisy.y) <= set(range(10))


def test_infinite_temperature_is_optax_sgd_with_a_cosine():
    full, validation, _ = data.load()
    x, y = jnp.array(full.x[:100]), jnp.array(full.y[:100])
    carry, key = train.start(0, (64, 8, 10))
    ours, _ = train.train(
        carry, train.Data(x, y, jnp.zeros(100)), data.Split(jnp.array(validation.x), jnp.array(validation.y)), key,
        learning_rate=0.1, temperature=jnp.inf, batch_size=32, passes=2,
    )  # fmt: skip
    cosine = optax.cosine_decay_schedule(0.1, decay_steps=6)
    optimizer, params = optax.sgd(cosine, momentum=0.9), carry[0]
    state = optimizer.init(params)
    for pass_key in jax.random.split(key, 2):
        for batch in jax.random.permutation(pass_key, 100)[:96].reshape(3, 32):

            def mean_loss(params, batch=batch):
                logits = models.logits(params, x[batch])
                return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y[batch]))

            updates, state = optimizer.update(jax.grad(mean_loss)(params), state)
            params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours[0], params)


def test_the_command_writes_table_json_and_figure(tmp_path, capsys):
    small = [dataclasses.replace(SETTINGS[2], sizes=(64, 10), passes=1, first_passes=1)]
    small = [dataclasses.replace(s, temperatures=(1.0,), radii=s.radii[:1]) for s in small]
    main.main(main.Options(out=tmp_path, seeds=2), settings=small, rates=(0.1,))
    result = json.loads((tmp_path / "digits.json").read_text())
    for setting in small:
        methods = result["settings"][setting.name]["methods"]
        assert list(methods) == ["SGD", "ABSGD λ", "ABSGD KL radius"]
        for method in methods.values():
            assert method["accuracy"][0] == pytest.approx(np.mean(method["accuracy_per_seed"]), abs=0.01)
            assert method["accuracy"][0] == pytest.approx(np.mean(method["per_class"]), abs=0.01)
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert "ABSGD KL radius" in capsys.readouterr().out


def test_the_weights_do_what_the_mission_says():
    """λ > 0 lifts the rare classes, λ < 0 silences the wrong labels."""
    base = {"title": "", "sizes": (64, 10), "passes": 3, "watched": ""}
    lifted = Setting(name="lt", corrupt=data.long_tail, temperatures=(1.0,), **base)
    silenced = Setting(name="noise", corrupt=data.wrong_labels, temperatures=(-1.0,), **base)
    with Progress(disable=True) as progress:
        lifted, silenced = (run(setting, [0, 1], (0.1,), progress)["methods"] for setting in (lifted, silenced))
    assert lifted["ABSGD λ"]["weight_by_record"][-1] > 2
    assert silenced["ABSGD λ"]["weight_by_record"][-1] < 0.5
    assert silenced["SGD"]["weight_by_record"][-1] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--nonsense"], ["--seeds", "many"]])
def test_bad_arguments_exit_with_two(arguments):
    command = [sys.executable, "-m", "examples.digits.main", *arguments]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 2
