"""How well is the objective minimised? KL-DRO linear regression on California Housing, as in SCENT (arXiv 2602.02877).

python -m benchmarks.kl_dro --data-dir data

F_λ(w) = λ log mean exp((xᵀw - y)²/λ) from the least-squares solution, batches of 100, 300 epochs, cosine learning rate,
momentum 0.9 (Nesterov) where it is not Adam. F* by Newton's method in float64.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pooch
import tyro
from matplotlib.figure import Figure
from rich.progress import Progress
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

import absgd_jax
from benchmarks.harness.records import Record, publish, table
from examples.lab import files

ARCHIVE = "https://ndownloader.figshare.com/files/5976036"  # what scikit-learn downloads
SHA256 = "aaa5c9a6afe2225cc2aed2723682ae403280c4a3695a2ddda4ffb5d8215ea681"
TEMPERATURES = (0.2, 1.0, 5.0)
BATCH, EPOCHS, EVERY = 100, 300, 20
OURS, SCENT = "ABSGD with Adam, γ falls with the rate", "SCENT"
UMAX_RATE, SAFE_KL = 0.1, 1e-3  # of the dual variable; ρ of the softplus


@dataclasses.dataclass(frozen=True)
class Options:
    """KL-DRO linear regression."""

    data_dir: Path = Path("data")
    """Folder that holds cal_housing.data, or is to hold it."""
    seeds: int = 20
    """Number of seeds, trained together."""


class Run(NamedTuple):
    """The numbers of one run; the runs of a method are vmapped over them."""

    temperature: Any
    rate: Any  # learning rate at the start
    parameter: Any  # log α, γ, or nothing
    seed: Any


class Method(NamedTuple):
    """An optimizer, up to its learning rate, and the settings of it for each λ."""

    optimizer: Callable[[Run, int], optax.GradientTransformationExtraArgs]
    rates: tuple[float, ...]
    parameters: tuple[float, ...] = (0.0, 0.0, 0.0)
    softplus: bool = False


# --- methods


class UmaxState(NamedTuple):
    """Estimate of the running risk; below the first batch's at the start."""

    risk: jax.Array


def scale_by_umax(temperature: Any) -> optax.GradientTransformationExtraArgs:
    """U_MAX: gradient steps on log s, which is lifted to the batch's where that is larger."""

    def init(params):
        del params
        return UmaxState(jnp.float32(-jnp.inf))

    def update(updates, state, params=None, *, value=jnp.nan, **_):
        del params
        lifted = jnp.maximum(state.risk, value)
        # The authors' step is λ times the rate, on log s.
        log_s = lifted / temperature + temperature * UMAX_RATE * (jnp.exp((value - lifted) / temperature) - 1)
        factor = jnp.exp(value / temperature - log_s)
        return jax.tree.map(lambda g: factor * g, updates), UmaxState(temperature * log_s)

    return optax.GradientTransformationExtraArgs(init, update)


def heavy_ball() -> optax.GradientTransformation:
    return optax.trace(0.9, nesterov=True)


def absgd(gamma: Callable[[Run, int], Any], then: Callable[[], optax.GradientTransformation] = heavy_ball) -> Any:
    """ABSGD with some γ, in front of momentum or Adam. As in SCENT's code, s starts at the first batch's."""

    def optimizer(run, steps):
        scale = absgd_jax.scale_by_absgd(run.temperature, gamma(run, steps), bias_correction=True)
        return optax.chain(scale, then())

    return optimizer


def falling(run: Run, steps: int) -> optax.Schedule:
    """γ falls from 1 to 0.01 as the learning rate falls from its start to 0."""
    del run
    return optax.cosine_decay_schedule(1.0, steps, alpha=0.01)


def scent(run: Run, steps: int) -> Any:
    del steps
    return absgd_jax.adaptive_gamma(run.parameter)


def constant(run: Run, steps: int) -> Any:
    del steps
    return run.parameter


adam = optax.scale_by_adam
METHODS = {
    # One setting for every λ.
    OURS: Method(absgd(falling, adam), (3e-3,) * 3),
    # The settings of SCENT's authors, https://github.com/Optimization-AI/SCENT, dro/main.py.
    SCENT: Method(absgd(scent), (1e-5, 5e-6, 1e-5), (-22.0, -4.0, -1.1)),
    "SOX": Method(absgd(constant), (5e-6, 5e-6, 1e-5), (0.5, 0.4, 0.8)),
    "U_MAX": Method(lambda run, _: optax.chain(scale_by_umax(run.temperature), heavy_ball()), (1e-5, 5e-6, 1e-4)),
    "mini-batch softmax": Method(absgd(constant), (1e-5, 5e-6, 5e-6), (1.0,) * 3),
    "softplus": Method(lambda *_: optax.with_extra_args_support(heavy_ball()), (1e-6, 1e-6, 1e-5), softplus=True),
    # What makes the difference?
    "ABSGD, γ falls with the rate": Method(absgd(falling), (1e-5, 5e-6, 1e-5)),
    "ABSGD, γ = 0.1": Method(absgd(constant), (1e-5, 5e-6, 1e-5), (0.1,) * 3),
    "SCENT with Adam": Method(absgd(scent, adam), (3e-3,) * 3, (-22.0, -4.0, -1.1)),
    "ABSGD with Adam, γ = 0.1": Method(absgd(constant, adam), (3e-3,) * 3, (0.1,) * 3),
    "mini-batch softmax with Adam": Method(absgd(constant, adam), (3e-3,) * 3, (1.0,) * 3),
}


