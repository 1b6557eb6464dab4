"""Files that are damaged, and disks that are full, where a cache, a figure or the results page is made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stillhouse.models.target_cache import compute_shards
from stillhouse.reporting.curves import read_curves
from stillhouse.reporting.results_page import ResultsPageStep
from stillhouse.reporting.results_page import main as make_results_page
from stillhouse.reporting.style import figure, save_figure
from stillhouse.runtime.errors import UserError
from stillhouse.studies.context_distillation.results import load_evaluation
from tests.context_distillation.fake_results import fake_evaluation, fake_student
from tests.context_distillation.test_target_cache import PLAN, top_k
from tests.reporting.test_results_page import record


def fill(disk: Path, free: int) -> Path:
    """Take the disk's space but for so many bytes; returns the file that takes it."""
    filler = disk / "filler"
    status = os.statvfs(disk)
    filler.write_bytes(b"\0" * (status.f_bavail * status.f_bsize - free))
    return filler


@pytest.mark.fault("disk full while a shard is written (a real, small disk)", "finished ones kept; the rest made later")
def test_a_cache_on_a_full_disk_keeps_its_finished_shards(small_disk: Path) -> None:
    work, computed = small_disk / "work", []

    def filling_up(ids):
        computed.append(tuple(ids))
        if len(computed) == 2:
            fill(small_disk, 0)
        return top_k(ids)

    with pytest.raises(UserError, match=r"shard-00001\.safetensors: the disk is full .*: free some space"):
        compute_shards(work, PLAN, filling_up)
    assert [path.name for path in work.iterdir()] == ["shard-00000.safetensors"]
    (small_disk / "filler").unlink()
    shards = compute_shards(work, PLAN, filling_up)
    assert computed == [("a", "b"), ("c",), ("c",), ("d", "e")]
    undisturbed = compute_shards(small_disk / "undisturbed", PLAN, top_k)
    assert [path.read_bytes() for path in shards] == [path.read_bytes() for path in undisturbed]


@pytest.mark.fault("disk full while a figure is written (a real, small disk)", "no half figure; drawn later")
def test_a_figure_on_a_full_disk_is_whole_or_absent(small_disk: Path) -> None:
    filler = fill(small_disk, 0)
    with figure(3, 2) as drawing:
        drawing.text(0.5, 0.5, "drawn")
        with pytest.raises(UserError, match=r"figure\.png: the disk is full"):
            save_figure(drawing, small_disk / "figure.png")
        assert [path.name for path in small_disk.iterdir()] == ["filler"]
        filler.unlink()
        save_figure(drawing, small_disk / "figure.png")
    assert sorted(path.name for path in small_disk.iterdir()) == ["figure.png", "figure.svg"]


@pytest.mark.fault("truncated or damaged run record", "refused; the line names the file and what to do")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "is not valid JSON"),
        (lambda data: data.replace(b'"seconds": 90', b'"seconds": 91'), "is corrupt"),
        (lambda data: b"\xff" + data[1:], "is not valid JSON"),
    ],
)
def test_a_damaged_run_record_is_named(tmp_path: Path, damage, message: str) -> None:
    path = record(tmp_path / "job" / "run.json")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"job/run\.json.*{message}"):
        make_results_page(ResultsPageStep(records=(path,), output=tmp_path / "results.md"))
    assert not (tmp_path / "results.md").exists()


@pytest.mark.fault("bit flip in results.json or items.parquet", "refused; the line names the file and what to delete")
@pytest.mark.parametrize("name", ["results.json", "items.parquet"])
def test_a_result_in_which_a_bit_has_flipped_is_named(tmp_path: Path, name: str) -> None:
    results = fake_evaluation(tmp_path)
    load_evaluation(results)
    flip_a_digit(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: is corrupt.*: delete .* and run"):
        load_evaluation(results)


@pytest.mark.fault("bit flip in a training curve", "refused; the line names the file and what to delete")
def test_a_curve_in_which_a_bit_has_flipped_is_named(tmp_path: Path) -> None:
    student = fake_student(tmp_path / "student", "baseline")
    read_curves([student])
    flip_a_digit(student / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: is corrupt .*: delete .*student and run"):
        read_curves([student])


def flip_a_digit(path: Path) -> None:
    """Flip the lowest bit of the last decimal digit: the file stays as long and as well-formed as it was."""
    data = bytearray(path.read_bytes())
    place = max(place for place, byte in enumerate(data) if chr(byte).isdecimal())
    data[place] ^= 1
    path.write_bytes(data)
