"""CIFAR-LT: what it reads and refuses, what it trains, and that a killed run ends as an uninterrupted one does."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.cifar_lt import augment, checkpoint, data, imbalance, safe_pickle
from examples.cifar_lt.configs import CONFIGS
from examples.cifar_lt.conv import _conv_cpu
from examples.cifar_lt.errors import UserError
from examples.cifar_lt.main import main
from examples.cifar_lt.models import ResNet, shortcut
from examples.cifar_lt.schedule import make_learning_rate, temperature_rules
from examples.cifar_lt.train import Data, make_functions

ROOT = Path(__file__).parents[2]
ARCHIVE = data.ARCHIVES["cifar10"][0]
PICKLED = data.ARCHIVES["cifar10"][1]


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory):
    """A folder with noise in the official binary layout."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (root / ARCHIVE.folder).mkdir()
    for name in (*ARCHIVE.train, *ARCHIVE.test):
        records = rng.integers(256, size=(10_000, 1 + data.IMAGE_BYTES), dtype=np.uint8)
        records[:, 0] = np.arange(10_000) % 10
        (root / ARCHIVE.folder / name).write_bytes(records.tobytes())
    return root


def test_binary_records_are_read_as_channels_first(tmp_path):
    pixels = np.arange(2 * data.IMAGE_BYTES, dtype=np.uint32).astype(np.uint8).reshape(2, -1)
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(b"".join(bytes([label]) + image.tobytes() for label, image in zip((7, 3), pixels, strict=True)))
    split = data.read(path, ARCHIVE, 2)
    np.testing.assert_array_equal(split.labels, [7, 3])
    assert split.images[1, 2, 5, 1] == pixels[1, 1 * 1024 + 2 * 32 + 5]  # green, row 2, column 5


def test_python_archives_are_read_whichever_python_wrote_them(tmp_path):
    images = np.arange(3 * data.IMAGE_BYTES).astype(np.uint8).reshape(3, -1)
    modern = pickle.dumps({"data": images, "labels": [1, 2, 3]}, protocol=3)
    for written in (modern, modern.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")):
        path = tmp_path / "data_batch_1"
        path.write_bytes(written)
        split = data.read(path, PICKLED, 3)
        np.testing.assert_array_equal(split.labels, [1, 2, 3])
        np.testing.assert_array_equal(split.images[:, 0, 1, 2], images[:, 2048 + 1])


class Malicious:
    def __init__(self, call, *arguments):
        self.reduced = (call, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("call", [(os.system, "touch broken"), (eval, "1"), (np.fromfile, "x")])
def test_malicious_pickles_are_refused_and_not_run(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data_batch_1"
    path.write_bytes(pickle.dumps({"data": Malicious(*call), "labels": []}))
    with pytest.raises(pickle.UnpicklingError, match="asks for"):
        safe_pickle.load(path)
    with pytest.raises(UserError, match="data_batch_1 is not a pickle of images"):
        data.read(path, PICKLED, 3)
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps([1]), pickle.dumps({"data": np.zeros(3)})])
def test_damaged_python_archives_are_refused(tmp_path, content):
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(UserError, match="data_batch_1"):
        data.read(tmp_path / "data_batch_1", PICKLED, 3)


def test_missing_truncated_and_wrong_binary_files_are_refused(tmp_path):
    path = tmp_path / "test_batch.bin"
    with pytest.raises(UserError, match=r"test_batch\.bin is missing.*cifar-10-binary"):
        data.read(path, ARCHIVE, 2)
    path.write_bytes(b"\0" * 6145)
    with pytest.raises(UserError, match="has 6,145 bytes, expected 6,146"):
        data.read(path, ARCHIVE, 2)
    path.write_bytes(b"\x0b" * 6146)
    with pytest.raises(UserError, match="classes outside 0 to 9"):
        data.read(path, ARCHIVE, 2)


def test_class_counts_are_those_of_the_benchmark():
    long_tail = imbalance.class_counts("lt", 100, 10, 5000)
    np.testing.assert_array_equal(long_tail, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])
    assert long_tail.sum() == 12_406
    np.testing.assert_array_equal(imbalance.class_counts("step", 10, 4, 500), [500, 500, 50, 50])
    assert imbalance.class_counts("lt", 100, 100, 500).sum() == 10_847
    with pytest.raises(UserError, match=r"ratio 0\.5"):
        imbalance.class_counts("lt", 0.5, 10, 100)
    with pytest.raises(UserError, match="rarest class"):
        imbalance.class_counts("lt", 1000, 10, 100)


def test_subsets_have_their_counts_and_depend_on_their_seed_only():
    labels = np.random.default_rng(0).integers(3, size=300)
    chosen = imbalance.subset(labels, np.array([30, 10, 1]), 5)
    np.testing.assert_array_equal(np.bincount(labels[chosen]), [30, 10, 1])
    assert len(set(chosen)) == 41
    np.testing.assert_array_equal(chosen, imbalance.subset(labels, np.array([30, 10, 1]), 5))
    assert not np.array_equal(chosen, imbalance.subset(labels, np.array([30, 10, 1]), 6))


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_parameter_counts_are_the_published_ones(depth, parameters):
    model = nnx.eval_shape(lambda: ResNet(depth, 10, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))) == parameters