# --- problem


def load(data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Standardised features with a column of ones, shape (20640, 9), and targets in 100,000 dollars."""
    path = data_dir / "cal_housing.data"
    if not path.is_file():
        names = files.download(ARCHIVE, SHA256, data_dir / Path(ARCHIVE).name, path, pooch.Untar())
        path = next(Path(name) for name in names if name.endswith("cal_housing.data"))
    columns = np.loadtxt(path, delimiter=",").T
    longitude, latitude, age, rooms, bedrooms, population, households, income, value = columns
    per_household = rooms / households, bedrooms / households, population / households
    features = np.stack([income, age, *per_household[:2], population, per_household[2], latitude, longitude], axis=1)
    features = (features - features.mean(0)) / features.std(0)
    return np.concatenate([features, np.ones((len(features), 1))], axis=1), value / 1e5


def objective(w: np.ndarray, x: np.ndarray, y: np.ndarray, temperature: float) -> float:
    """F_λ in float64."""
    return float(temperature * (logsumexp((x @ w - y) ** 2 / temperature) - np.log(len(y))))


def optimum(x: np.ndarray, y: np.ndarray, temperature: float) -> float:
    """F* by Newton's method in a trust region: the Hessian is singular where one example has all the weight."""

    def tilted(w):
        residuals = x @ w - y
        return softmax(residuals**2 / temperature), 2 * residuals[:, None] * x

    def gradient(w):
        p, each = tilted(w)
        return p @ each

    def hessian(w):
        p, each = tilted(w)
        mean = p @ each
        return 2 * (x.T * p) @ x + ((each.T * p) @ each - np.outer(mean, mean)) / temperature

    newton = {"method": "trust-exact", "jac": gradient, "hess": hessian, "options": {"gtol": 1e-8, "maxiter": 2000}}
    return float(minimize(lambda w: objective(w, x, y, temperature), np.linalg.lstsq(x, y)[0], **newton).fun)


def train(method: Method, x: jax.Array, y: jax.Array, start: jax.Array, run: Run) -> jax.Array:
    """The weights every ``EVERY`` epochs, shape (EPOCHS // EVERY + 1, 9)."""
    steps = -(-len(y) // BATCH)
    optimizer = method.optimizer(run, EPOCHS * steps)
    present = (jnp.arange(steps * BATCH) < len(y)).reshape(steps, BATCH)

    def softplus(params, losses, where):
        exponents = (losses - params["dual"]) / run.temperature + np.log(SAFE_KL)
        safe = jnp.mean(jax.nn.softplus(exponents), where=where)
        return run.temperature / SAFE_KL * safe + params["dual"]

    def risk(params, places, where):
        losses = (x[places] @ params["w"] - y[places]) ** 2
        if method.softplus:
            return softplus(params, losses, where)
        return absgd_jax.entropic_risk(losses, run.temperature, where=where)

    def epoch(carry, number):
        order = jax.random.permutation(jax.random.fold_in(jax.random.key(run.seed), number), len(y))
        order = jnp.resize(order, (steps, BATCH))
        rate = run.rate * (1 + jnp.cos(jnp.pi * number / EPOCHS)) / 2

        def step(carry, batch):
            params, state = carry
            value, grads = jax.value_and_grad(risk)(params, *batch)
            updates, state = optimizer.update(grads, state, params, value=value)
            return (optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates)), state), None

        return jax.lax.scan(step, carry, (order, present))[0]

    def epochs(carry, first):
        carry = jax.lax.fori_loop(0, EVERY, lambda i, carry: epoch(carry, first + i), carry)
        return carry, carry[0]["w"]

    params = {"w": start, "dual": jnp.float32(0)}
    _, path = jax.lax.scan(epochs, (params, optimizer.init(params)), jnp.arange(0, EPOCHS, EVERY))
    return jnp.concatenate([start[None], path])


def train_all(method: Method, x: jax.Array, y: jax.Array, start: jax.Array, runs: Run) -> np.ndarray:
    """All λ with all seeds, shape (λ, seeds, EPOCHS // EVERY + 1, 9); a seed's batches are drawn once for all λ."""
    of_a_seed = jax.vmap(partial(train, method, x, y, start), (Run(0, 0, 0, None),))
    return np.asarray(jax.jit(jax.vmap(of_a_seed, (Run(None, None, None, 0),), out_axes=1))(runs), float)


