"""Two real processes, each with half of the batch, train as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

WORKER = Path(__file__).with_name("process_worker.py")


def launch(rank, count, port):
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")}
    arguments = [sys.executable, "-W", "error", str(WORKER), str(rank), str(count), str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, env=environment, cwd=WORKER.parents[1], **pipes)


def results(processes):
    try:
        outputs = [p.communicate(timeout=180) for p in processes]
        for p, (_, errors) in zip(processes, outputs, strict=True):
            assert p.returncode == 0, errors
        return [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    finally:
        for p in processes:
            p.kill()


def test_two_processes_give_the_parameters_of_one(free_port):
    port = free_port()
    pair = results([launch(rank, 2, port) for rank in range(2)])
    (alone,) = results([launch(0, 1, port)])
    assert alone["processes"] == 1
    for one in pair:
        assert one["processes"] == 2
        for form in ("shard_map", "sharded arrays"):
            np.testing.assert_allclose(one[form], alone["shard_map"], rtol=3e-6, err_msg=form)