def test_option_a_shortcut_subsamples_and_pads():
    x = jnp.arange(2 * 4 * 4 * 3.0).reshape(2, 4, 4, 3)
    y = shortcut(x, 2, 7)
    np.testing.assert_array_equal(y[..., 2:5], x[:, ::2, ::2])
    assert not np.any(y[..., :2])
    assert not np.any(y[..., 5:])


@pytest.mark.parametrize("stride", [1, 2])
def test_the_written_out_gradient_of_the_convolution_is_its_gradient(stride):
    rng = np.random.default_rng(0)
    x, kernel = np.float32(rng.normal(size=(2, 8, 8, 3))), np.float32(rng.normal(size=(3, 3, 3, 4)))

    def plain(x, kernel):
        y = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.sin(y))

    expected = jax.grad(plain, (0, 1))(x, kernel)
    actual = jax.grad(lambda x, k: jnp.sum(jnp.sin(_conv_cpu(x, k, stride))), (0, 1))(x, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)


def test_crops_are_crops_and_flips_are_flips():
    images = np.random.default_rng(0).integers(256, size=(3, 32, 32, 3), dtype=np.uint8)
    padded = np.asarray(augment.pad(jnp.array(images)))
    out = np.asarray(augment.crop_and_flip(jnp.array(padded), jnp.array([2, 0]), jax.random.key(0)))
    for image, source in zip(out, padded[[2, 0]], strict=True):
        crops = [source[i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        assert any(np.array_equal(image, c) or np.array_equal(image, c[:, ::-1]) for c in crops)


def test_the_paper_schedule():
    config, steps = CONFIGS["paper"], 96
    rate = make_learning_rate(config, steps)
    values = [float(rate(epoch * steps)) for epoch in (0, 4, 159, 160, 179, 180, 199)]
    np.testing.assert_allclose(values, [0.02, 0.1, 0.1, 1e-3, 1e-3, 1e-5, 1e-5], rtol=1e-5)
    _, rule = temperature_rules(dataclasses.replace(config, temperature=1.0), steps)
    assert rule(160 * steps - 1) == np.inf
    assert rule(160 * steps) == 1


def test_an_epoch_is_its_steps_one_after_another_and_learns():
    config = dataclasses.replace(CONFIGS["smoke"], temperature=1.0, epochs=2, depth=8, width=2)
    counts = np.full(10, 16)
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(10), 16)
    images = (25 * labels[:, None, None, None] + rng.integers(20, size=(160, 32, 32, 3))).astype(np.uint8)
    functions, train = make_functions(config, counts), Data(jnp.array(images), jnp.array(labels, jnp.int32))
    rule = temperature_rules(config, 5)[1]
    epoch = jax.jit(functions.train_epoch)
    start = functions.init(0)
    together, first = epoch(start, train, rule)

    state, step = start, jax.jit(functions.step)
    for batch, key in zip(*functions.plan(start, 160), strict=True):
        seen = augment.normalise(augment.crop_and_flip(augment.pad(train.images), batch, key))
        state, _ = step(state, seen, train.labels[batch], rule)
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)  # noqa: E731
    jax.tree.map(same, together.params, state.params)
    jax.tree.map(same, together.opt_state, state.opt_state)
    for _ in range(4):
        together, last = epoch(together, train, rule)
    assert last.loss < first.loss


def test_a_stale_folder_and_bad_options_are_refused(tmp_path, capsys):
    checkpoint.claim(tmp_path / "run", {"seed": 0})
    with pytest.raises(UserError, match="seed: 0 there, 1 here"):
        checkpoint.claim(tmp_path / "run", {"seed": 1})
    assert main(["--preset", "smoke", "--ratio", "0.5"]) == 2
    assert "--ratio must be at least 1" in capsys.readouterr().err
    for arguments in (["--preset", "huge"], ["--loss", "hinge"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2


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
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        result = json.loads((out / "result.json").read_text())
        for record in (*lines, result):
            for name in ("seconds", "compile_seconds", "command"):
                record.pop(name, None)
        return lines, result

    assert start(tmp_path / "whole").wait(timeout=300) == 0
    interrupted, log = start(tmp_path / "killed"), tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not log.exists() or len(log.read_text().splitlines()) < 2:
        assert interrupted.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    interrupted.send_signal(signal.SIGKILL)
    interrupted.wait()
    assert not (tmp_path / "killed" / "result.json").exists()
    assert start(tmp_path / "killed").wait(timeout=300) == 0
    assert comparable(tmp_path / "killed") == comparable(tmp_path / "whole")
    assert len(comparable(tmp_path / "whole")[0]) == CONFIGS["smoke"].epochs
