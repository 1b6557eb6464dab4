"""The page says what the results files hold: ratios beside aims, what is missed and why, what is missing."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks.__main__ import chosen, keep, keep_whole
from benchmarks.catalogue import BENCHMARKS, MEASURED
from benchmarks.page import write_page
from benchmarks.results import (
    DIRECTORY,
    BenchmarkResult,
    CommandResult,
    Device,
    FormResult,
    Point,
    Results,
    SeriesResult,
    WorkflowResult,
    read_results,
)
from benchmarks.short_falls import missed_aims
from stillhouse.runtime.errors import ConfigurationError

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def device(kind: str = "cpu") -> Device:
    name = "x86_64" if kind == "cpu" else "Fast GPU 3"
    return Device(
        kind=kind,  # type: ignore[arg-type]
        name=name,
        cores=2,
        precision="fp32",
        operations_per_second=1e12,
        bytes_per_second=1e9,
        versions={"torch": "2.13.0"},
    )


def results(kind: str = "cpu", naive_seconds: float = 12.0) -> Results:
    """A training step that takes two seconds of which its floor is one."""
    step = BenchmarkResult(
        measured=NOW,
        tokens=100,
        tolerance=1e-4,
        floor_operations=1e12,
        floor_bytes=1e3,
        forms=(
            FormResult(
                name="naive",
                role="naive",
                seconds=(naive_seconds,) * 3,
                operations=10_500_000_000_000,
                peak_memory_mib=30,
            ),
            FormResult(
                name="cached targets",
                role="ours",
                seconds=(2.0,) * 3,
                operations=1_500_000_000_000,
                peak_memory_mib=10,
                error=1e-6,
            ),
        ),
    )
    curves = {
        name: tuple(Point(value=v, seconds=(factor * v**2,), peak_memory_mib=v) for v in (16, 32, 64))
        for name, factor in (("naive", 5.0), ("cached targets", 1.0))
    }
    command = CommandResult(seconds=2.5, processor_seconds=2.0, peak_memory_mib=100, jobs=10)
    commands = ("dry run", "one figure", "no-op")
    sizes = tuple(
        {name: command.model_copy(update={"jobs": jobs, "processor_seconds": jobs}) for name in commands}
        for jobs in (10, 100, 10_000)
    )
    return Results(
        device=device(kind),
        took={"context_step": 540, "top_k": 60},
        benchmarks={"context_step": step},
        series={"top_k": SeriesResult(measured=NOW, curves=curves)},
        workflow=WorkflowResult(
            measured=NOW,
            start=command.model_copy(update={"seconds": 2.0}),
            default=dict.fromkeys(commands, command),
            sizes=sizes,
        ),
    )


def page(folder: Path, *found: Results) -> str:
    for one in found:
        one.write(folder / "results")
    write_page(folder / "results", folder / "README.md")
    return (folder / "README.md").read_text()


def test_a_ratio_stands_beside_its_aim_with_its_interval_and_floor(tmp_path: Path) -> None:
    text = page(tmp_path, results())
    assert "time at least 5 x" in text and "| 6.00 [6.00, 6.00] | 7.00 | 3.00 | 3 |" in text
    assert "The parts of `make benchmark` took 10.0 minutes (limit: 20, met), of which context_step 9.0." in text
    assert "| 1e-06 (at most 1e-04) |" in text and "| 50 |" in text  # one second of floor in two
    assert "every aim is met" in text and "milliseconds" not in text
    assert "no-op run under 3 s with the default configuration: met, 2.5 s" in text
    assert "take 2.0 s, 80% of the default no-op run" in text and "jobs^1.00 over 3 sizes" in text
    assert "10,000 jobs within 60 s: met, 2 s of 10,000 jobs" in text
    assert "whatever the other studies hold: met, 2.5 s at most, of 10 jobs" in text
    for name in ("cpu-ratios", "cpu-growth"):
        assert f"](results/{name}.png)" in text and (tmp_path / f"results/{name}.png").stat().st_size > 10_000


def test_a_missed_aim_is_named_with_its_cause(tmp_path: Path) -> None:
    text = page(tmp_path, results(naive_seconds=8.0))
    [cause] = [aim.cause for aim in BENCHMARKS["context_step"].aims if aim.quantity == "time"]
    assert f"against naive: time at least 5 x, measured 4.00. {cause}" in text


def test_a_missed_aim_of_the_workflow_is_named_with_the_share_of_its_floor(tmp_path: Path) -> None:
    found = results()
    assert found.workflow
    slow = {**found.workflow.default, "no-op": found.workflow.default["no-op"].model_copy(update={"seconds": 4.0})}
    text = page(tmp_path, found.model_copy(update={"workflow": found.workflow.model_copy(update={"default": slow})}))
    falls = text.partition("### What falls short")[2].partition("###")[0]
    assert "the workflow: a no-op run under 3 s with the default configuration, measured 4.0 s." in falls
    assert "is 2.0 s, 50% of it" in falls and "every aim is met" not in falls


def test_the_cause_of_a_miss_brings_its_measurements(tmp_path: Path) -> None:
    """A start of 4 s and 1 s for each further checkpoint, where the other form takes 1.5 s for each."""
    seconds = {"an engine start per checkpoint": 21.0, "transformers generate": 7.5, "one engine start": 9.0}
    roles = dict(zip(seconds, ("naive", "tool", "ours"), strict=True))
    forms = tuple(FormResult(name=n, role=roles[n], seconds=(seconds[n],) * 3) for n in seconds)  # type: ignore[arg-type]
    row = BenchmarkResult(measured=NOW, tokens=1, tolerance=1e-4, floor_operations=1, floor_bytes=1, forms=forms)
    curves = {
        name: tuple(Point(value=v, seconds=(start + own * v,)) for v in (1, 2, 4))
        for name, start, own in (("transformers generate", 0.0, 1.5), ("one engine start", 4.0, 1.0))
    }
    series = {"checkpoints": SeriesResult(measured=NOW, curves=curves)}
    text = page(tmp_path, results().model_copy(update={"benchmarks": {"evaluation": row}, "series": series}))
    [line] = [line for line in text.splitlines() if "against transformers generate: time" in line]
    assert "Of our time at 4 checkpoints, 50% does not grow with them." in line
    assert "Each further one costs the other form 1.5 x as much" in line
    assert "No memory of checkpoints: " in text


def test_what_is_left_without_the_cause_of_a_miss_is_said(tmp_path: Path) -> None:
    aim = next(aim for aim in BENCHMARKS["context_study"].aims if aim.without)
    seconds = {"naive": 12.0, "adapter off, teacher in each step": 9.0, str(aim.without): 2.0, "cached targets": 4.0}
    forms = tuple(
        FormResult(name=name, role="ours" if name == "cached targets" else "other", seconds=(taken,) * 3)
        for name, taken in seconds.items()
    )
    row = BenchmarkResult(measured=NOW, tokens=1, tolerance=1e-4, floor_operations=1, floor_bytes=1, forms=forms)
    text = page(tmp_path, results().model_copy(update={"benchmarks": {"context_study": row}}))
    assert f"measured 3.00. {aim.cause} Beside '{aim.without}' it takes 6.00 x." in text


@pytest.mark.parametrize(("minutes", "verdict"), [(17, "met"), (21, "missed")])
def test_the_whole_command_s_time_stands_beside_its_limit(tmp_path: Path, minutes: float, verdict: str) -> None:
    found = results()
    keep(tmp_path / "results", found.device, "benchmarks", "context_step", found.benchmarks["context_step"], took=540)
    keep(tmp_path / "results", found.device, "benchmarks", "compiled_lens", found.benchmarks["context_step"], took=900)
    keep_whole(tmp_path / "results", found.device, 60 * minutes)
    write_page(tmp_path / "results", tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text()
    assert f"`make benchmark` took {minutes}.0 minutes (limit: 20, {verdict}), of which context_step 9.0." in text


def test_an_aim_that_the_median_alone_meets_is_named_with_its_interval(tmp_path: Path) -> None:
    found = results()
    step = found.benchmarks["context_step"]
    forms = tuple(form.model_copy(update={"seconds": (8.0, 12.0, 12.0)}) for form in step.forms if form.role == "naive")
    step = step.model_copy(update={"forms": (*forms, step.ours)})
    text = page(tmp_path, found.model_copy(update={"benchmarks": {"context_step": step}}))
    assert "met by the median alone: the interval over 3 rounds begins at 4.00." in text


def test_every_published_miss_has_a_cause() -> None:
    for found in read_results(DIRECTORY):
        rows = [(MEASURED[name], result) for name, result in found.benchmarks.items()]
        for benchmark, aim, value in missed_aims(rows, found.device):
            assert aim.cause, f"{benchmark.name}, {aim.text} against {aim.against}: {value:.2f} on {found.device.slug}"


def test_absolute_times_are_shown_of_gpus_and_their_absence_is_said(tmp_path: Path) -> None:
    assert "figures of a GPU: none could be used" in page(tmp_path, results())
    text = page(tmp_path, results("gpu"))
    assert "## Fast GPU 3" in text and "| cached targets | 2000.0 | 50 | 75 | 10 |" in text
    assert "`python -m benchmarks`. A matrix product attains 1.0 TFLOP/s, a copy 1 GB/s." in text
    assert "figures of a GPU" not in text


def test_what_was_weighed_stands_beside_its_decision(tmp_path: Path) -> None:
    found = results()
    step = found.benchmarks["context_step"]
    forms = tuple(
        form.model_copy(update={"first_seconds": 24.0, "role": role})
        for form, role in zip(step.forms, ("other", "ours"), strict=True)
    )
    weighed = {"adamw_update": step.model_copy(update={"forms": forms})}
    text = page(tmp_path, found.model_copy(update={"benchmarks": weighed}))
    assert "| naive | cached targets | 6.00 [6.00, 6.00] | 3.00 | 2.0 | Taken, on processors too. |" in text
    assert "varlen (flash) attention, not measured: " in text


def test_what_was_not_measured_is_listed(tmp_path: Path) -> None:
    text = page(tmp_path, results().model_copy(update={"workflow": None}))
    [line] = [line for line in text.splitlines() if "not yet measured on cpu: " in line]
    named = line.partition(": ")[2].rstrip(".").split(", ")
    assert {"teacher_cache", "ms_swift", "growth of latents", "workflow"} <= set(named)
    assert not {"context_step", "growth of top_k"} & set(named)


def test_a_new_result_replaces_its_own_entry_alone(tmp_path: Path) -> None:
    before = results()
    before.write(tmp_path)
    keep(tmp_path, before.device, "benchmarks", "teacher_cache", before.benchmarks["context_step"], took=60)
    [after] = read_results(tmp_path)
    assert set(after.benchmarks) == {"context_step", "teacher_cache"}
    assert after.took == {**before.took, "teacher_cache": 60}
    assert after.model_copy(update={"benchmarks": before.benchmarks, "took": before.took}) == before


def test_a_name_that_there_is_not_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="there is no 'context_stop'; nearest: 'context_step'"):
        chosen(("context_stop",), tuple(BENCHMARKS))
    assert chosen((), ("a", "compiled_lens", "ms_swift", "b")) == ("a", "b")
    assert chosen(("compiled_lens",), ("a", "compiled_lens")) == ("compiled_lens",)


def test_the_page_of_the_repository_is_made_from_its_results(tmp_path: Path) -> None:
    shutil.copytree(DIRECTORY, tmp_path / "results")
    write_page(tmp_path / "results", tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == (DIRECTORY.parent / "README.md").read_text()
