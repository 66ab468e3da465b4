"""X-rays: the official folders in miniature, a split by patient, cached lower layers, and a run end to end."""

import dataclasses
import shutil

import numpy as np
import pytest
from PIL import Image

from examples.covid_lt import task as covid_task
from examples.covid_lt.data import CLASSES, Xrays, covid_lt, read_npz, split_by_patient
from examples.covid_lt.experiment import EXPERIMENT, PRESETS, make_run
from examples.covid_lt.task import CovidLt
from examples.imagenet_lt import resnet
from examples.lab import cli, records
from examples.lab.errors import UsageError, UserError
from tests.examples.test_imagenet_resnet import blocks_of, random_weights

HEAD = (
    "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,"
    "Edema,Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices"
)


def write_image(path, grey):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((10, 12), grey, np.uint8)).save(path)


@pytest.fixture
def official(tmp_path):
    """Four kept images of CheXpert and one of the collection, and each kind of image that is not."""
    rows, names = [HEAD], iter(range(1, 9))

    def chexpert(view="Frontal", grey=0, **findings):
        path = f"CheXpert-v1.0-small/train/patient{next(names):05}/study1/view1.jpg"
        columns = HEAD.split(",")[5:]
        rows.append(f"{path},Male,50,{view},AP," + ",".join(findings.get(c.replace(" ", "_"), "") for c in columns))
        write_image(tmp_path / path, grey)

    chexpert(grey=10, No_Finding="1.0", Support_Devices="1.0")
    chexpert(grey=20, Pneumonia="1.0", Edema="1.0")
    chexpert(grey=30, Edema="1.0", Pneumonia="-1.0")
    chexpert(grey=40, Cardiomegaly="1.0")
    chexpert("Lateral", No_Finding="1.0")
    chexpert(Edema="-1.0")  # uncertain
    chexpert(Support_Devices="1.0")  # no finding of the body
    (tmp_path / "CheXpert-v1.0-small" / "train.csv").write_text("\n".join(rows) + "\n")
    root = tmp_path / "covid-chestxray-dataset"
    write_image(root / "images" / "a.png", 50)
    (root / "metadata.csv").write_text(
        "patientid,finding,view,modality,filename\n"
        "2,Pneumonia/Viral/COVID-19,PA,X-ray,a.png\n"
        "2,Pneumonia/Viral/COVID-19,Axial,CT,b.png\n"
        "3,Pneumonia/Viral/COVID-19,L,X-ray,c.png\n"
        "4,Pneumonia/Bacterial,PA,X-ray,d.png\n"
        "5,,PA,X-ray,e.png\n"
    )
    return tmp_path


def test_the_official_folders(official):
    found, every = covid_lt(official, 6), np.arange(5)
    images = found.images[every]
    assert images.shape == (5, 6, 6)
    by_grey = {round(float(image.mean()), -1): label for image, label in zip(images, found.labels, strict=True)}
    assert by_grey == {10: 1, 20: 2, 30: 0, 40: 0, 50: 3}
    assert len(set(found.patients)) == 5
    shutil.rmtree(official / "covid-chestxray-dataset" / "images")
    with pytest.raises(UserError, match=r"a\.png cannot be read"):
        covid_lt(official, 6).images[every]
    assert covid_lt(official, 6).images[np.flatnonzero(found.labels != 3)].shape == (4, 6, 6)  # no other is read
    (official / "CheXpert-v1.0-small" / "train.csv").unlink()
    with pytest.raises(UserError, match=r"train\.csv cannot be read.*stanfordmlgroup"):
        covid_lt(official, 6)


def xrays(per_patient=(1, 3, 2, 5), patients=40):
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.repeat(c, n * patients) for c, n in enumerate(per_patient)]).astype(np.int32)
    whose = np.concatenate([1000 * c + np.repeat(np.arange(patients), n) for c, n in enumerate(per_patient)])
    whose[0] = whose[-1]  # a patient with two classes
    images = rng.integers(0, 30, (len(labels), 32, 32)) + 60 * labels[:, None, None]
    return Xrays(images.astype(np.uint8), labels, whose)


