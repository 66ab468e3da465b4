"""Two real processes with four devices each, killed and started again, train a run as one process with eight does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from examples.lab import cli, records
from tests.examples.toy_experiment import EXPERIMENT

ROOT = Path(__file__).parents[2]


# Without data for the first process; batches that the hosts make, whose shape depends on the whole batch; and data that
# are on the devices.
DATASETS = ("missing", "sorted", "clouds")
OPTIONS = ["--epochs", "8", "--method", "absgd", "--temperature", "1", "--begin", "0.5"]


def commands(folder, *options):
    places = {"--data-dir": folder, "--work": folder / "work", "--out": folder / "out"}
    common = [*OPTIONS, *options, *(str(word) for pair in places.items() for word in pair)]
    return {dataset: ["train", "--dataset", dataset, *common] for dataset in DATASETS}


def start(rank, port, folder):
    """A process as ``srun`` starts it."""
    slurm = {"JOB_ID": 1, "STEP_NODELIST": "localhost", "NTASKS": 2, "PROCID": rank, "LOCALID": rank}
    environment = {
        **os.environ,
        **{f"SLURM_{key}": str(value) for key, value in slurm.items()},
        "JAX_COORDINATOR_PORT": str(port),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"),
    }
    program = f"""
from tests.examples.toy_experiment import EXPERIMENT, cli

for dataset, command in {commands(folder, "--distributed")}.items():
    assert cli.main(EXPERIMENT, command) == (dataset == "missing")
"""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, "-c", program], env=environment, cwd=ROOT, **pipes)


def kill_in_the_middle(begun, folder):
    limit = time.monotonic() + 240
    while not any(path.read_text().count("\n") > 1 for path in folder.glob("work/*/metrics.jsonl")):
        assert time.monotonic() < limit
        assert all(process.poll() is None for process in begun), begun[0].communicate()
        time.sleep(0.01)
    for process in begun:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not list(folder.glob("out/**/*.json"))


def test_two_processes_that_were_killed_train_as_one(tmp_path, free_port):
    two = tmp_path / "two"
    pair = lambda port: [start(rank, port, two) for rank in range(2)]  # noqa: E731
    kill_in_the_middle(pair(free_port()), two)
    both = pair(free_port())
    try:
        outputs = [process.communicate(timeout=240)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], outputs
    finally:
        for process in both:
            process.kill()
    assert "epoch" not in outputs[1]  # the first process speaks for all
    assert "is empty" in outputs[0]
    assert "Another process has stopped" in outputs[1]  # and does not wait for the first
    for dataset, command in commands(tmp_path / "one", "--devices", "8").items():
        assert cli.main(EXPERIMENT, command) == (dataset == "missing")
    one, other = (
        [records.read(path) for path in sorted((tmp_path / name).glob("out/**/*.json"))] for name in ("one", "two")
    )
    assert {record["dataset"] for record in one} == {"sorted", "clouds"}
    for expected, actual in zip(one, other, strict=True):
        assert len(expected["by_epoch"]["loss"]) == 8
        for name in ("loss", "sample_size", "largest_weight", "test_accuracy"):
            np.testing.assert_allclose(
                actual["by_epoch"][name], expected["by_epoch"][name], rtol=2e-3, err_msg=f"{expected['dataset']} {name}"
            )
