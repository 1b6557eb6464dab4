"""Evaluations and training curves as a run would leave them, made from a known truth: what the reporting tests read."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from stillhouse.evaluation.results_files import write_results
from stillhouse.runtime.files import write_json, write_manifest
from stillhouse.studies.latentwire.config import ARMS, Arm, EvaluationSettings
from stillhouse.studies.latentwire.curves import DiagnosticsRow, ReaderDiagnostics, append_diagnostics
from stillhouse.studies.latentwire.results import (
    COMBINED,
    ITEM_COLUMNS,
    ChannelFacts,
    PairResults,
    ReaderFacts,
    Subject,
    measure,
    select_checkpoints,
)

READERS = ("smollm2_135m", "gemma3_270m")
SIZES = {"fp16": 1040, "int8": 560, "int6": 430, "int4": 300}
TEXT_BYTES = 700
SKILL: dict[str, float] = {
    "full_text": 0.62,
    "replay_raw": 0.62,
    "replay_anchor": 0.58,
    "replay_adapter": 0.55,
    "latent": 0.3,
    "no_context": 0.08,
}


def skill_at(arm: str, size: int) -> float:
    """How likely a text of `size` bytes still holds the answer."""
    kept = min(1.0, size * (1.7 if arm == "byte_budget_compressed" else 1.0) / TEXT_BYTES)
    return 0.08 + (SKILL["full_text"] - 0.08) * kept


def fake_evaluation(
    directory: Path,
    pair: str = "smollm2_gemma3",
    conditions: Sequence[str] = ("latent", "prefix_kd", "latent+length-16"),
    seeds: Sequence[int] = (42,),
    arms: Sequence[Arm] = ARMS,
    items: int = 40,
    latent_skill: float = 0.3,
) -> Path:
    """Write `results.json` and `items.parquet` of one pair; returns the path of the former."""
    settings = EvaluationSettings(condition=conditions[0], arms=tuple(arms))
    subjects = list(_subjects(conditions, seeds, arms))
    rows = pd.concat([_rows(pair, one, split, items, latent_skill) for one, split in subjects])
    measurements = measure(rows)
    results = PairResults(
        pair=pair,
        readers=tuple(
            ReaderFacts(name=name, note="dequantised from a packaged 4-bit file", text_prompt="content_only")
            for name in READERS
        ),
        dataset="squad_packaged",
        dataset_note="published validation items re-split by article title",
        squad_version="1.1",
        left_out={"validation": 1, "test": 3},
        evaluation=settings.model_dump(mode="json"),
        condition=conditions[0],
        wire=settings.wire.headline,
        channels=tuple(
            ChannelFacts(
                condition=condition,
                seed=seed,
                length=16 if "16" in condition else 8,
                dimension=64,
                encoder="bytes",
                trained_parameters=1_234_567,
                cut_texts=0,
            )
            for condition in conditions
            for seed in seeds
        ),
        selections=tuple(select_checkpoints(measurements, settings.selection)),
        measurements=tuple(measurements),
    )
    write_results(results, directory / "results.json", rows, ITEM_COLUMNS, directory / "items.parquet")
    return directory / "results.json"


def _subjects(conditions: Sequence[str], seeds: Sequence[int], arms: Sequence[Arm]) -> Iterable[tuple[Subject, str]]:
    sizes = sorted({size * factor for size in SIZES.values() for factor in (1, 2)})
    for reader in READERS:
        for condition in conditions:
            for seed in seeds:
                for step in (10, 20):
                    yield Subject("latent", reader, condition, seed, step, "int8"), "validation"
                for wire in SIZES if "latent" in arms else ():
                    yield Subject("latent", reader, condition, seed, 20, wire), "test"  # type: ignore[arg-type]
        for arm in arms:
            if arm == "replay_adapter":
                yield Subject(arm, reader, conditions[0], seeds[0], 20), "test"
            elif arm in ("full_text", "no_context", "replay_raw", "replay_anchor"):
                yield Subject(arm, reader), "test"
            elif arm.startswith("byte_budget"):
                yield from ((Subject(arm, reader, budget=size), "test") for size in sizes)
            elif arm.startswith("token_budget") and (arm != "token_budget_chat_full" or reader == READERS[0]):
                yield from ((Subject(arm, reader, budget=length), "test") for length in (8, 16))
    for kind in (kind for kind in COMBINED if kind in arms):
        if "full_text" in arms:
            yield Subject("full_text", kind), "test"
        for seed in seeds if "latent" in arms else ():
            yield Subject("latent", kind, conditions[0], seed, 20, "int8"), "test"


def _rows(pair: str, subject: Subject, split: str, items: int, latent_skill: float) -> pd.DataFrame:
    """One subject's rows; the same items are hard for every subject, so that pairs say more than means."""
    shared = np.random.default_rng(zlib.crc32(f"{pair} {split}".encode()))
    own = np.random.default_rng(zlib.crc32(f"{pair} {subject.key} {split}".encode()))
    tokens, luck = shared.integers(2, 8, items), shared.random(items)
    if subject.arm.startswith("byte_budget"):
        skill = skill_at(subject.arm, subject.budget)
    elif subject.arm.startswith("token_budget"):
        skill = 0.15
    else:
        skill = latent_skill if subject.arm == "latent" else SKILL[subject.arm]
        skill *= 0.7 if subject.wire == "int4" else 1.0
    skill *= 0.8 if subject.reader == READERS[1] else 1.0
    right = 0.8 * luck + 0.2 * own.random(items) < skill
    size = SIZES.get(subject.wire, TEXT_BYTES) * (2 if "16" in subject.condition else 1)
    frame = pd.DataFrame(
        {
            "pair": pair,
            "item_id": [f"{split}/{index}" for index in range(items)],
            "text_bytes": TEXT_BYTES,
            "output": ["yes" if one else "no" for one in right],
            "exact": right,
            "f1": np.where(right, 1.0, own.random(items) * 0.2),
        }
    ).assign(
        split=split,
        **dict(zip(("arm", "reader", "condition", "seed", "step", "wire", "budget"), subject.key, strict=True)),
    )
    if subject.reader in COMBINED:
        return frame
    if split == "validation":
        frame = frame.drop(columns=["output", "exact", "f1"])
    if not subject.arm.startswith(("replay", "token_budget")):
        frame["bytes"] = min(subject.budget, TEXT_BYTES) if subject.budget else size
    nll = (2.5 - 2 * skill + own.normal(0, 0.1, items)) * tokens - 0.1 * subject.step
    return frame.assign(
        gold_nll=nll,
        gold_tokens=tokens,
        first_token=own.integers(0, 3, items),
        first_token_rank=np.where(right, 1, own.integers(2, 40, items)),
        prompt_tokens=(16 if "16" in subject.condition else 8) if subject.wire else 150,
        text_tokens=150,
        seconds=0.05,
    )


