"""CIFAR example: the command line, what a run leaves on disk, and that a killed run ends as if it had not been."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples.cifar_lt import checkpoint
from examples.cifar_lt.configs import CONFIGS
from examples.cifar_lt.errors import UserError, exit_code
from examples.cifar_lt.main import train
from tests.examples.cifar_files import write_cifar10

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    folder = write_cifar10(tmp_path_factory.mktemp("data"))
    yield folder
    shutil.rmtree(folder)  # 180 MB


def test_a_stale_result_and_bad_options_are_refused(tmp_path, capsys):
    checkpoint.write_json(tmp_path / "result.json", {"config": {"seed": 0}})
    with pytest.raises(UserError, match="seed: 0 there, 1 here"):
        checkpoint.claim(tmp_path / "result.json", {"seed": 1})
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(UserError, match="not the result of a run"):
        checkpoint.claim(tmp_path / "result.json", {"seed": 1})
    assert exit_code(lambda: train(["--preset", "smoke", "--ratio", "0.5"])) == 2
    assert "--ratio must be at least 1" in capsys.readouterr().err
    for arguments in (["--preset", "huge"], ["--loss", "hinge"]):
        with pytest.raises(SystemExit) as caught:
            train(arguments)
        assert caught.value.code == 2


def test_a_damaged_archive_is_told_without_a_traceback(tmp_path, capsys):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    (folder / "data_batch_1.bin").write_bytes(b"cut")
    options = ["--preset", "smoke", "--data-dir", str(tmp_path), "--out", str(tmp_path / "run")]
    assert exit_code(lambda: train(options)) == 1
    assert "data_batch_1.bin has 3 bytes, expected 30,730,000" in capsys.readouterr().err


def test_torn_and_surplus_metrics_are_taken_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3}\n{"epo')
    assert [line["epoch"] for line in checkpoint.read_metrics(path, 2)] == [1, 2]
    assert path.read_text() == '{"epoch": 1}\n{"epoch": 2}\n'


def test_a_killed_run_continues_to_the_same_end(cifar10, tmp_path):
    def start(out):
        command = [sys.executable, "-m", "examples.cifar_lt.main", "--preset", "smoke", "--kl-radius", "1.0"]
        command += ["--data-dir", str(cifar10), "--out", str(out)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)

    def comparable(out):
        result = json.loads((out / "result.json").read_text())
        for name in ("seconds", "compile_seconds", "command"):
            result.pop(name)
        lines = [json.loads(path.read_text()) for path in sorted(out.glob("*/metrics.json"))]
        for line in itertools.chain(*lines):
            for name in ("seconds", "compile_seconds"):
                line.pop(name)
        return result, lines

    assert start(tmp_path / "whole").wait(timeout=300) == 0
    interrupted = start(tmp_path / "killed")
    deadline = time.monotonic() + 300
    while not any(log.read_text().count("\n") >= 2 for log in (tmp_path / "killed").glob("*/metrics.jsonl")):
        assert interrupted.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    interrupted.send_signal(signal.SIGKILL)
    interrupted.wait()
    assert not (tmp_path / "killed" / "result.json").exists()
    assert start(tmp_path / "killed").wait(timeout=300) == 0
    assert comparable(tmp_path / "killed") == comparable(tmp_path / "whole")
    assert len(comparable(tmp_path / "whole")[0]["loss_by_epoch"]) == CONFIGS["smoke"].epochs
