"""The library's own conventions: what is public, how it is documented, how it is built, how it refuses bad input."""

import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import absgd_jax

ROOT = Path(__file__).parents[1]
PUBLIC = {
    "Rule", "ScaleByAbsgdState", "abadam", "absgd", "adaptive_gamma", "attention_weights", "effective_sample_size",
    "entropic_risk", "focus_fraction", "kl_radius", "losses", "merge_risks", "scale_by_absgd", "trust_fraction",
    "value_and_grad", "weight_by_absgd", "within_groups",
}  # fmt: skip
LOSSES = {
    "balanced_softmax", "class_balanced_weights", "deferred_reweighting", "focal", "ldam", "logit_adjustment",
    "sigmoid_focal", "sigmoid_logit_adjustment",
}  # fmt: skip

LOSSES_OF_THREE = jnp.array([0.0, 1.0, 4.0])


def public_names(module):
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (value is absgd_jax.losses or getattr(value, "__module__", "").startswith("absgd_jax"))
    }


def public_functions():
    modules = (absgd_jax, absgd_jax.losses)
    functions = [getattr(module, name) for module in modules for name in public_names(module)]
    return sorted((f for f in functions if inspect.isfunction(f)), key=lambda f: f.__name__)


def test_public_names_are_exactly_these():
    assert public_names(absgd_jax) == PUBLIC
    assert public_names(absgd_jax.losses) == LOSSES


@pytest.mark.parametrize("function", public_functions(), ids=lambda f: f.__name__)
def test_every_public_function_is_documented_in_the_house_order(function):
    doc = inspect.getdoc(function)
    assert len(doc.splitlines()[0]) < 120
    assert doc.splitlines()[1] == ""
    sections = [s for s in ("Args:", "Returns:", "Raises:", "Example:", "References:") if f"\n{s}\n" in doc]
    assert {"Args:", "Returns:", "Example:"} <= set(sections)
    assert [doc.index(f"\n{s}\n") for s in sections] == sorted(doc.index(f"\n{s}\n") for s in sections)
    for name in inspect.signature(function).parameters:
        assert f"\n  {name}: " in doc, f"{name} is not documented"


def test_version_is_that_of_the_distribution_and_of_the_changelog():
    assert absgd_jax.__version__ == importlib.metadata.version("absgd_jax")
    assert f"## {absgd_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_modules_of_the_library_are_short():
    for path in (ROOT / "absgd_jax").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


def test_importing_needs_the_core_dependencies_only():
    heavy = "flax equinox matplotlib orbax rich sklearn tyro pooch hypothesis mpmath"
    code = f"import sys, absgd_jax; loaded = set('{heavy}'.split()) & set(sys.modules); assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    "make",
    [
        absgd_jax.scale_by_absgd,
        absgd_jax.weight_by_absgd,
        lambda *a: absgd_jax.absgd(0.1, *a),
        lambda *a: absgd_jax.abadam(0.1, *a),
    ],
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((float("nan"),), "temperature=nan"),
        ((0,), "temperature=0"),
        ((0.0,), "temperature=0.0"),
        ((1.0, 0.0), "gamma=0.0"),
        ((1.0, 1.5), "gamma=1.5"),
        ((1.0, -0.1), "gamma=-0.1"),
        ((1.0, float("nan")), "gamma=nan"),
    ],
)
def test_bad_numbers_are_quoted_at_construction(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: absgd_jax.adaptive_gamma(float("inf")), "log_alpha=inf"),
        (lambda: absgd_jax.kl_radius(0.0), "rho=0.0"),
        (lambda: absgd_jax.kl_radius(float("nan")), "rho=nan"),
        (lambda: absgd_jax.kl_radius(1.0, init=0.0), "init=0.0"),
        (lambda: absgd_jax.kl_radius(1.0, init=float("inf")), "init=inf"),
        (lambda: absgd_jax.kl_radius(1.0, step_size=-1.0), "step_size=-1.0"),
        (lambda: absgd_jax.kl_radius(4.9, batch_size=128), r"rho=4.9.*log\(128\) = 4.852.*uniform"),
        (lambda: absgd_jax.value_and_grad(jnp.square, num_microbatches=0), "num_microbatches=0"),
        (lambda: absgd_jax.value_and_grad(jnp.square, num_microbatches=2.0), "num_microbatches=2.0"),
        (lambda: absgd_jax.entropic_risk(LOSSES_OF_THREE, 1.0, weights=np.array([1.0, -2.0, 1.0])), "contains -2.0"),
        (lambda: absgd_jax.entropic_risk(LOSSES_OF_THREE, 1.0, weights=[1.0, float("nan"), 1.0]), "contains nan"),
        (lambda: absgd_jax.merge_risks(LOSSES_OF_THREE, 1.0, weights=np.array([1.0, 2.0, np.inf])), "contains inf"),
        (lambda: absgd_jax.merge_risks(1.0, 1.0), r"risks has shape \(\).*axis_name"),
    ],
)
def test_bad_numbers_of_the_rest_are_quoted(call, message):
    with pytest.raises(ValueError, match=message):
        call()


