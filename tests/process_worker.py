"""One of several processes that train together; run by test_processes.py: rank, number of processes, port."""

import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec as P

import absgd_jax


def per_example_loss(w, x, y):
    return (x @ w - y) ** 2


def main(rank, count, port):
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", count, rank)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, rng = NamedSharding(mesh, P("data")), np.random.default_rng(0)
    optimizer = absgd_jax.absgd(0.01, 2.0)

    def step(w, state, x, y, **options):
        risk, grads = absgd_jax.value_and_grad(per_example_loss, **options)(w, x, y, state=state)
        updates, state = optimizer.update(grads, state, w, value=risk)
        return optax.apply_updates(w, updates), state

    specs = {"in_specs": (P(), P(), P("data"), P("data")), "out_specs": P()}
    mapped = jax.shard_map(partial(step, axis_name="data"), mesh=mesh, **specs)
    trained = {"shard_map": jax.jit(mapped), "sharded arrays": jax.jit(step, out_shardings=NamedSharding(mesh, P()))}
    params = dict.fromkeys(trained, jnp.ones(4))
    states = {form: optimizer.init(w) for form, w in params.items()}
    for _ in range(5):
        x, y = np.float32(rng.normal(size=(16, 4))), np.float32(rng.normal(size=16))
        mine = slice(rank * 16 // count, (rank + 1) * 16 // count)  # no process needs more of the batch than its part
        batch = [jax.make_array_from_process_local_data(rows, a[mine]) for a in (x, y)]
        for form, train in trained.items():
            params[form], states[form] = train(params[form], states[form], *batch)
    print(json.dumps({form: np.asarray(w).tolist() for form, w in params.items()} | {"processes": jax.process_count()}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
