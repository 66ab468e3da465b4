"""Two real processes with four devices each, killed and started again, train a run as one process with eight does."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from examples.lab import records
from tests.examples.test_imagenet_lt import write_official

ROOT = Path(__file__).parents[2]
DATA = (
    "--preset whole --dataset imagenet-lt --size 96"  # normalisation of fewer pixels multiplies rounding by 40 a step
)
OPTIONS = f"{DATA} --epochs 3 --batch-size 8 --method absgd --temperature 1"


def launch(folder, name, rank=0, count=1, port=0):
    """A process that trains, as ``srun`` would start it."""
    slurm = {"JOB_ID": 1, "STEP_NODELIST": "localhost", "NTASKS": count, "PROCID": rank, "LOCALID": rank}
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // count} --xla_backend_optimization_level=0",
    }
    over = ["--devices", "8"]
    if count > 1:
        environment |= {f"SLURM_{key}": str(value) for key, value in slurm.items()}
        environment |= {"JAX_COORDINATOR_PORT": str(port), "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
        over = ["--distributed"]
    places = {"--data-dir": folder, "--work": folder / name / "work", "--out": folder / name / "out"}
    options = [*OPTIONS.split(), *over, *(str(word) for pair in places.items() for word in pair)]
    command = [sys.executable, "-m", "examples.imagenet_lt", "train", *options]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def pair(folder, name):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [launch(folder, name, rank, 2, port) for rank in range(2)]


def ended(started):
    try:
        for process in started:
            out, _ = process.communicate(timeout=240)
            assert process.returncode == 0, out
    finally:
        for process in started:
            process.kill()


def record(folder, name):
    (path,) = (folder / name / "out").rglob("*.json")
    return records.read(path)


def test_two_processes_are_killed_and_go_on_as_one(tmp_path):
    folder = write_official(tmp_path)
    ended([launch(folder, "alone")])
    begun, limit = pair(folder, "two"), time.monotonic() + 240
    while time.monotonic() < limit:
        if any(path.read_text().count("\n") for path in (folder / "two").glob("work/*/metrics.jsonl")):
            break
        time.sleep(0.02)
    for process in begun:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not list((folder / "two").glob("out/**/*.json"))
    ended(pair(folder, "two"))
    alone, two = record(folder, "alone"), record(folder, "two")
    for name in ("loss", "sample_size", "test_accuracy"):
        np.testing.assert_allclose(two["by_epoch"][name], alone["by_epoch"][name], rtol=3e-3, err_msg=name)
    loss = np.array(alone["by_epoch"]["loss"])[:, 1]
    assert abs(loss[2] - loss[0]) > 0.1 * loss[0]  # what was lost by the kill would be seen
