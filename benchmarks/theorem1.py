"""Does ABSGD converge as its Theorem 1 says? Mean squared gradient of F_λ against the number of steps T.

python -m benchmarks.theorem1

A smooth non-convex problem: squared loss of a sigmoid, L_i(w) = (σ(x_iᵀw) - y_i)², 200 points of which the labels are
partly wrong, λ = 0.1, batches of 4 with replacement, so that ∇F_λ is known exactly and a batch's risk is far from F_λ.
Rate and γ are constants times a power of T, each method's own; the constants are the same for all.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from rich.progress import Progress
from scipy import stats

import absgd_jax
from benchmarks.harness.records import Record, publish, table
from examples.lab.methods.recover import Recover

POINTS, DIMENSION, BATCH, WRONG, TEMPERATURE, RIDGE = 200, 10, 4, 0.05, 0.1, 0.01
SHORTEST, RATE = 256, 0.1  # η = RATE and γ = 1 at T = SHORTEST


@dataclasses.dataclass(frozen=True)
class Options:
    """Mean squared gradient against the number of steps."""

    seeds: int = 20
    """Number of seeds, trained together."""
    doublings: int = 8
    """The longest runs have 256 x 2^doublings steps."""


def problem() -> tuple[jax.Array, jax.Array]:
    """Points, shape (N, D), and labels 0 or 1, shape (N,)."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(POINTS, DIMENSION))
    y = (x @ rng.normal(size=DIMENSION) > 0) ^ (rng.random(POINTS) < WRONG)
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


