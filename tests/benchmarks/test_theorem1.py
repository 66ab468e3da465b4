"""Benchmark: Theorem 1."""

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import theorem1


def test_slopes_of_power_laws_are_found():
    lengths = np.array([256, 512, 1024, 2048])
    values = np.array([[3.0], [5.0], [4.0]]) * lengths[None, :] ** -0.7
    assert theorem1.slope(lengths, values) == pytest.approx((-0.7, 0), abs=1e-9)


@pytest.mark.parametrize("method", list(theorem1.METHODS))
def test_every_method_starts_alike_and_stays_finite(method):
    # With no step taken all methods see the gradient at the same start.
    one = theorem1.mean_squared_gradient(method, jnp.int32(1), jnp.int32(3))
    assert float(one) == pytest.approx(float(theorem1.mean_squared_gradient("SCGD", jnp.int32(1), jnp.int32(3))))
    many = theorem1.mean_squared_gradient(method, jnp.int32(300), jnp.int32(3))
    assert 0 < float(many) < 100


def test_points_and_labels():
    x, y = theorem1.problem()
    assert x.shape == (200, 10)
    assert set(np.unique(y)) == {0.0, 1.0}
