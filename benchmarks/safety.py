"""Is it numerically safe? Algorithm 1 on hostile losses, against 60-digit arithmetic and beside the published package.

python -m benchmarks.safety   # the other side needs `pip install absgd==0.0.1 torch`

A case is two ordinary batches, hostile ones, and 50 ordinary ones, in which s = 0.1 s + 0.9 g̃ forgets 115 λ of loss. A
batch without an answer (NaN, +inf at λ > 0) is to be left out: the batches around it have to be right. A case recovers
if the 50 are right; where Algorithm 1 itself gives them no weight, there is nothing to recover.

A weight is right if it is as close to the truth as the losses' own rounding lets anyone come: within 8 ε (1 + κ) and
10 %, where ε is the machine epsilon of the losses and κ = Σ_j |∂ log p̃_i/∂L_j| |L_j|, about |L|/|λ|, the condition
number. Relative errors are taken of p̃ + tiny/ε (1e-31 in float32), so that a weight may underflow.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import mpmath
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure

import absgd_jax
from benchmarks.harness.names import OURS, PUBLISHED
from benchmarks.harness.records import Record, publish, table

BATCH, BEFORE, AFTER = 8, 2, 50
DIGITS, ROUNDINGS, CAP = 60, 8, 0.1
TEMPERATURES = tuple(sign * size for size in (1e-4, 1e-2, 0.1, 1.0, 10.0, 1e3, 1e8) for sign in (1, -1))
NAN, INF = float("nan"), float("inf")


@dataclasses.dataclass(frozen=True)
class Options:
    """Numerical safety."""

    seed: int = 0
    """Of the losses."""


class Case(NamedTuple):
    """A run of T batches of B losses."""

    kind: str
    name: str
    losses: np.ndarray  # shape=(T, B)
    where: np.ndarray  # shape=(T, B), dtype=bool; False is masked
    temperatures: np.ndarray  # shape=(T,), dtype=float32
    gamma: float

    @property
    def masked(self) -> bool:
        return not self.where.all()


class Truth(NamedTuple):
    """Algorithm 1 in many digits; NaN for a batch without an answer."""

    weights: np.ndarray  # p̃, shape=(T, B)
    condition: np.ndarray  # κ, shape=(T, B)


# --- cases


def cases(seed: int) -> Iterator[Case]:
    rng = np.random.default_rng(seed)

    def ordinary(batches, batch=BATCH):
        return rng.exponential(size=(batches, batch))

    def case(
        kind, name, hostile, lam=1.0, *, then=None, where: Any = True, gamma=0.9, before=BEFORE, dtype: Any = np.float32
    ):
        """``hostile`` batches (H, B) amid ordinary ones; λ may be another from the first hostile one on."""
        after, batch = before + len(hostile), hostile.shape[1]
        losses = np.concatenate([ordinary(before, batch), hostile, ordinary(AFTER, batch)]).astype(dtype)
        present = np.ones(losses.shape, bool)
        present[before:after] = where
        temperatures = np.full(len(losses), lam, np.float32)
        temperatures[before:] = lam if then is None else then
        return Case(kind, name, losses, present, temperatures, gamma)

    def with_entry(value, place=0):
        losses = ordinary(1)
        losses[0, place] = value
        return losses

    def equal(value, batches=1):
        return np.full((batches, BATCH), value)

    some = np.arange(BATCH) > 0
    patterns = {
        "losses of about 1": lambda: ordinary(1),
        "losses of about 1e-30": lambda: 1e-30 * ordinary(1),
        "losses of about 1e30": lambda: 1e30 * ordinary(1),
        "losses of about -1000": lambda: -1000 * ordinary(1),
        "equal losses": lambda: equal(300.0),
        "one outlier of 1e4": lambda: with_entry(1e4),
    }
    for kind, losses in patterns.items():
        for temperature in TEMPERATURES:
            yield case(kind, f"{kind}, λ = {temperature:g}", losses(), temperature)

    kind = "around the overflow of float32"
    for value in (87.0, 88.5, 89.0, 100.0, 110.0, -87.0, -100.0, -110.0):
        yield case(kind, f"all losses {value:g} λ", equal(value))
        yield case(kind, f"one loss {value:g} |λ|, λ < 0", with_entry(value), -1.0)

    kind = "masked"
    for value in (NAN, INF, -INF, 1e30):
        for temperature in (0.1, -1.0, INF):
            name = f"a masked loss is {value:g}, λ = {temperature:g}"
            yield case(kind, name, with_entry(value), temperature, where=some)
    yield case(kind, "all masked", ordinary(1), where=False)
    yield case(kind, "all masked and NaN", equal(NAN), where=False)
    yield case(kind, "all masked and NaN, λ = ∞", equal(NAN), INF, where=False)
    yield case(kind, "all but one masked", ordinary(1), where=~some)
    yield case(kind, "three batches all masked", ordinary(3), where=False)
    yield case(kind, "the first batch is masked", ordinary(1), where=False, before=0)

    kind = "not finite"
    for value in (NAN, INF, -INF):
        for temperature in (1.0, -1.0, INF):
            yield case(kind, f"a loss is {value:g}, λ = {temperature:g}", with_entry(value), temperature)
    for value in (NAN, INF):
        yield case(kind, f"all losses are {value:g}", equal(value))
        yield case(kind, f"three batches are {value:g}", equal(value, 3))
        yield case(kind, f"the first batch is {value:g}", equal(value), before=0)

    kind = "λ changes in one step"
    for first, then in ((1e3, 1e-3), (1e-3, 1e3), (-1e3, -1e-3), (-1e-3, -1e3), (1e2, 1e8), (1e8, 1e2), (1, -1)):
        yield case(kind, f"λ from {first:g} to {then:g}", ordinary(1), first, then=then)
    yield case(kind, "λ from ∞ to 0.5", ordinary(1), INF, then=0.5)
    yield case(kind, "λ from 0.5 to ∞", ordinary(1), 0.5, then=INF)

    kind = "bfloat16"
    for temperature in (0.1, -0.1, 1.0, -1.0, 1e8, INF):
        name = f"bfloat16, λ = {temperature:g}"
        yield case(kind, name, ordinary(1), temperature, dtype=jnp.bfloat16)
    yield case(kind, "bfloat16, one outlier of 1e4", with_entry(1e4), dtype=jnp.bfloat16)
    yield case(kind, "bfloat16, a loss is NaN", with_entry(NAN), dtype=jnp.bfloat16)
    yield case(kind, "bfloat16, all masked", ordinary(1), where=False, dtype=jnp.bfloat16)

    kind = "other γ and batch sizes"
    yield case(kind, "batches of one", np.full((1, 1), 100.0))
    yield case(kind, "batches of 512, one outlier", np.append(ordinary(1, 511), [[1e4]], 1), 0.1)
    yield case(kind, "γ = 1, one outlier", with_entry(1e4), gamma=1.0)
    yield case(kind, "γ = 0.001, one outlier", with_entry(1e4), gamma=1e-3)


# --- methods


def truth(case: Case, keeps_risk: bool) -> Truth:
    """p̃_i = exp(L_i/λ)/s with s ← (1 - γ) s + γ mean exp(L/λ) from s = 0.

    Where λ changes, ``keeps_risk`` tells what is carried over, as each implementation documents: R = λ log(s/m), where
    m = 1 - (1 - γ)^t, starting afresh after λ = ∞ (ours), or s itself (theirs). At λ = ∞ all weights are 1.
    """
    weights, condition = np.zeros(case.losses.shape), np.zeros(case.losses.shape)
    with mpmath.workdps(DIGITS):
        gamma, s, mass, before = mpmath.mpf(case.gamma), mpmath.mpf(0), mpmath.mpf(0), None
        depends = mpmath.mpf(0)  # Σ |∂ log s/∂L| |L|
        for t, temperature in enumerate(case.temperatures.tolist()):
            lam, present = mpmath.mpf(temperature), np.flatnonzero(case.where[t])
            if keeps_risk and mpmath.isinf(lam):
                s = mass = depends = mpmath.mpf(0)
            elif keeps_risk and s and lam != before:
                s, depends = mass * (s / mass) ** (before / lam), depends * abs(before / lam)
            before = lam
            losses = [mpmath.mpf(float(case.losses[t, i])) for i in present]
            exponents = [loss / lam for loss in losses]
            tilted = [mpmath.exp(x) for x in exponents]
            total = mpmath.fsum(tilted)
            if not mpmath.isfinite(total):
                weights[t] = NAN
            elif mpmath.isinf(lam):
                weights[t, present] = 1
            if not losses or mpmath.isinf(lam) or not mpmath.isfinite(total):
                continue
            sizes = [abs(x) if p else mpmath.mpf(0) for x, p in zip(exponents, tilted, strict=True)]
            new = gamma * total / len(losses)
            s, mass = (1 - gamma) * s + new, (1 - gamma) * mass + gamma
            shares = [new / s * p / total for p in tilted]
            depends = (1 - new / s) * depends + mpmath.fdot(shares, sizes)
            weights[t, present] = [p / s for p in tilted]
            condition[t, present] = [
                size * (1 - 2 * share) + depends for size, share in zip(sizes, shares, strict=True)
            ]
    return Truth(weights, condition)


def ours(case: Case) -> np.ndarray:
    """p̃ through both APIs, shape (2, T, B)."""
    arrays = (jnp.asarray(a) for a in (case.losses, case.where, case.temperatures))
    return np.asarray(_both_apis(*arrays, case.gamma))


@partial(jax.jit, static_argnames="gamma")
def _both_apis(losses: jax.Array, where: jax.Array, temperatures: jax.Array, gamma: float) -> jax.Array:
    """The gradient of the risk by the losses themselves goes through the optimizer, which returns p̃/B."""
    weighting = absgd_jax.weight_by_absgd(temperatures.__getitem__, gamma)
    # What the documentation of scale_by_absgd asks for where batches may be broken.
    optimizer: Any = optax.apply_if_finite(absgd_jax.scale_by_absgd(temperatures.__getitem__, gamma), 10)

    def step(states, batch):
        values, where, temperature = batch
        weights, first = weighting.update(values, states[0], where=where)
        risk, shares = jax.value_and_grad(absgd_jax.entropic_risk)(values, temperature, where=where)
        updates, second = optimizer.update(shares, states[1], value=risk)
        return (first, second), jnp.stack([weights, jnp.sum(where) * updates]).astype(jnp.float32)

    states = weighting.init(), optimizer.init(losses[0])
    return jax.lax.scan(step, states, (losses, where, temperatures))[1].swapaxes(0, 1)


def published(case: Case) -> np.ndarray | None:
    """p̃ of the published package, shape (1, T, B); None where it has no way to say what the case needs."""
    if case.masked:
        return None
    import torch  # pyright: ignore[reportMissingImports]
    from absgd.losses import ABLoss  # pyright: ignore[reportMissingImports]

    # With a criterion that returns its input the gradient of the loss by the losses is p̃/B.
    loss: Any = ABLoss  # it is annotated as if it took cross entropy only
    criterion = loss(1.0, criterion=lambda losses, _: losses, abgamma=case.gamma, abalpha=1)
    dtype = torch.bfloat16 if case.losses.dtype == jnp.bfloat16 else torch.float32
    weights = []
    for values, temperature in zip(case.losses.astype(np.float32), case.temperatures.tolist(), strict=True):
        criterion.mylambda = None if np.isinf(temperature) else temperature  # None is its λ = ∞
        criterion.updateLambda()
        losses = torch.tensor(values).to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(criterion(losses, None), losses)
        weights.append(len(values) * gradient.float().numpy())
    return np.array([weights])


class Method(NamedTuple):
    weights: Callable[[Case], np.ndarray | None]
    keeps_risk: bool
    needs: tuple[str, ...] = ()


METHODS = {OURS: Method(ours, True), PUBLISHED: Method(published, False, ("torch", "absgd"))}


# --- results


def judge(case: Case, found: np.ndarray | None, expected: Truth) -> Record:
    """Compares the weights of a method, shape (APIs, T, B), with the truth; None cannot be compared."""
    if found is None:
        return {"relative_error": None, "finite": None, "right": None, "recovers": None, "note": "has no mask"}
    info = jnp.finfo(case.losses.dtype)
    eps, floor = float(info.eps), float(info.tiny) / float(info.eps)
    found, answered = found.astype(float), np.isfinite(expected.weights).all(1)
    finite = bool(np.isfinite(found[:, answered]).all())
    errors = abs(found - expected.weights) / (expected.weights + floor)
    right = errors <= np.minimum(ROUNDINGS * eps * (1 + expected.condition), CAP)  # False where NaN
    silent = not (expected.weights[-AFTER:] > floor).any()
    return {
        "relative_error": float(f"{errors[:, answered].max():.3g}") if finite else None,
        "finite": finite,
        "right": bool(right[:, answered].all()),
        "recovers": None if silent else bool(right[:, -AFTER:].all()),
        "note": None,
    }


def measure(options: Options) -> list[Record]:
    """A record for every case and method that can be imported."""
    methods = {name: method for name, method in METHODS.items() if all(map(find_spec, method.needs))}
    return [
        {"kind": case.kind, "case": case.name, "method": name}
        | judge(case, method.weights(case), truth(case, method.keeps_risk))
        for case in cases(options.seed)
        for name, method in methods.items()
    ]


def markdown(records: list[Record]) -> str:
    """A row for each kind of case: how many each method gets right and recovers from."""

    def count(chosen, key):
        answers = [record[key] for record in chosen if record[key] is not None]
        return f"{sum(answers)} of {len(answers)}" if answers else "–"

    def row(name, chosen):
        cells = {"losses": name}
        for method in METHODS:
            of_method = [record for record in chosen if record["method"] == method]
            for key in ("right", "recovers"):
                cells[f"{method}: {key}"] = count(of_method, key) if of_method else "not run"
        return cells

    kinds = dict.fromkeys(record["kind"] for record in records)
    rows = [row(kind, [record for record in records if record["kind"] == kind]) for kind in kinds]
    wrong = [record["case"] for record in records if record["method"] == OURS and not record["right"]]
    legend = "–: the package has no mask. There is nothing to recover where Algorithm 1 itself gives no weight."
    verdict = f"absgd_jax is wrong on: {'; '.join(wrong)}." if wrong else "absgd_jax is right on all."
    return f"{table([*rows, row('all', records)])}\n\n{legend} {verdict}"


def figure(records: list[Record]) -> Figure:
    """The relative error in each case; what is not finite is drawn at the top."""
    fig, axis = plt.subplots(figsize=(10, 4), layout="constrained")
    names = list(dict.fromkeys(record["case"] for record in records))
    for i, method in enumerate(METHODS):
        chosen = [record for record in records if record["method"] == method and record["note"] is None]
        errors = [1e3 if r["relative_error"] is None else min(max(r["relative_error"], 1e-9), 1e2) for r in chosen]
        axis.semilogy([names.index(record["case"]) for record in chosen], errors, "ox"[i], ms=4, label=method)
    kinds = [record["kind"] for record in records if record["method"] == OURS]
    centres = {kind: np.mean([i for i, each in enumerate(kinds) if each == kind]) for kind in kinds}
    axis.set_xticks(list(centres.values()), list(centres), rotation=30, ha="right")
    axis.set_yticks([1e-9, 1e-6, 1e-3, 1, 1e3], ["≤ 1e-9", "1e-6", "1e-3", "1", "not finite"])
    axis.set_ylabel("largest relative error of a weight")
    axis.legend()
    return fig


if __name__ == "__main__":
    publish("safety", partial(measure, tyro.cli(Options)), markdown, figure)
