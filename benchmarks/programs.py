"""Compiled programs: what the compiler says of them, on one device or several, and how their times compare."""

import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import jax
import numpy as np

Advance = Callable[[], Any]  # runs a program once; what it returns is waited for


def compiled(function: Callable, *arguments: Any, donate: int | Sequence[int] = ()) -> tuple[Any, float]:
    """The compiled program, for arguments or their shapes, and the seconds that tracing and compiling took."""
    began = time.perf_counter()
    program = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    return program, time.perf_counter() - began


def figures(program: Any) -> dict[str, float]:
    """What a program costs according to the compiler. The body of a loop counts once."""
    cost, memory = program.cost_analysis(), program.memory_analysis()
    return {
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "temporary_bytes": memory.temp_size_in_bytes,
    }


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# --- devices


def on_devices(count: int, function: Callable, *arguments: Any) -> Any:
    """``function(*arguments)`` where JAX sees ``count`` devices: here, or in a process whose CPU is split into them.

    The split has to be made before JAX starts, and the timings of one device are not to be taken under it.
    """
    if jax.device_count() >= count:
        return function(*arguments)
    with ProcessPoolExecutor(1, get_context("spawn"), _split_cpu, (count,)) as process:
        return process.submit(function, *arguments).result()


def _split_cpu(count: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)


def mesh(count: int) -> jax.sharding.Mesh:
    """The first devices, along the axis ``data``."""
    return jax.make_mesh((count,), ("data",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:count])


class Collective(NamedTuple):
    """A meeting of the devices in a compiled program."""

    kind: str
    bytes: int  # that each device sends and receives
    before_backward: bool  # whether a matrix product or convolution comes after it, which thus waits for it


_COLLECTIVE = r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?"
_PRODUCT = r"(dot|convolution|custom-call)"


def collectives(program: Any) -> list[Collective]:
    """The collectives of a program in the order of its schedule.

    A step ends with the products of its backward pass, so that a collective without a product after it stands behind
    the whole backward pass. An asynchronous one counts where it is done.
    """
    bodies, entry = _computations(program.as_text())
    lines = bodies[entry]
    products = [i for i, line in enumerate(lines) if _contains(_PRODUCT, line, bodies)]
    found = []
    for i, line in enumerate(lines):
        for inner in _reached(line, bodies):
            if match := re.match(rf".*? {_COLLECTIVE}\(", inner):
                name = inner.split(" = ")[0].split()[-1]
                done = next((j for j, other in enumerate(lines) if re.search(rf"-done\({name}\)", other)), i)
                found.append(Collective(match[1], _result_bytes(inner), max(products, default=-1) >= done))
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of an HLO module, and the name of the one where it starts."""
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.-]+) .*{$", line):
            name = match[2]
            bodies[name] = []
            entry = name if match[1] else entry
        elif " = " in line and name:
            bodies[name].append(line)
    return bodies, entry


def _reached(line: str, bodies: dict[str, list[str]]) -> list[str]:
    """An instruction and all those in the computations that it calls."""
    called = re.findall(r"(?:calls|to_apply|body|condition|branch_computations)=\{?((?:%?[\w.-]+(?:, )?)+)", line)
    names = [name.strip("%") for group in called for name in group.split(", ")]
    return [line, *(inner for name in names for below in bodies.get(name, ()) for inner in _reached(below, bodies))]


def _contains(opcode: str, line: str, bodies: dict[str, list[str]]) -> bool:
    return any(re.match(rf".*? {opcode}\(", inner) for inner in _reached(line, bodies))


def _result_bytes(line: str) -> int:
    result = re.split(rf" {_COLLECTIVE}\(", line)[0]
    bits = {"pred": 8}
    shapes = re.findall(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]", result)
    return sum(
        int(size or bits[kind]) // 8 * int(np.prod([int(n) for n in shape.split(",") if n], dtype=int))
        for kind, size, shape in shapes
    )


# --- times


def repeated(step: Callable) -> Callable:
    """``steps`` steps as one program, so that neither Python nor a short measurement blurs their time."""

    def steps(number, state, *arguments):
        return jax.lax.fori_loop(0, number, lambda _, state: step(state, *arguments), state)

    return steps


def seconds(advance: Advance) -> float:
    began = time.perf_counter()
    jax.block_until_ready(advance())
    return time.perf_counter() - began


def paired_ratios(
    alternatives: dict[str, Advance], rounds: int, *, rarely: Sequence[str] = (), seed: int = 0
) -> tuple[float, dict[str, list[float]]]:
    """Times of all alternatives relative to the first one's of the same round, and its median seconds.

    In each round every alternative runs once, in random order, so that what slows the machine down for more than a
    round cancels. Those named in ``rarely`` take part in every fourth round only.
    """
    rng, baseline = np.random.default_rng(seed), next(iter(alternatives))
    base, ratios = [], {name: [] for name in alternatives}
    for advance in alternatives.values():
        seconds(advance)
    for number in range(rounds):
        names = [name for name in alternatives if name not in rarely or number % 4 == 0]
        times = {name: seconds(alternatives[name]) for name in rng.permutation(names)}
        base.append(times[baseline])
        for name, time_of in times.items():
            ratios[name].append(time_of / times[baseline])
    return float(np.median(base)), ratios


def quartiles(ratios: Sequence[float]) -> tuple[float, list[float]]:
    """The median, and the first and third quartile."""
    first, median, third = np.quantile(ratios, [0.25, 0.5, 0.75])
    return float(median), [float(first), float(third)]
