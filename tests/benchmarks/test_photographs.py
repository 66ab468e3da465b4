"""Decoding is measured on no more cores than are said, and what accelerators need follows by arithmetic."""

import os

import pytest

from benchmarks import photographs
from benchmarks.harness.records import RESULTS, read
from examples import style

on_linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are chosen on Linux alone")


@on_linux
def test_a_core_decodes_photographs(tmp_path):
    allowed = os.sched_getaffinity(0)
    records = photographs.measure(photographs.Options(batch_size=4, batches=2, rounds=2))
    assert [record["cores"] for record in records] == sorted({1, len(allowed)})
    assert all(len(record["all"]) == 2 and record["images_per_second"] > 1 for record in records)
    assert records[0]["parameters"] == 25_557_032  # torchvision's resnet50
    assert os.sched_getaffinity(0) == allowed
    assert "| 8 A100 | 28,096 |" in photographs.markdown(records)
    style.save(photographs.figure(records), tmp_path / "photographs.png")
    assert (tmp_path / "photographs.png").stat().st_size > 5000


@on_linux
def test_cores_are_given_back_after_an_error():
    allowed = os.sched_getaffinity(0)

    def fail():
        with photographs.on({min(allowed)}):
            assert os.sched_getaffinity(0) == {min(allowed)}
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert os.sched_getaffinity(0) == allowed


def test_arithmetic():
    assert photographs.cores_for({"cores": 2, "images_per_second": 200.0}, 28_000.0) == 280.0


def test_the_published_table_is_that_of_the_records():
    found = read("photographs", RESULTS)
    cores = [f"| {r['cores']} | {r['images_per_second']:.0f} |" for r in found]
    assert all(line in (RESULTS.parent / "README.md").read_text() for line in cores)
