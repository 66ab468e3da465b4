"""What is read from compiled programs, and the times of steps by a clock of our own."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P, SingleDeviceSharding

from benchmarks.harness import programs
from benchmarks.harness.programs import Collective, Program

W, X = jnp.ones((4, 4)), jnp.ones((32, 4))


def compiled(step, out_specs=None):
    """Over the 8 devices, each with 4 rows of X."""
    mapped = jax.shard_map(step, mesh=programs.mesh(8), in_specs=(P(), P("data")), out_specs=out_specs or P())
    return programs.compile_step(mapped, lambda: W, X).compiled


def mean(x):
    return jax.lax.pmean(x, "data")


@pytest.mark.parametrize(
    ("step", "before_backward"),
    [
        (lambda w, x: mean(x) @ w, True),
        (lambda w, x: mean(x @ w), False),
        (lambda w, x: jax.lax.fori_loop(0, 3, lambda _, w: w - mean(x @ w), w), True),  # that of the next turn waits
        (lambda w, x: jax.lax.fori_loop(0, 3, lambda _, v: v - mean(jnp.sin(v * x)), w @ w), False),
        (lambda w, x: jax.lax.cond(w[0, 0] > 0, lambda: mean(x @ w), lambda: w) @ w, True),
    ],
)
def test_a_collective_is_before_the_backward_pass_if_a_product_waits_for_it(step, before_backward):
    assert programs.collectives(compiled(step)) == [Collective("all-reduce", 4 * 4 * 4, before_backward)]


def test_bytes_of_collectives():
    gathered = compiled(lambda w, x: jax.lax.all_gather(x, "data", tiled=True), P("data"))
    assert programs.collectives(gathered) == [Collective("all-gather", 32 * 4 * 4, False)]
    shifted = compiled(lambda w, x: jax.lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)]), P("data"))
    assert programs.collectives(shifted) == [Collective("collective-permute", 4 * 4 * 4, False)]


def test_a_program_on_its_own_has_no_collectives():
    assert programs.collectives(compiled(lambda w, x: x @ w, P("data"))) == []


HLO = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(bf16[100]{0}, f32[2,3]{1,0})->f32[]}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%turn (state: (s32[], f32[5])) -> (s32[], f32[5]) {
  %state = (s32[], f32[5]{0}) parameter(0)
  %part = f32[5]{0} get-tuple-element(%state), index=1
  %in-loop = f32[5]{0} all-reduce(%part), to_apply=%sum
  ROOT %next = (s32[], f32[5]{0}) tuple(%count, %in-loop)
}

%goes-on (state.1: (s32[], f32[5])) -> pred[] {
  %state.1 = (s32[], f32[5]{0}) parameter(0)
  ROOT %less = pred[] compare(%count.1, %end), direction=LT
}

%product (p: f32[2,3]) -> f32[2,2] {
  %p = f32[2,3]{1,0} parameter(0)
  ROOT %dot = f32[2,2]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%scattered (q: f32[16]) -> f32[2] {
  %q = f32[16]{0} parameter(0)
  ROOT %scatter = f32[2]{0} reduce-scatter(%q), dimensions={0}, to_apply=%sum
}

ENTRY %main (x: bf16[100], y: f32[2,3]) -> f32[] {
  %x = bf16[100]{0} parameter(0)
  %y = f32[2,3]{1,0} parameter(1)
  %soon = bf16[100]{0} all-reduce-start(%x), to_apply=%sum
  %late = (f32[2,3]{1,0}, pred[7]{0}) all-reduce-start(%y, %z), to_apply=%sum
  %soon.done = bf16[100]{0} all-reduce-done(%soon)
  %gather = (f32[1,3]{1,0}, f32[8,3]{1,0}) all-gather-start(%y.1), dimensions={0}
  %shift = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%y.2), source_target_pairs={{0,1},{1,0}}
  %wrapped = ((f32[16]{0}), f32[2]{0}) async-start(%y.3), calls=%scattered
  %fusion = f32[2,2]{1,0} fusion(%y), kind=kOutput, calls=%product
  %late.done = (f32[2,3]{1,0}, pred[7]{0}) all-reduce-done(%late)
  %gather.done = f32[8,3]{1,0} all-gather-done(%gather)
  %shift.done = f32[6]{0} collective-permute-done(%shift)
  %wrapped.done = f32[2]{0} async-done(%wrapped)
  ROOT %while = (s32[], f32[5]{0}) while(%start), condition=%goes-on, body=%turn
}
"""


