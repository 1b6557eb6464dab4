"""The results page: sections joined, every stage's time and cost, and nothing that changes between two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillhouse.reporting import results_page
from stillhouse.runtime.commands import parse_settings
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import write_sealed_json

TRAIN = "stillhouse.studies.context_distillation.train"
PROCESSOR = "Some Processor (2 cores)"


def record(path: Path, **changes: Any) -> Path:
    """Write a run record; returns its path."""
    facts: dict[str, Any] = {
        "module": TRAIN,
        "seconds": 90.0,
        "devices": [PROCESSOR],
        "peak_memory_mib": {"host": 2048.0},
        "packages": {"torch": "2.13.0"},
        "python": "3.11.9",
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "host": "node",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_sealed_json(path, facts | changes)
    return path


def make(
    directory: Path, *records: Path, sections: tuple[str, ...] = ("## First study\n\ntext\n",), **more: Any
) -> str:
    """Run the step as the workflow does; returns the page."""
    paths = [directory / f"section_{index}.md" for index in range(len(sections))]
    for path, text in zip(paths, sections, strict=True):
        path.write_text(text, encoding="utf-8")
    lists = {"sections": paths, "records": records}
    arguments = [f"{name}=[{','.join(map(str, values))}]" for name, values in lists.items()]
    arguments += [f"{name}={value}" for name, value in more.items()]
    step = parse_settings(results_page.ResultsPageStep, [*arguments, f"output={directory / 'results.md'}"])
    results_page.main(step)
    return (directory / "results.md").read_text(encoding="utf-8")


def cells(page: str, stage: str) -> list[str]:
    (row,) = [line for line in page.splitlines() if line.startswith(f"| {stage} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_sections_are_joined_in_order_and_listed(tmp_path: Path) -> None:
    sections = ("## Context distillation\n\none\n\n### Detail\n", "## LoRA generation (DnD)\n\ntwo\n")
    page = make(tmp_path, record(tmp_path / "run.json"), sections=sections)
    assert page.index("one") < page.index("two")
    assert "- [Context distillation](#context-distillation)" in page
    assert "- [LoRA generation (DnD)](#lora-generation-dnd)" in page
    assert "- [Hardware, time and cost](#hardware-time-and-cost)" in page
    assert "[Detail]" not in page


def test_time_and_memory_are_summed_by_stage(tmp_path: Path) -> None:
    page = make(
        tmp_path,
        record(tmp_path / "a" / "run.json").parent,
        record(tmp_path / "b" / "run.json", seconds=30.0, peak_memory_mib={"host": 4096.0}),
        record(tmp_path / "c.json", module="stillhouse.assets.materialise", seconds=60.0),
    )
    assert cells(page, "context_distillation / train")[1:] == ["2", "2.0", "0.00", "4.0", "\N{EN DASH}"]
    assert cells(page, "assets / materialise")[1:3] == ["1", "1.0"]
    assert cells(page, "all")[1:3] == ["3", "3.0"]
    assert "cost, " not in page


def test_gpu_hours_count_devices_and_cost_follows_the_price(tmp_path: Path) -> None:
    gpus = record(
        tmp_path / "run.json",
        seconds=1800.0,
        devices=["NVIDIA H200"] * 4,
        peak_memory_mib={"host": 1024.0, "gpu0": 10240.0, "gpu1": 20480.0},
    )
    page = make(tmp_path, gpus, gpu_hour_price=3.5, currency="EUR")
    assert "cost, EUR" in page
    assert cells(page, "all")[1:] == ["1", "30.0", "2.00", "1.0", "20.0", "7.00"]
    assert "Hardware: NVIDIA H200\n" in page
    assert "energy" not in page


def test_energy_is_summed_where_devices_count_it(tmp_path: Path) -> None:
    usage = {"devices": [{"energy_joules": 1.8e6}, {"energy_joules": None}, {"energy_joules": 3.6e6}]}
    page = make(tmp_path, record(tmp_path / "a.json", device_usage=usage), record(tmp_path / "b.json", module="other"))
    assert "GPU energy, kWh" in page
    assert cells(page, "all")[-1] == "1.500"
    assert cells(page, "other")[-1] == "\N{EN DASH}"


def test_the_code_state_is_named(tmp_path: Path) -> None:
    clean = record(tmp_path / "a.json")
    dirty = record(tmp_path / "b.json", git={"commit": "fedcba9876543210", "dirty": True})
    outside = record(tmp_path / "c.json", git=None)
    page = make(tmp_path, clean, dirty, outside)
    assert "commit 0123456789ab, commit fedcba987654 with uncommitted changes, no git checkout" in page
    assert "Python 3.11.9, torch 2.13.0" in page


def test_the_number_format_that_the_device_chose_is_named(tmp_path: Path) -> None:
    runs = [record(tmp_path / f"{name}.json", training={"precision": name, "steps": 4}) for name in ("bf16", "fp32")]
    assert "- Trainings computed in bf16, fp32\n" in make(tmp_path, *runs)
    assert "Trainings computed" not in make(tmp_path, record(tmp_path / "none.json", module="assets.materialise"))


def test_the_page_depends_on_its_inputs_alone(tmp_path: Path) -> None:
    records = [record(tmp_path / f"{name}.json", seconds=seconds) for name, seconds in (("a", 1.25), ("b", 2.5))]
    assert make(tmp_path, *records) == make(tmp_path, *reversed(records), records[0])


def test_a_record_that_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    with pytest.raises(UserError, match=r"student/run\.json: does not exist"):
        make(tmp_path, tmp_path / "student")
    write_sealed_json(tmp_path / "odd.json", {"module": TRAIN})
    with pytest.raises(UserError, match=r"odd\.json: is no run record \('seconds': Field required\)"):
        make(tmp_path, tmp_path / "odd.json")


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.md: cannot be read"):
        results_page.read_section(tmp_path / "gone.md")