NUMBERS = {
    "temperature": absgd_jax.scale_by_absgd,
    "gamma": lambda x: absgd_jax.weight_by_absgd(1.0, x),
    "max_weight": lambda x: absgd_jax.absgd(0.1, 1.0, max_weight=x),
    "log_alpha": absgd_jax.adaptive_gamma,
    "rho": absgd_jax.kl_radius,
    "init": lambda x: absgd_jax.kl_radius(0.5, init=x),
    "step_size": lambda x: absgd_jax.focus_fraction(0.5, step_size=x),
    "fraction": absgd_jax.trust_fraction,
    "threshold": lambda x: absgd_jax.entropic_risk(LOSSES_OF_THREE, 1.0, threshold=x),
    "focusing": lambda x: absgd_jax.losses.sigmoid_focal(LOSSES_OF_THREE, jnp.ones(3), focusing=x),
    "beta": lambda x: absgd_jax.losses.class_balanced_weights([2, 1], beta=x),
    "tau": lambda x: absgd_jax.losses.logit_adjustment(jnp.zeros(2), 0, [2, 1], tau=x),
    "scale": lambda x: absgd_jax.losses.ldam(jnp.zeros(2), 0, [2, 1], scale=x),
    "start": lambda x: absgd_jax.losses.deferred_reweighting(jnp.ones(2), x),
}


@pytest.mark.parametrize("bad", ["0.5", True, 1j, [0.5], np.array("0.5"), np.array(True), jnp.array(True)], ids=repr)
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_quoted(name, bad):
    """A file of settings makes texts of numbers, 1e-3 among them: their values would go unchecked."""
    with pytest.raises(TypeError, match=f"{name}=.*: give a real number"):
        NUMBERS[name](bad)


@pytest.mark.parametrize("name", sorted(NUMBERS.keys() - {"threshold", "step_size"}))
def test_none_is_no_number_unless_it_is_the_default(name):
    with pytest.raises(TypeError, match=f"{name}=None is a NoneType"):
        NUMBERS[name](None)


def test_a_rule_for_the_one_is_none_for_the_other():
    with pytest.raises(TypeError, match="temperature="):
        absgd_jax.scale_by_absgd(absgd_jax.adaptive_gamma(-1.0)).init(jnp.zeros(2))
    with pytest.raises(TypeError, match="give it as temperature="):
        absgd_jax.scale_by_absgd(1.0, gamma=absgd_jax.trust_fraction(0.5))


def test_what_a_rule_or_a_schedule_returns_has_to_be_a_number():
    params = jnp.zeros(2)
    for temperature in (lambda count: "0.5", absgd_jax.Rule(lambda state, kl: None)):
        with pytest.raises(TypeError, match=r"temperature=.*: give a real number"):
            absgd_jax.scale_by_absgd(temperature).init(params)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("losses", "where", "message"),
    [
        (LOSSES_OF_THREE + 1j, None, "losses have dtype complex64"),
        (LOSSES_OF_THREE, jnp.array([1, 0, 1]), "where has dtype int32"),
        (LOSSES_OF_THREE, jnp.array([1.0, 0.5, 1.0]), "where has dtype float32.*fractions are weights="),
    ],
)
def test_dtypes_that_cannot_be_meant_are_refused(losses, where, message, wrap):
    with pytest.raises(TypeError, match=message):
        wrap(absgd_jax.entropic_risk)(losses, 1.0, where=where)
    weighting = absgd_jax.weight_by_absgd(1.0)
    with pytest.raises(TypeError, match=message):
        wrap(weighting.update)(losses, weighting.init(), where=where)


def test_the_values_of_jax_s_arrays_are_never_checked():
    absgd_jax.scale_by_absgd(jnp.array(0.0), jnp.array(2.0))