def test_collectives_of_a_program_written_by_hand():
    assert programs.collectives(SimpleNamespace(as_text=lambda: HLO)) == [
        Collective("all-reduce", 100 * 2, True),  # done before the product
        Collective("all-reduce", 2 * 3 * 4 + 7, False),
        Collective("all-gather", 8 * 3 * 4, False),
        Collective("collective-permute", 6 * 4, False),
        Collective("reduce-scatter", 2 * 4, False),
        Collective("all-reduce", 5 * 4, False),
    ]


def test_flops_of_a_product():
    program = programs.compile_step(lambda state, x: (state[0], x @ state[0]), lambda: (W, X), X)
    assert programs.figures(program.compiled)["flops"] == 2 * 32 * 4 * 4


def test_what_may_be_read_from_a_cache_has_no_time_of_compilation(tmp_path):
    kept = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert programs.compile_step(lambda state, x: state @ x.T, lambda: W, W).compile_seconds > 0
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        assert programs.compile_step(lambda state, x: state @ x.T, lambda: W, W).compile_seconds is None
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)


def test_bytes_of_a_tree():
    tree = {"a": jnp.ones((2, 3)), "b": (jnp.ones(5, jnp.int8), None, jax.ShapeDtypeStruct((7,), jnp.bfloat16))}
    assert programs.nbytes(tree) == 2 * 3 * 4 + 5 + 7 * 2
    assert programs.nbytes(None) == 0


def test_devices_that_are_missing_are_had_in_another_process(monkeypatch):
    assert programs.on_devices(8, jax.device_count) == 8
    monkeypatch.delenv("XLA_FLAGS")
    assert programs.on_devices(9, jax.device_count) == 9
    assert jax.device_count() == 8


class Clock:
    """Time that passes only in steps, which take twice as long from some reading on."""

    def __init__(self, monkeypatch, slow_from=float("inf")):
        self.now, self.slow_from = 0.0, slow_from
        monkeypatch.setattr(programs, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def program(self, seconds):
        def run(state):
            self.now += seconds * (2 if self.now > self.slow_from else 1)
            return state

        run.input_shardings = ((SingleDeviceSharding(jax.devices()[0]),), {})
        return Program(run, lambda: jnp.zeros(()), run, 0.0)


def test_ratios_are_those_of_the_times(monkeypatch):
    clock = Clock(monkeypatch)
    alternatives = {"first": clock.program(2.0), "second": clock.program(3.0), "third": clock.program(20.0)}
    seconds, ratios = programs.time_ratios(alternatives, (), 10, rarely=["third"])
    assert seconds == 2
    assert ratios == {"first": [1] * 10, "second": [1.5] * 10, "third": [10] * 3}  # of rounds 0, 4 and 8


def test_a_machine_that_slows_down_changes_no_ratio(monkeypatch):
    clock = Clock(monkeypatch, slow_from=55)
    seconds, ratios = programs.time_ratios({"a": clock.program(1.0), "b": clock.program(4.0)}, (), 20)
    assert seconds > 1
    assert sorted(ratios["b"])[1:-1] == [4] * 18  # but of the round in which it did


@pytest.mark.parametrize(("most_seconds", "rounds"), [(0.0, 3), (10.0, 5), (100.0, 12)])
def test_rounds_are_as_many_as_there_is_time_for_but_three(monkeypatch, most_seconds, rounds):
    clock = Clock(monkeypatch)
    _, ratios = programs.time_ratios({"a": clock.program(2.0)}, (), 12, most_seconds=most_seconds)
    assert len(ratios["a"]) == rounds


def test_short_steps_are_timed_in_loops(monkeypatch):
    clock = Clock(monkeypatch)

    def lasting(seconds):
        def pass_time(state):
            clock.now += seconds
            return state + np.float32(1)

        def step(state):
            return jax.pure_callback(pass_time, jax.ShapeDtypeStruct((), jnp.float32), state)

        return programs.compile_step(step, lambda: jnp.zeros(()))

    seconds, ratios = programs.time_ratios({"one": lasting(1e-3), "ten": lasting(1e-2)}, (), 5)
    assert seconds == pytest.approx(1e-3)  # of a loop of at least LEAST_SECONDS
    assert ratios == {"one": [1] * 5, "ten": pytest.approx([10] * 5)}


def test_quartiles():
    assert programs.quartiles([5, 1, 4, 2, 3]) == (3, [2, 4])
    assert programs.quartiles([0, 1]) == (0.5, [0.25, 0.75])