@pytest.mark.parametrize("seed", range(3))
def test_no_patient_is_in_both(seed):
    found = xrays()
    test, rest = split_by_patient(found, 11, seed)
    np.testing.assert_array_equal(np.bincount(found.labels[test]), 11)
    assert not set(found.patients[test]) & set(found.patients[rest])
    assert len(set(test)) == len(test)
    assert len(rest) > len(found.labels) - 44 - 5 * 5  # little is lost
    with pytest.raises(UserError, match=CLASSES[0]):
        split_by_patient(found, 41, seed)


def test_files_that_hold_no_xrays(tmp_path):
    path, good = tmp_path / "xray64.npz", xrays()
    np.savez(path, image=good.images, label=good.labels.astype(np.uint8), patient=good.patients)
    np.testing.assert_array_equal(read_npz(path).labels, good.labels)
    for change in ({"label": good.labels + 1}, {"label": good.labels[1:]}, {"image": good.images[0]}):
        np.savez(path, **{"image": good.images, "label": good.labels, "patient": good.patients} | change)
        with pytest.raises(UserError, match="does not hold grey images"):
            read_npz(path)
    np.savez(path, image=good.images)
    with pytest.raises(UserError, match="it needs image, label and patient"):
        read_npz(path)


@pytest.fixture(scope="module")
def weights():
    return random_weights(14, 1000)


def test_datasets_by_name():
    for name in ("covid", "covid-lt-0.5", "covid-lt-1.0.0", "xray64", "xray64-x"):
        with pytest.raises(UsageError, match=f"--dataset {name}"):
            make_run(dataclasses.replace(PRESETS["xray"], dataset=name))
    rows = EXPERIMENT.recipes("xray")
    assert len({make_run(row) for row in rows}) == len(rows)
    rates = [(stage.epochs, stage.rate[0]) for stage in make_run(PRESETS["paper"]).stages]
    assert rates == [(30, 0.1), (30, 0.1 / 100), (30, 0.1 / 10_000)]
    deferred = make_run(next(row for row in rows if row.loss == "cb-ce"))
    assert [stage.class_weights for stage in deferred.stages] == [False, True, True]


def test_one_run_end_to_end(weights, tmp_path, monkeypatch, capsys):
    found = xrays((3, 3, 3, 3), 13)
    np.savez(tmp_path / "xray64.npz", image=found.images, label=found.labels, patient=found.patients)
    monkeypatch.setattr(covid_task, "read_keras", lambda path: weights)
    monkeypatch.setitem(resnet.BLOCKS, 50, blocks_of(14))  # shallow, or most of the time compiles
    options = ["--preset", "xray", "--data-dir", str(tmp_path), "--test-per-class", "5", "--batch-size", "16"]
    options += ["--epochs", "3", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    bounded = ["--method", "absgd", "--temperature", "1"]
    assert cli.main(EXPERIMENT, ["train", *bounded, *options]) == 0
    record = records.read(tmp_path / "out/xray/xray64-10/absgd-ce-t1-epochs3-batch-size16-s0.json")
    assert record["class_counts"][0] / record["class_counts"][-1] == pytest.approx(10, rel=0.2)
    assert [epoch for epoch, _ in record["by_epoch"]["loss"]] == [1, 2, 3]
    assert record["accuracy"] * 20 / 100 == pytest.approx(round(record["accuracy"] * 20 / 100))
    assert cli.main(EXPERIMENT, ["train", "--method", "meta", *options]) == 2
    assert "needs held-out examples" in capsys.readouterr().err
    data = CovidLt(dataset="xray64-10", test_per_class=5, validation=0.2).load(tmp_path)
    assert len(set(np.bincount(data.validation.labels))) == 1


def test_no_patient_is_in_two_splits(weights, tmp_path, monkeypatch):
    found = xrays((3, 3, 3, 3), 13)
    images = found.images.copy()
    images[:, 0, 0] = found.patients % 1000 + 60 * found.labels  # tells the patient: no two share it but one
    np.savez(tmp_path / "xray64.npz", image=images, label=found.labels, patient=found.patients)
    monkeypatch.setattr(covid_task, "read_keras", lambda path: {})
    monkeypatch.setattr(covid_task, "lower_layers", lambda images, *_, **__: images[:, 0, 0])
    data = CovidLt(dataset="xray64-10", test_per_class=5, validation=0.2).load(tmp_path)
    splits = [set(split.inputs.tolist()) for split in (data.train, data.validation, data.test)]
    assert all(splits)
    assert len(set.union(*splits)) == sum(map(len, splits))
