"""Compiled steps: what the compiler says of them, on one device or several, and how their times compare.

A step is ``step(state, *arguments) -> state``; the state is donated.
"""

import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

LEAST_SECONDS = 0.03  # of one timing


class Program(NamedTuple):
    """A compiled step."""

    step: Callable[..., Any]
    init: Callable[[], Any]  # its first state
    compiled: Any
    compile_seconds: float | None  # None where it may have been read from a cache


def compile_step(step: Callable[..., Any], init: Callable[[], Any], *arguments: Any) -> Program:
    """Compiles a step for arguments, or for their shapes; nothing is allocated."""
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(jax.eval_shape(init), *arguments).compile()
    return Program(step, init, compiled, seconds_since(began))


def seconds_since(began: float) -> float | None:
    """What a compilation took that began then; nothing, where programs are kept for the next process."""
    return None if jax.config.jax_compilation_cache_dir else time.perf_counter() - began


def figures(compiled: Any) -> dict[str, float]:
    """What a program costs according to the compiler. The body of a loop counts once."""
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
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


def mesh(count: int) -> Mesh:
    """The first devices, along the axis ``data``."""
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


class Collective(NamedTuple):
    """A meeting of the devices in a compiled program."""

    kind: str
    bytes: int  # that each device sends and receives
    before_backward: bool  # whether a matrix product or convolution comes after it, which thus waits for it


_COLLECTIVE = r"(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?"
_PRODUCT = r"(dot|convolution|custom-call)"


def collectives(compiled: Any) -> list[Collective]:
    """The collectives of a compiled step in the order of its schedule.

    A step ends with the products of its backward pass, so that a collective without a product after it stands behind
    the whole backward pass. An asynchronous one counts where it is done.
    """
    bodies, entry = _computations(compiled.as_text())
    lines = bodies[entry]
    products = [i for i, line in enumerate(lines) if _contains(_PRODUCT, line, bodies)]
    found = []
    for i, line in enumerate(lines):
        for inner in _reached(line, bodies):
            if match := re.match(rf".*? {_COLLECTIVE}\(", inner):
                name = line.split(" = ")[0].split()[-1]
                done = next((j for j, other in enumerate(lines) if f"-done({name})" in other), i)
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
    called = re.findall(r"(?:calls|to_apply|body|condition|\w+_computations?)=\{?(%[\w.-]+(?:, %[\w.-]+)*)", line)
    names = [name.strip("%") for group in called for name in group.split(", ")]
    return [line, *(inner for name in names for below in bodies.get(name, ()) for inner in _reached(below, bodies))]


def _contains(opcode: str, line: str, bodies: dict[str, list[str]]) -> bool:
    return any(re.match(rf".*? {opcode}\(", inner) for inner in _reached(line, bodies))


def _result_bytes(line: str) -> int:
    result = re.split(rf" {_COLLECTIVE}\(", line)[0]
    bits = {"pred": 8}
    shapes = re.findall(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]", result)
    if "-start(" in line and "all-reduce-start(" not in line:  # the operands, the results and perhaps counters
        shapes = [shape for shape in shapes if shape != ("u", "32", "")]
        shapes = shapes[len(shapes) // 2 :]
    return sum(
        int(size or bits[kind]) // 8 * int(np.prod([int(n) for n in shape.split(",") if n], dtype=int))
        for kind, size, shape in shapes
    )


# --- times


def time_ratios(
    alternatives: dict[str, Program],
    arguments: Sequence[Any],
    rounds: int,
    *,
    rarely: Sequence[str] = (),
    most_seconds: float = float("inf"),
) -> tuple[float, dict[str, list[float]]]:
    """Seconds of a step of the first alternative, and the time of each relative to it, round by round.

    In each round every alternative runs once, in random order, so that what slows the machine down for longer than a
    round cancels. Those named in ``rarely`` take part in every fourth round only. Steps that are too short to be timed
    one by one are timed in a loop that is a program of its own. If all rounds of the first alternative would take more
    than ``most_seconds`` there are fewer, but at least three.
    """
    rng, first, steps = np.random.default_rng(0), next(iter(alternatives)), 1
    advances = {name: _advance(program, arguments) for name, program in alternatives.items()}
    functions = {name: program.compiled for name, program in alternatives.items()}
    advances[first](functions[first])
    each = _seconds(advances[first], functions[first])
    if each < LEAST_SECONDS / 2:
        loops = {name: _compiled_loop(program, arguments) for name, program in alternatives.items()}
        advances[first](partial(loops[first], steps))
        while (each := _seconds(advances[first], partial(loops[first], steps))) < LEAST_SECONDS:
            steps *= 2
        functions = {name: partial(loop, steps) for name, loop in loops.items()}

    base, ratios = [], {name: [] for name in alternatives}
    for name, advance in advances.items():
        advance(functions[name])
    for number in range(max(3, int(min(rounds, most_seconds / each)))):
        names = [name for name in alternatives if name not in rarely or number % 4 == 0]
        seconds = {name: _seconds(advances[name], functions[name]) for name in rng.permutation(names)}
        base.append(seconds[first] / steps)
        for name in names:
            ratios[name].append(seconds[name] / seconds[first])
    return float(np.median(base)), ratios


def quartiles(ratios: Sequence[float]) -> tuple[float, list[float]]:
    """The median, and the first and third quartile."""
    first, median, third = np.quantile(ratios, [0.25, 0.5, 0.75])
    return float(median), [float(first), float(third)]


def _advance(program: Program, arguments: Sequence[Any]) -> Callable[[Callable[..., Any]], None]:
    """What runs the step, or a loop of steps, on the state that the last call left, and waits for the next one."""
    state, *arguments = jax.device_put((program.init(), *arguments), program.compiled.input_shardings[0])

    def advance(function: Callable[..., Any]) -> None:
        nonlocal state
        state = jax.block_until_ready(function(state, *arguments))

    return advance


def _compiled_loop(program: Program, arguments: Sequence[Any]) -> Any:
    def loop(steps, state, *arguments):
        return jax.lax.fori_loop(0, steps, lambda _, state: program.step(state, *arguments), state)

    return jax.jit(loop, donate_argnums=1).lower(1, jax.eval_shape(program.init), *arguments).compile()


def _seconds(advance: Callable[[Callable[..., Any]], None], function: Callable[..., Any]) -> float:
    began = time.perf_counter()
    advance(function)
    return time.perf_counter() - began
