"""Movie reviews: the official folders in miniature, words as numbers, the network, and a sweep end to end."""

import numpy as np
import pytest
from flax import nnx

from examples.imdb import data
from examples.imdb.experiment import EXPERIMENT, PRESETS, make_run
from examples.imdb.models import ReviewClassifier
from examples.imdb.task import Imdb
from examples.lab import cli, files, records
from examples.lab.errors import UsageError, UserError

GOOD, BAD = "a wonderful film, truly GOOD", "an awful film<br /><br />truly bad"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for part in ("train", "test"):
        for kind, text in (("neg", BAD), ("pos", GOOD)):
            place = root / "aclImdb" / part / kind
            place.mkdir(parents=True)
            for i in range(60):
                (place / f"{i}_1.txt").write_text(text + " word" * (i % 7), encoding="utf-8")
    return root


def test_words(folder):
    train, test = data.read(folder)
    assert train.words[0] == ["an", "awful", "film", "truly", "bad"]
    assert train.words[-1][:5] == ["a", "wonderful", "film", "truly", "good"]
    np.testing.assert_array_equal(np.bincount(test.labels), [60, 60])


def test_numbers():
    numbers = data.vocabulary([["a", "b", "a"], ["a", "c", "b"]], 2)
    assert sorted(numbers) == ["a", "b"]
    assert sorted(numbers.values()) == [2, 3]
    a, b = numbers["a"], numbers["b"]
    encoded = data.encode([["a", "x", "b", "a"], ["b"], []], numbers, 3)
    np.testing.assert_array_equal(encoded, [[a, 1, b], [b, 0, 0], [1, 0, 0]])


def test_most_negative_reviews_are_removed_from_the_training_set_alone(folder):
    loaded = Imdb(dataset="imdb-10", validation=0.1).load(folder)
    assert [np.bincount(part.labels).tolist() for part in (loaded.train, loaded.validation, loaded.test)] == [
        [5, 54],
        [6, 6],
        [60, 60],
    ]
    other = Imdb(dataset="imdb-50").load(folder)
    np.testing.assert_array_equal(np.bincount(other.train.labels), [30, 60])
    for name in ("imdb", "imdb-0", "imdb-101", "imdb--5", "imdb-1.2.3", "imdb-0.001", "sst-10"):
        with pytest.raises(UsageError, match=f"--dataset {name}"):
            Imdb(dataset=name).load(folder)


def test_batches_are_padded_to_their_longest_review(folder):
    task = Imdb(dataset="imdb-100")
    train = task.load(folder).train
    assert train.inputs.shape == (120, 200)
    batch = task.batch(train, np.array([0, 5, 119]))
    assert batch.inputs.shape == (3, 25)
    np.testing.assert_array_equal(batch.inputs, train.inputs[[0, 5, 119], :25])
    np.testing.assert_array_equal(task.lengths(train), (train.inputs != 0).sum(axis=1))
    train.inputs[5, :60] = 2  # for all processes as long as the longest review of all
    assert [task.batch(train, np.array([0, 5, 119]), [i]).inputs.shape for i in range(3)] == 3 * [(1, 75)]


