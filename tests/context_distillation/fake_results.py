"""Evaluations and training curves as a run would leave them, made from a known truth: what the reporting tests read."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from stillhouse.config.evaluation import EngineSettings
from stillhouse.evaluation.results_files import write_results
from stillhouse.runtime.files import write_json, write_manifest
from stillhouse.studies.context_distillation.config import BASE_CONDITIONS, CONDITIONS, EvaluationSettings
from stillhouse.studies.context_distillation.results import (
    ITEM_COLUMNS,
    ModelResults,
    measure,
    select_checkpoints,
)

ALL_CONDITIONS = (*BASE_CONDITIONS, *CONDITIONS)


@dataclass(frozen=True)
class Effect:
    """Where a condition ends: change of gold NLL per token against the base, and its two rates."""

    nll: float
    marker: float
    strict: float


EFFECTS: dict[str, Effect] = {
    "base_zero_shot": Effect(0.0, 0.06, 0.01),
    "base_few_shot": Effect(-0.07, 0.96, 0.04),
    "baseline": Effect(-0.20, 0.70, 0.03),
    "online_v1": Effect(-0.24, 0.85, 0.05),
    "shuffled_answers": Effect(-0.21, 0.72, 0.03),
    "kl_t1": Effect(-0.23, 0.80, 0.04),
}


def fake_evaluation(
    directory: Path,
    model: str = "smollm2_135m",
    conditions: Sequence[str] = tuple(EFFECTS),
    seeds: Sequence[int] = (42,),
    steps: Sequence[int] = (8, 16),
    test_items: int = 40,
    generated: int = 24,
    effects: Mapping[str, Effect] = EFFECTS,
    settings: EvaluationSettings | None = None,
    repeated_mistakes: Mapping[str, tuple[str, ...]] | None = None,
    skipped: Mapping[str, int] | None = None,
) -> Path:
    """Write `results.json` and `items.parquet` of one model; returns the path of the former."""
    settings = settings or EvaluationSettings(engine=EngineSettings(kind="transformers"))
    subjects = [
        (condition, seed, step, shots)
        for condition in conditions
        for seed, step, shots in _subjects(condition, seeds, steps, settings.few_shot_counts)
    ]
    rows = [
        row
        for split, size in (("validation", 20), ("test", test_items))
        for subject in subjects
        for row in _rows(model, *subject, split, size, generated if split == "test" else 0, max(steps), effects)
    ]
    items = pd.DataFrame(rows)
    measurements = measure(items)
    results = ModelResults(
        model=model,
        model_note="dequantised from a packaged 4-bit file",
        dataset="gsm8k_packaged",
        dataset_note="the published test items, re-split by seed: not comparable with published numbers",
        engine="TransformersEngine",
        evaluation=settings.model_dump(mode="json"),
        repeated_mistakes=dict(repeated_mistakes or {}),
        skipped=dict(skipped or {}),
        conditions=tuple(conditions),
        selections=tuple(select_checkpoints(measurements, settings.selection)),
        measurements=tuple(measurements),
    )
    directory.mkdir(parents=True, exist_ok=True)
    write_results(results, directory / "results.json", items, ITEM_COLUMNS, directory / "items.parquet")
    return directory / "results.json"


def _subjects(
    condition: str, seeds: Sequence[int], steps: Sequence[int], shot_counts: Sequence[int]
) -> list[tuple[int, int, int]]:
    if condition == "base_zero_shot":
        return [(0, 0, 0)]
    if condition == "base_few_shot":
        return [(0, 0, shots) for shots in shot_counts]
    return [(seed, step, 0) for seed in seeds for step in steps]


def _rows(
    model: str,
    condition: str,
    seed: int,
    step: int,
    shots: int,
    split: str,
    size: int,
    generated: int,
    last_step: int,
    effects: Mapping[str, Effect],
) -> list[dict[str, object]]:
    """One subject's rows; the same items are hard for every subject, so that pairs say more than means."""
    items = np.random.default_rng(zlib.crc32(f"{model} {split}".encode()))
    own = np.random.default_rng(zlib.crc32(f"{model} {condition} {seed} {step} {shots} {split}".encode()))
    difficulty, tokens, luck = items.normal(1.25, 0.2, size), items.integers(60, 180, size), items.random(size)
    base, end = effects["base_zero_shot"], effects.get(condition, effects["baseline"])
    share = 1 - math.exp(-3 * step / last_step) if step else 1.0
    nll = difficulty + share * end.nll + own.normal(0, 0.03, size) + own.normal(0, 0.004)
    luck = 0.8 * luck + 0.2 * own.random(size)
    rows: list[dict[str, object]] = []
    for index in range(size):
        row: dict[str, object] = {
            "model": model,
            "condition": condition,
            "seed": seed,
            "step": step,
            "shots": shots,
            "split": split,
            "item_id": f"{split}/{index}",
            "gold_nll": float(nll[index] * tokens[index]),
            "gold_tokens": int(tokens[index]),
        }
        wrote = bool(luck[index] < base.marker + share * (end.marker - base.marker))
        correct = bool(wrote and own.random() < end.strict / max(end.marker, 1e-9))
        answer: dict[str, object] = {
            "output": "... #### 7" if wrote else "...",
            "output_tokens": int(own.integers(40, 190)),
            "finished": wrote,
            "strict_correct": correct,
            "flexible_correct": correct or bool(own.random() < 0.03),
            "wrote_marker": wrote,
        }
        rows.append(row | (answer if index < generated else dict.fromkeys(answer)))
    return rows


def fake_student(directory: Path, condition: str, seed: int = 42, model: str = "smollm2_135m", steps: int = 16) -> Path:
    """Write the run record and training curve of one student; returns its directory."""
    random = np.random.default_rng(zlib.crc32(f"{condition} {seed}".encode()))
    gain = EFFECTS.get(condition, EFFECTS["baseline"]).nll
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        cross_entropy = 1.25 + gain * (1 - math.exp(-3 * step / steps)) + random.normal(0, 0.04)
        row = {"step": step, "loss": cross_entropy + 0.3, "ce": cross_entropy, "gradient_norm": 1.0}
        lines.append(json.dumps(row))
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {"condition": condition, "seed": seed, "model": f"resources/models/{model}", "run": {}}
    write_json(
        directory / "run.json", {"module": "stillhouse.studies.context_distillation.train", "settings": settings}
    )
    write_manifest(directory)
    return directory
