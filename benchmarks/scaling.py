"""How cost grows: the forms of a benchmark at rising values of one of the scale's sizes, time and peak memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.catalogue import BENCHMARKS
from benchmarks.instruments import by_turns, peak_memory_mib
from benchmarks.results import Point, SeriesResult
from benchmarks.scale import Scale


@dataclass(frozen=True)
class Series:
    """A plot. size: the field of the scale that grows; label: what it is called, with its unit.

    forms: names of the benchmark's forms that are drawn, ours among them. batch: examples in a step, None: the scale's.
    """

    name: str
    benchmark: str
    size: str
    label: str
    values: tuple[int, ...]
    forms: tuple[str, ...]
    batch: int | None = None


SERIES: dict[str, Series] = {
    series.name: series
    for series in (
        Series(
            "sequence_length", "context_step", "answer", "answer length (words)", (16, 32, 64),
            ("naive", "cached targets"), batch=2,
        ),
        Series("top_k", "context_step", "top_k", "K", (16, 256, 4096), ("naive", "cached targets"), batch=2),
        Series(
            "vocabulary", "context_step", "vocabulary", "vocabulary", (2048, 8192, 32768),
            ("naive", "cached targets"), batch=2,
        ),
        Series(
            "cached_examples", "teacher_cache", "examples", "examples in the cache", (4, 8, 16),
            ("padded batches", "shots read once"),
        ),
        Series(
            "documents", "activation_extraction", "documents", "documents", (8, 16, 32, 64),
            ("padded batches", "extraction"),
        ),
        Series(
            "text_length", "lens_decoder_32", "text_length", "tokens of the explanation, T", (4, 8, 16),
            ("no cache", "differentiable cache"),
        ),
        Series(
            "latents", "latentwire_step", "latents", "latents, M", (4, 16, 64, 256),
            ("teacher in the step", "cached teacher"),
        ),
        Series("adapters", "delta_gradients", "adapters", "adapters, A", (1, 2, 4, 8), ("one by one", "together")),
        Series(
            "checkpoints", "evaluation", "checkpoints", "checkpoints", (1, 2, 4),
            ("transformers generate", "one engine start"),
        ),
    )
}  # fmt: skip


def measure_series(series: Series, scale: Scale, folder: Path) -> SeriesResult:
    """Time every value's forms once, in turn, then measure their memory, each form in a process of its own."""
    benchmark = BENCHMARKS[series.benchmark]
    forms = [form for form in benchmark.forms if form.name in series.forms]
    sizes: list[dict[str, Any]] = [
        {"batch": series.batch or scale.batch, series.size: value} for value in series.values
    ]
    scales = [replace(benchmark.change(scale), **own) for own in sizes]
    seconds: dict[str, list[tuple[float, ...]]] = {form.name: [] for form in forms}
    for sized in scales:
        works = {form.name: form.prepare(folder, sized) for form in forms}
        if sized is scales[0]:
            for work in works.values():
                work()
        for name, times in by_turns(works, rounds=1).items():
            seconds[name].append(times)
    works.clear()
    memory = peak_memory_mib({form.name: form.prepare for form in forms if form.counted}, folder, scales)
    return SeriesResult(
        measured=datetime.now(UTC).replace(microsecond=0),
        curves={
            name: tuple(
                Point(value=value, seconds=own, peak_memory_mib=peak)
                for value, own, peak in zip(series.values, times, memory.get(name, [None] * len(times)), strict=True)
            )
            for name, times in seconds.items()
        },
    )
