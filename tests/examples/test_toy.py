"""The toy example: its steps are those of the formulas, its docstring says what it gives, the command draws it."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from examples import toy

PARAMS = np.array([0.4, -0.3, 0.2])


def losses_and_gradients(params, x, y):
    """Logistic loss of every example, and its gradient, in float64."""
    z = x @ params[:2] + params[2]
    gradients = (1 / (1 + np.exp(-z)) - y)[:, None] * np.column_stack([x, np.ones(len(x))])
    return np.log1p(np.exp(np.where(y == 1, -z, z))), gradients


@pytest.mark.parametrize("temperature", [0.2, 0.5, -1.0, np.inf])
def test_a_step_is_a_gradient_step_with_softmax_weights_of_mean_1(temperature):
    x, y = toy.draw(seed=1)
    losses, gradients = losses_and_gradients(PARAMS, x, y)
    softmax = np.exp(losses / temperature) / np.exp(losses / temperature).sum()
    params, weights = toy.step(jnp.array(PARAMS), x, y, temperature)
    np.testing.assert_allclose(params, PARAMS - toy.LEARNING_RATE * softmax @ gradients, rtol=1e-5)
    np.testing.assert_allclose(weights, len(x) * softmax, rtol=1e-4)


def test_balanced_accuracy_counts_the_classes_alike():
    x, y = np.array([[1.0, 0.0], [-1.0, 0.0], [-2.0, 0.0], [-3.0, 0.0], [5.0, 0.0]]), np.array([0, 0, 0, 0, 1])
    assert toy.balanced_accuracy(jnp.array([1.0, 0.0, 0.0]), x, y) == pytest.approx((75 + 100) / 2)


def test_the_docstring_says_what_happens():
    def accuracies(seed):
        x, y = toy.draw(seed)
        before, steps = toy.compare(x, y)
        return [toy.balanced_accuracy(params, x, y) for params in (before, *(params for params, _ in steps.values()))]

    every = np.array([accuracies(seed) for seed in range(100)])
    np.testing.assert_allclose(every[0], [65, 70, 90])
    np.testing.assert_array_equal(every.mean(0).round(), [69, 70, 88])

    x, y = toy.draw(seed=0)
    before, steps = toy.compare(x, y)
    (sgd, _), (absgd, _) = steps.values()
    length = np.linalg.norm(absgd - before) / np.linalg.norm(sgd - before)
    assert length == pytest.approx(2.5, abs=0.1)
    assert toy.balanced_accuracy(before + length * (sgd - before), x, y) == pytest.approx(75)
    params, reached = before, []
    for _ in range(30):
        params, _ = toy.step(params, x, y, jnp.inf)
        reached.append(toy.balanced_accuracy(params, x, y) > 89)
    assert reached.index(True) + 1 == pytest.approx(30, abs=2)


def test_the_command_writes_a_figure(tmp_path, capsys):
    toy.main(tmp_path / "new" / "toy.png")
    assert (tmp_path / "new" / "toy.png").read_bytes().startswith(b"\x89PNG")
    assert "70 with SGD and 90 with ABSGD" in capsys.readouterr().out


def test_bad_arguments_exit_with_two():
    command = [sys.executable, "-m", "examples.toy", "--nonsense"]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 2