def fake_channel(directory: Path, condition: str, seed: int = 42, steps: int = 20) -> Path:
    """Write the record and the training curves of one channel; returns its directory."""
    random = np.random.default_rng(zlib.crc32(f"{condition} {seed}".encode()))
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        row: dict[str, float] = {"step": step, "loss": 6 - step / 10}
        for place, reader in enumerate(READERS):
            row[f"ce/{reader}"] = 5 - place - 2 * (1 - math.exp(-3 * step / steps)) + random.normal(0, 0.2)
            row[f"first_token/{reader}"] = row[f"ce/{reader}"] + 1
            row[f"first_token_accuracy/{reader}"] = min(1.0, step / steps * 0.3)
        lines.append(json.dumps(row))
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for step in range(5, steps + 1, 5):
        append_diagnostics(directory / "diagnostics.jsonl", _diagnostics(step, steps))
    settings = {"names": list(READERS), "condition": condition, "seed": seed, "run": {}}
    write_json(directory / "run.json", {"module": "stillhouse.studies.latentwire.train", "settings": settings})
    write_manifest(directory)
    return directory


def _diagnostics(step: int, steps: int) -> DiagnosticsRow:
    progress = step / steps
    explained = tuple(round(1 - 0.7 * math.exp(-k / 4), 4) for k in range(16))
    reader = ReaderDiagnostics(
        prefix_rms=0.05 + 0.01 * progress,
        embedding_rms=0.05,
        first_token_share=1 - 0.5 * progress,
        distinct_first_tokens=1 + round(8 * progress),
        between_share=0.6 * progress,
        prefix_explained=explained,
        embedding_explained=tuple(share / 2 for share in explained),
        inside_share=0.2 + 0.1 * progress,
    )
    return DiagnosticsRow(
        step=step,
        texts=16,
        latent_mean=0.0,
        latent_std=1.0,
        latent_rms=1.0,
        latent_abs_max=3.0,
        latent_between_share=0.5 * progress,
        latent_explained=tuple(share**2 for share in explained),
        readers=dict.fromkeys(READERS, reader),
    )
