"""The demo: its data are what they say, λ = ∞ is SGD, and the command writes what it promises."""

import dataclasses
import json
import runpy
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.digits import annealing, data, experiment, main, models, train
from examples.digits.experiment import SETTINGS, draw, noisy_labels, noisy_long_tail


def test_splits_are_disjoint_stratified_and_complete():
    splits = data.load()
    assert [len(s.y) for s in splits] == [1077, 360, 360]
    images = {s.x[i].tobytes() for s in splits for i in range(len(s.y))}
    assert len(images) == 1797  # no image is in two splits, none is twice in one
    for split in splits:
        np.testing.assert_allclose(np.bincount(split.y) / len(split.y), 0.1, atol=0.006)


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


def test_the_long_tail_has_its_class_counts():
    full, *_ = data.load()
    kept = data.long_tail(full, np.random.default_rng(0))
    largest = np.bincount(full.y).min()
    np.testing.assert_array_equal(np.bincount(kept.y), np.round(largest * 10.0 ** (-np.arange(10) / 9)))
    assert len({x.tobytes() for x in kept.x}) == len(kept.y)


def test_generalised_cross_entropy_as_weights_has_its_gradient():
    losses, q = jnp.array([0.1, 1.0, 4.0]), 0.7
    weighting = experiment.generalised(q, steps=9)
    by_weights = jax.grad(lambda x: jnp.mean(weighting.update(x, weighting.init(), None)[0] * x))(losses)
    by_loss = jax.grad(lambda x: jnp.mean((1 - jnp.exp(-q * x)) / q))(losses)
    np.testing.assert_allclose(by_weights, by_loss, rtol=1e-6)


@pytest.mark.parametrize("name", ["absgd_annealed", "absgd_within_annealed", "generalised_annealed"])
def test_annealed_weights_are_in_proportion_to_exponentials_of_the_step_s_temperature(name):
    weighting, losses, labels = getattr(experiment, name)(-1.0, 12), np.array([0.1, 1.0, 4.0]), jnp.zeros(3, int)
    state = weighting.init()
    for lam in (-4.0, -3.25, -2.5, -1.75, -1.0, -1.0, -1.0):  # a third of the steps, then it stays
        weights, state = weighting.update(jnp.float32(losses), state, labels)
        np.testing.assert_allclose(
            weights / weights.sum(), np.exp(losses / lam) / np.exp(losses / lam).sum(), rtol=1e-5
        )


def test_infinite_temperature_is_optax_sgd_with_a_cosine():
    full, validation, _ = data.load()
    x, y = jnp.array(full.x[:100]), jnp.array(full.y[:100])
    key = jax.random.key(0)
    params = models.init(key, (64, 8, 10))
    ours, _ = train.train(
        params, train.Data(x, y, jnp.zeros(100)), data.Split(jnp.array(validation.x), jnp.array(validation.y)), key,
        rule=partial(experiment.absgd, jnp.inf), counts=np.ones(10), learning_rate=0.1, batch_size=32, passes=2,
    )  # fmt: skip
    cosine = optax.cosine_decay_schedule(0.1, decay_steps=6)
    optimizer = optax.sgd(cosine, momentum=0.9)
    state = optimizer.init(params)

    def mean_loss(params, batch):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(models.logits(params, x[batch]), y[batch]))

    @jax.jit
    def step(params, state, batch):
        updates, state = optimizer.update(jax.grad(mean_loss)(params, batch), state)
        return optax.apply_updates(params, updates), state

    for pass_key in jax.random.split(key, 2):
        for batch in jax.random.permutation(pass_key, 100)[:96].reshape(3, 32):
            params, state = step(params, state, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, params)


def test_labels_are_as_wrong_for_tuning_as_for_training_and_right_for_the_test():
    full, validation, test = data.load()
    setting = noisy_labels(0.4)
    drawn, tuned_on = draw(setting, full, validation, 0, noisy=True)
    assert np.sum(tuned_on.y != validation.y) == round(0.4 * len(validation.y))
    np.testing.assert_array_equal(drawn.special, drawn.y != full.y)
    again, tested_on = draw(setting, full, test, 0, noisy=False)
    np.testing.assert_array_equal(tested_on.y, test.y)
    np.testing.assert_array_equal(again.y, drawn.y)


def test_a_noisy_long_tail_is_tuned_and_tested_on_balanced_classes():
    full, validation, test = data.load()
    setting = noisy_long_tail(0.3)
    drawn, tuned_on = draw(setting, full, validation, 0, noisy=True)
    assert np.mean(drawn.special) == pytest.approx(0.3, abs=0.002)
    assert len(drawn.y) == len(data.long_tail(full, np.random.default_rng(0)).y)
    assert len(tuned_on.y) == len(validation.y)
    np.testing.assert_array_equal(draw(setting, full, test, 0, noisy=False)[1].y, test.y)


def test_the_command_writes_what_it_promises_and_the_weights_do_what_the_mission_says(tmp_path, capsys, monkeypatch):
    """λ > 0 lifts the rare classes; λ < 0, given, found or within classes, silences the wrong labels."""
    monkeypatch.setattr(experiment, "TOGETHER", 4)
    tiny = {"sizes": (64, 10), "rates": (0.1,)}
    settings = [dataclasses.replace(setting, **tiny) for setting in (SETTINGS[0], noisy_labels(0.4), SETTINGS[-1])]
    main.main(main.Options(out=tmp_path, seeds=2), settings=settings)
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert "ABSGD, fraction known" in capsys.readouterr().out
    written = json.loads((tmp_path / "digits.json").read_text())["settings"]
    for setting, result in zip(settings, written, strict=True):
        assert list(result["methods"]) == list(setting.methods)
        for method in result["methods"].values():
            assert method["accuracy"][0] == pytest.approx(np.mean(method["accuracy_per_seed"]), abs=0.01)
            assert method["accuracy"][0] == pytest.approx(np.mean(method["per_class"]), abs=0.01)
    lifted, silenced, both = ({name: m["weight_by_record"][-1] for name, m in r["methods"].items()} for r in written)
    assert min(lifted["ABSGD, λ tuned"], lifted["ABSGD, ρ tuned"]) > 2
    assert max(silenced[f"ABSGD, {way}"] for way in ("λ tuned", "λ annealed", "fraction known")) < 0.5
    assert max(both["ABSGD within classes"], both["… λ annealed"], both["… q annealed"]) < 0.5
    assert lifted["SGD"] == pytest.approx(1, abs=1e-3)
    assert silenced["SGD"] == pytest.approx(1, abs=1e-3)
    assert both["Balanced softmax"] == pytest.approx(1, abs=1e-3)


def test_annealing_from_a_value_to_itself_is_that_value(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "TOGETHER", 4)
    names = ("SGD", "fixed -4", "annealed -4", "annealed -0.7")
    for i in (1, 3):  # all classes together, and within classes
        whole = annealing.SETTINGS[i]
        tiny = dataclasses.replace(whole, sizes=(64, 10), rates=(0.1,), methods={n: whole.methods[n] for n in names})
        annealing.main(tmp_path, [tiny], range(2))
        assert (tmp_path / "annealing.png").read_bytes().startswith(b"\x89PNG")
        (written,) = json.loads((tmp_path / "annealing.json").read_text())["settings"]
        baseline, fixed, same, other = (written["methods"][name]["accuracy_per_seed"] for name in names)
        assert fixed == same
        assert fixed not in (baseline, other)


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--nonsense"]])
def test_bad_arguments_exit_with_two(arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(main.__file__, run_name="__main__")
    assert ended.value.code == 2
