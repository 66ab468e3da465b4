"""Two real processes with four devices each, killed and started again, train a run as one process with eight does."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from examples.lab import cli, records
from tests.examples.toy_experiment import EXPERIMENT

ROOT = Path(__file__).parents[2]


def arguments(folder, dataset):
    places = {"--data-dir": folder, "--work": folder / "work", "--out": folder / "out"}
    options = f"train --dataset {dataset} --epochs 8 --method absgd --temperature 1 --begin 0.5".split()
    return options + [str(word) for pair in places.items() for word in pair]


def start(rank, port, folder, dataset):
    """A process as ``srun`` starts it."""
    slurm = {"JOB_ID": 1, "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": rank, "LOCALID": rank}
    environment = {
        **os.environ,
        **{f"SLURM_{key}": str(value) for key, value in slurm.items()},
        "JAX_COORDINATOR_PORT": str(port),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"),
    }
    command = [sys.executable, "-m", "tests.examples.toy_experiment", *arguments(folder, dataset), "--distributed"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)


def pair(folder, dataset):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(rank, port, folder, dataset) for rank in range(2)]


def kill_in_the_middle(folder, dataset):
    begun, limit = pair(folder, dataset), time.monotonic() + 120
    while not any(path.read_text().count("\n") > 1 for path in folder.glob("work/*/metrics.jsonl")):
        assert time.monotonic() < limit
        assert all(process.poll() is None for process in begun), begun[0].communicate()
        time.sleep(0.01)
    for process in begun:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not list(folder.glob("out/**/*.json"))


@pytest.mark.parametrize(("dataset", "killed"), [("clouds", False), ("sorted", True)])
def test_two_processes_train_as_one_and_go_on_when_they_are_killed(tmp_path, dataset, killed):
    two = tmp_path / "two"
    if killed:
        kill_in_the_middle(two, dataset)
    both = pair(two, dataset)
    try:
        outputs = [process.communicate(timeout=120)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], outputs
    finally:
        for process in both:
            process.kill()
    assert "epoch" not in outputs[1]  # the first process speaks for all
    assert cli.main(EXPERIMENT, [*arguments(tmp_path / "one", dataset), "--devices", "8"]) == 0
    one, other = (records.read(next((tmp_path / name).glob("out/**/*.json"))) for name in ("one", "two"))
    assert len(one["by_epoch"]["loss"]) == 8
    for name in ("loss", "sample_size", "largest_weight", "test_accuracy"):
        np.testing.assert_allclose(other["by_epoch"][name], one["by_epoch"][name], rtol=2e-3, err_msg=name)