# --- results


def measure(options: Options) -> list[Record]:
    """A record for every method, λ and seed."""
    x, y = load(options.data_dir)
    best = {temperature: optimum(x, y, temperature) for temperature in TEMPERATURES}
    inputs, targets, start = (jnp.asarray(a, jnp.float32) for a in (x, y, np.linalg.lstsq(x, y)[0]))
    records = []
    with Progress() as progress:
        for name, method in progress.track(METHODS.items(), description="KL-DRO"):
            settings = list(zip(TEMPERATURES, method.rates, method.parameters, strict=True))
            temperatures, rates, parameters = (jnp.asarray(column) for column in zip(*settings, strict=True))
            runs = Run(temperatures, rates, parameters, jnp.arange(options.seeds))
            paths = train_all(method, inputs, targets, start, runs)
            for (temperature, rate, parameter), of_temperature in zip(settings, paths, strict=True):
                for seed, path in enumerate(of_temperature):
                    gaps = [objective(w, x, y, temperature) - best[temperature] for w in path]
                    gaps = [float(f"{gap:.4g}") if np.isfinite(gap) else None for gap in gaps]
                    records.append(
                        {
                            "method": name,
                            "temperature": temperature,
                            "seed": seed,
                            "gap": gaps[-1],
                            "learning_rate": rate,
                            "parameter": parameter,
                            "optimum": best[temperature],
                            "gap_by_epoch": gaps,
                        }
                    )
    return records


def summary(records: list[Record]) -> dict[str, dict[float, list[float]]]:
    """The gaps of each method and λ over the seeds; a failed seed has the gap infinity."""
    gaps: dict[str, dict[float, list[float]]] = {}
    for record in records:
        of_method = gaps.setdefault(record["method"], {})
        of_method.setdefault(record["temperature"], []).append(float("inf") if record["gap"] is None else record["gap"])
    return gaps


def markdown(records: list[Record]) -> str:
    """Ours against SCENT, then all methods."""
    best = {record["temperature"]: record["optimum"] for record in records}
    rows, found = [], summary(records)
    for name, of_method in found.items():
        row = {"F − F* after 300 epochs": name}
        for temperature, gaps in sorted(of_method.items()):
            finite, failed = np.array([gap for gap in gaps if np.isfinite(gap)]), np.isinf(gaps).sum()
            text = f"{np.median(finite):.2g} ({finite.min():.2g} to {finite.max():.2g})" if finite.size else "–"
            row[f"λ = {temperature:g} (F* = {best[temperature]:.5f})"] = text + (f", {failed} failed" if failed else "")
        rows.append(row)
    seeds = len({record["seed"] for record in records})
    return (
        f"{table(rows)}\n\nMedian (smallest to largest) over {seeds} seeds; failed: not finite at the end.\n\n"
        + verdict(found)
    )


def verdict(found: dict[str, dict[float, list[float]]]) -> str:
    """Whether every seed of ours, which has one setting for all λ, is below every seed of SCENT, which has three."""
    if not {OURS, SCENT} <= found.keys():
        return f"{OURS} against {SCENT}: not run."
    sentences = []
    for temperature, gaps in sorted(found[OURS].items()):
        ours, theirs = max(gaps), min(found[SCENT][temperature])
        sentences.append(
            f"λ = {temperature:g}, {ours:.2g} against {theirs:.2g}: {'met' if ours < theirs else 'missed'}"
        )
    return f"Target, the largest gap of the first below the smallest of SCENT: {'; '.join(sentences)}."


def figure(records: list[Record]) -> Figure:
    """The median gap against the epoch, a panel for each λ."""
    fig, axes = plt.subplots(1, len(TEMPERATURES), figsize=(12, 4), layout="constrained")
    names = list(dict.fromkeys(record["method"] for record in records))
    for axis, temperature in zip(axes, TEMPERATURES, strict=True):
        for i, name in enumerate(names[:6]):
            chosen = [r for r in records if (r["method"], r["temperature"]) == (name, temperature)]
            each = [[np.inf if gap is None else gap for gap in r["gap_by_epoch"]] for r in chosen]
            median = np.median(each, axis=0)
            median = np.where(np.isfinite(median), median, np.nan)
            width = 2.5 if i == 0 else 1.2
            axis.semilogy(np.arange(len(median)) * EVERY, median, label=name, lw=width, color=f"C{i}")
        axis.set_title(f"λ = {temperature:g}")
        axis.set_xlabel("epoch")
    axes[0].set_ylabel("F − F*, median over the seeds")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


if __name__ == "__main__":
    publish("kl_dro", partial(measure, tyro.cli(Options)), markdown, figure)