def risk(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """F_λ of all points, R̂ of a batch; the ridge inside each loss keeps the sigmoids from going flat."""
    return absgd_jax.entropic_risk((jax.nn.sigmoid(x @ w) - y) ** 2 + RIDGE * jnp.sum(w**2), TEMPERATURE)


Algorithm = tuple[Callable[[jax.Array], Any], Callable[..., tuple[Any, Any]]]  # init and update


def absgd(rate: float, gamma: float, momentum: float) -> Algorithm:
    """ABSGD; the rate is that of the sum of the geometric series that momentum makes of it."""
    scale = absgd_jax.scale_by_absgd(TEMPERATURE, gamma, bias_correction=True)  # s starts at the first batch's
    optimizer = optax.chain(scale, optax.sgd(rate * (1 - momentum), momentum=momentum))

    def update(w, state, batch):
        value, grads = jax.value_and_grad(risk)(w, *batch)
        updates, state = optimizer.update(grads, state, w, value=value)
        return optax.apply_updates(w, updates), state

    return optimizer.init, update


def variance_reduced(rate: float, a: float) -> Algorithm:
    """RECOVER."""
    recover = Recover(TEMPERATURE, a)

    def update(w, state, batch):
        gradient = partial(jax.value_and_grad(risk), x=batch[0], y=batch[1])
        direction, state = recover.direction(gradient, w, state)
        return w - rate * direction, state

    return partial(recover.init, size=(0, 0)), update


# The powers of T of the rate and of γ (or a), and what they make.
METHODS: dict[str, tuple[float, float, Callable[[Any, Any], Algorithm]]] = {
    "ABSGD": (-1 / 2, -1 / 2, lambda rate, gamma: absgd(rate, gamma, 0.9)),
    "ABSGD, no momentum": (-1 / 2, -1 / 2, lambda rate, gamma: absgd(rate, gamma, 0.0)),
    "mini-batch softmax": (-1 / 2, 0.0, lambda rate, gamma: absgd(rate, gamma, 0.9)),
    "SCGD": (-3 / 4, -1 / 2, lambda rate, gamma: absgd(rate, gamma, 0.0)),
    "RECOVER": (-1 / 3, -2 / 3, variance_reduced),
}


def mean_squared_gradient(method: str, steps: jax.Array, seed: jax.Array) -> jax.Array:
    """The mean over the steps of ‖∇F_λ(w_t)‖². One program serves every T."""
    x, y = problem()
    rate_power, gamma_power, make = METHODS[method]
    init, update = make(RATE * (steps / SHORTEST) ** rate_power, (steps / SHORTEST) ** gamma_power)
    start_key, steps_key = jax.random.split(jax.random.key(seed))

    def step(i, carry):
        w, state, total = carry
        places = jax.random.randint(jax.random.fold_in(steps_key, i), (BATCH,), 0, POINTS)
        total += jnp.sum(jax.grad(risk)(w, x, y) ** 2)
        return *update(w, state, (x[places], y[places])), total

    start = jax.random.normal(start_key, (DIMENSION,))
    return jax.lax.fori_loop(0, steps, step, (start, init(start), jnp.float32(0)))[-1] / steps


def measure(options: Options) -> list[Record]:
    """A record for every method, T and seed."""
    lengths = [SHORTEST * 2**i for i in range(options.doublings + 1)]
    seeds, records = jnp.arange(options.seeds), []
    with Progress() as progress:
        task = progress.add_task("Theorem 1", total=len(METHODS) * sum(lengths))
        for method in METHODS:
            over_seeds = jax.jit(jax.vmap(partial(mean_squared_gradient, method), (None, 0)))
            for steps in lengths:
                for seed, value in enumerate(np.asarray(over_seeds(jnp.int32(steps), seeds)).tolist()):
                    value = value if np.isfinite(value) else None
                    records.append({"method": method, "T": steps, "seed": seed, "mean_sq_grad": value})
                progress.advance(task, steps)
    return records


def curves(records: list[Record]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The lengths and the mean squared gradients, shape (seeds, lengths), of each method."""
    found = {}
    for method in dict.fromkeys(record["method"] for record in records):
        chosen = sorted((r["seed"], r["T"], r["mean_sq_grad"] or np.nan) for r in records if r["method"] == method)
        lengths = np.unique([steps for _, steps, _ in chosen])
        found[method] = lengths, np.reshape([value for *_, value in chosen], (-1, len(lengths)))
    return found


def slope(lengths: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """The slope of log value against log T, a fit for each seed: the mean and half of its 95 % interval."""
    slopes = np.polyfit(np.log(lengths), np.log(values).T, 1)[0]
    return float(slopes.mean()), float(stats.t.ppf(0.975, len(slopes) - 1) * stats.sem(slopes))


def markdown(records: list[Record]) -> str:
    """The table of the README."""
    rows = []
    for method, (lengths, values) in curves(records).items():
        rate_power, gamma_power, _ = METHODS[method]
        (all_of_it, error), (late, late_error) = slope(lengths, values), slope(lengths[-4:], values[:, -4:])
        rows.append(
            {
                "method": method,
                "η ∝ T^": f"{rate_power:.3g}",
                "γ ∝ T^": f"{gamma_power:.3g}",
                f"at T = {lengths[-1]}": f"{values[:, -1].mean():.2g}",
                "slope": f"{all_of_it:.3f} ± {error:.3f}",
                f"slope from T = {lengths[-4]}": f"{late:.3f} ± {late_error:.3f}",
            }
        )
    return f"{table(rows)}\n\nSlopes of log mean ‖∇F‖² against log T, with 95 % intervals over the seeds."


def figure(records: list[Record]) -> Figure:
    """Mean over the seeds, on log-log axes."""
    fig, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    looks = zip(("o", "s", "D", "^", "v"), ("-", "--", "-", "-", "-"), strict=True)  # two lie on one another
    for (marker, line), (method, (lengths, values)) in zip(looks, curves(records).items(), strict=True):
        axis.loglog(
            lengths, values.mean(0), marker=marker, ls=line, label=f"{method}: slope {slope(lengths, values)[0]:.2f}"
        )
    first = next(iter(curves(records).values()))
    guide = first[1].mean(0)[0] * (first[0] / first[0][0]) ** -0.5
    axis.loglog(first[0], guide, color="black", ls=":", label="T^-1/2")
    axis.set_xlabel("number of steps T")
    axis.set_ylabel("mean of ‖∇F(w)‖² over the steps")
    axis.legend(fontsize=8)
    return fig


if __name__ == "__main__":
    publish("theorem1", partial(measure, tyro.cli(Options)), markdown, figure)