def test_missing_and_empty_folders(folder, tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(files.pooch, "retrieve", offline)
    with pytest.raises(UserError, match=r"is missing, and https://ai\.stanford\.edu.*no network"):
        data.read(tmp_path)

    def full(*args, path, processor, **kwargs):
        (path / processor.extract_dir / "aclImdb/train/neg").mkdir(parents=True)
        raise OSError("no space left")

    monkeypatch.setattr(files.pooch, "retrieve", full)
    for _ in range(2):  # half of the reviews are not taken for all
        with pytest.raises(UserError, match="no space left"):
            data.read(tmp_path)
    (tmp_path / "aclImdb").mkdir()
    with pytest.raises(UserError, match="holds no reviews"):
        data.read(tmp_path)


def test_padding_changes_nothing():
    module = ReviewClassifier(50, 6, 4, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    reviews = [rng.integers(1, 50, n) for n in (3, 7, 1)]
    padded = np.zeros((3, 12), np.int32)
    for row, review in zip(padded, reviews, strict=True):
        row[: len(review)] = review
    features = nnx.jit(lambda module, tokens: module.features(tokens, train=True))
    together = features(module, padded)
    for i, review in enumerate(reviews):
        np.testing.assert_allclose(together[i], features(module, review[None])[0], atol=1e-6)


def test_the_backward_direction_is_the_forward_one_of_the_reversed_review():
    module = ReviewClassifier(50, 6, 4, nnx.Rngs(0))
    nnx.update(module.backward, nnx.state(module.forward, nnx.Param))
    tokens = np.random.default_rng(0).integers(1, 50, (2, 9))
    ahead, back = (np.split(np.asarray(module.features(t, train=True)), 2, axis=1) for t in (tokens, tokens[:, ::-1]))
    np.testing.assert_allclose(ahead[0], back[1], atol=1e-6)
    np.testing.assert_allclose(ahead[1], back[0], atol=1e-6)
    assert not np.allclose(ahead[0], ahead[1])


def test_an_lstm_by_hand():
    module = ReviewClassifier(50, 6, 4, nnx.Rngs(0))
    tokens = np.array([[3, 17, 8]])
    cell, x = module.forward.cell, np.asarray(module.embedding(tokens))[0].astype(np.float64)
    inner = {k: np.asarray(v) for k, v in (("i", cell.dense_i.kernel[...]), ("h", cell.dense_h.kernel[...]))}
    bias, c, h, highest = np.asarray(cell.dense_h.bias[...]), np.zeros(4), np.zeros(4), np.full(4, -np.inf)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    for word in x:
        i, f, g, o = np.split(word @ inner["i"] + h @ inner["h"] + bias, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        highest = np.maximum(highest, h)
    np.testing.assert_allclose(module.features(tokens, train=True)[0, :4], highest, atol=1e-5)


def test_glove_vectors_are_where_words_begin(folder, tmp_path):
    path = tmp_path / "glove.txt"
    path.write_text("film 1 2 3\nunheard 4 5 6\n. . . 7 8 9\n", encoding="utf-8")
    task = Imdb(dataset="imdb-100", embedding=3, glove=str(path))
    loaded = task.load(folder)
    _, params, rest = nnx.split(task.network("ce", nnx.Rngs(0)), nnx.Param, ...)
    before = np.array(params["embedding"]["embedding"][...])
    after = np.asarray(task.calibrate(params, rest, loaded)[0]["embedding"]["embedding"][...])
    film = loaded.pretrained["film"]
    np.testing.assert_array_equal(after[film], [1, 2, 3])
    np.testing.assert_array_equal(np.delete(after, film, 0), np.delete(before, film, 0))
    for text in ("film 1 2", "film 1 2 x"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"glove\.txt"):
            task.calibrate(params, rest, loaded)


def test_the_paper_s_schedule():
    run = make_run(EXPERIMENT.recipes("paper")[0])
    assert [(stage.epochs, stage.rate) for stage in run.stages] == [
        (30, (0.01, 0.01)),
        (30, (1e-4, 1e-4)),
        (30, (1e-6, 1e-6)),
    ]
    rows = [row for preset in PRESETS for row in EXPERIMENT.recipes(preset)]
    assert len({make_run(row) for row in rows}) == len(rows)


def test_a_sweep_end_to_end(folder, tmp_path, capsys):
    options = ["--data-dir", str(folder), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    chosen = ["--preset", "smoke", "--datasets", "imdb-50", "--seeds", "1", "--tables", "5", "--losses", "cb-ce"]
    assert cli.main(EXPERIMENT, ["sweep", *chosen, *options]) == 0
    found = [records.read(path) for path in sorted(tmp_path.glob("out/smoke/imdb-50/*.json"))]
    assert {(r["method"], r["loss"]) for r in found} == {("sgd", "cb-ce"), ("absgd", "cb-ce")}
    losses = [[loss for _, loss in r["by_epoch"]["loss"]] for r in found]
    assert all(end < begin for begin, *_, end in losses)
    assert cli.main(EXPERIMENT, ["report", str(tmp_path / "out/smoke")]) == 0
    assert cli.main(EXPERIMENT, ["train", "--length", "0", *options]) == 2
    assert "--length 0" in capsys.readouterr().err
