"""Evaluations and training curves of lenses as a run would leave them, made from a known truth: for reporting tests."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from stillhouse.evaluation.results_files import typed, write_results
from stillhouse.runtime.files import write_json, write_manifest
from stillhouse.studies.consistency_lens.config import EvaluationSettings
from stillhouse.studies.consistency_lens.results import (
    BEST_OF,
    ITEM_COLUMNS,
    LensFacts,
    ModelResults,
    measure,
    select_checkpoints,
)

# Mean KL in nats and squared error over squared distance from the mean, by variant.
TRUTH: dict[str, tuple[float, float]] = {
    "lens": (0.9, 0.5),
    "mean": (2.0, 1.0),
    "zero": (3.0, 2.5),
    "original_tokens": (1.3, 0.8),
    "shuffled": (1.2, 0.75),
    "other_explanation": (1.9, 1.2),
    "hard_coded": (2.0, 1.1),
    "text_continuation": (1.7, 0.9),
    "text_regression": (0.6, 0.4),
    "untrained": (4.0, 30.0),
}
SAMPLED = {1: (1.0, 0.55), 2: (0.9, 0.5), 4: (0.8, 0.45)}
CONSTANT = ("mean", "zero", "text_regression")


def fake_evaluation(
    directory: Path,
    model: str = "smollm2_135m",
    layers: Mapping[str, int] | None = None,
    seeds: Sequence[int] = (42,),
    items: int = 40,
    truth: Mapping[str, tuple[float, float]] = TRUTH,
    collapsed: bool = False,
    best_of: Sequence[int] = tuple(SAMPLED),
    language_model_positions: str = "aligned",
    split: str = "test",
) -> Path:
    """Write `results.json` and `items.parquet` of one model; returns the path of the former."""
    layers = layers or {"lens": 6}
    settings = EvaluationSettings.model_validate({"best_of": tuple(best_of), "split": split})
    sampled = {f"{BEST_OF}{k}": SAMPLED[k] for k in best_of}
    frames = []
    for condition in layers:
        for seed in seeds:
            for step, worse in ((10, 0.4), (20, 0.0)):
                plain = {name: truth[name] for name in ("lens", "mean", "zero")}
                frames.append(_rows(condition, seed, step, "validation", 12, plain, worse, collapsed))
            frames.append(_rows(condition, seed, 20, split, items, {**truth, **sampled}, 0.0, collapsed))
    rows = pd.concat(frames, ignore_index=True).assign(model=model)
    rows = rows.drop_duplicates(["condition", "seed", "step", "split", "variant", "item_id"], keep="last")
    measurements = measure(rows)
    results = ModelResults(
        model=model,
        model_note="dequantised from a packaged 4-bit file",
        dataset="lambada_packaged",
        dataset_note="narrative passages, re-split by seed",
        evaluation=settings.model_dump(mode="json"),
        lenses=tuple(
            LensFacts(
                condition=condition,
                layer=layer,
                text_length=8,
                train_examples=256,
                activations=f"layer_{layer}-random-0",
                language_model_positions=language_model_positions,
            )
            for condition, layer in layers.items()
        ),
        selections=tuple(select_checkpoints(measurements, settings.selection)),
        measurements=tuple(measurements),
    )
    write_results(results, directory / "results.json", rows, ITEM_COLUMNS, directory / "items.parquet")
    return directory / "results.json"


def _rows(
    condition: str,
    seed: int,
    step: int,
    split: str,
    count: int,
    variants: Mapping[str, tuple[float, float]],
    worse: float,
    collapsed: bool,
) -> pd.DataFrame:
    """Rows of one checkpoint: the same documents are hard for every variant, so that pairs say more than means."""
    documents = np.random.default_rng(zlib.crc32(split.encode()))
    difficulty, deviation = documents.gamma(4.0, 0.25, count), documents.gamma(9.0, 0.1, count)
    frames = []
    for variant, (kl, error) in variants.items():
        # The baselines do not depend on the seed: they come from the documents alone.
        source = (variant, split) if variant in CONSTANT else (condition, seed, step, variant, split)
        own = np.random.default_rng(zlib.crc32(repr(source).encode()))
        extra = worse if variant == "lens" else 0.0
        texts = own.integers(0, 500, (count, 8))
        if collapsed:
            texts[:] = 7
        has_text = variant not in CONSTANT
        frames.append(
            typed(
                pd.DataFrame(
                    {
                        "condition": condition,
                        "seed": seed,
                        "step": step,
                        "split": split,
                        "variant": variant,
                        "item_id": [f"{split}-{index}" for index in range(count)],
                        "kl": difficulty * (kl + extra) * own.normal(1, 0.1, count).clip(0.5),
                        "squared_error": deviation * error * own.normal(1, 0.1, count).clip(0.5),
                        "squared_deviation": deviation,
                        "top1": own.random(count) < math.exp(-kl),
                        "text": [f"text {own.integers(999)}" if has_text else None for _ in range(count)],
                        "text_nll": own.gamma(20, 1.0, count) if has_text else None,
                        "text_tokens": 7 if has_text else None,
                        "token_ids": [list(map(int, text)) if has_text else None for text in texts],
                    }
                ),
                ITEM_COLUMNS,
            )
        )
    return pd.concat(frames, ignore_index=True)


def fake_lens(
    directory: Path, condition: str = "lens", seed: int = 42, model: str = "smollm2_135m", steps: int = 40
) -> Path:
    """Write the run record and training curve of one lens; returns its directory."""
    random = np.random.default_rng(zlib.crc32(f"{condition} {seed}".encode()))
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        fall = math.exp(-3 * step / steps)
        terms = {
            "reconstruction_kl": 1.0 + 3 * fall,
            "resample_kl": 1.5 + 3 * fall,
            "language_model": 4.0 - fall,
            "entropy": 2.0 + fall,
            "mse": 0.02 + 5 * fall**3,
        }
        row = {"step": step, **{name: value * random.normal(1, 0.05) for name, value in terms.items()}}
        row |= {"loss": row["reconstruction_kl"] + row["resample_kl"], "temperature": 0.1 + 0.9 * fall}
        row |= {"alpha": min(0.1, 0.01 * step), "noise": 1.0, "learning_rate": 1e-3, "units": 16}
        for part in ("decoder.projection", "decoder.prompt", "encoder.projection"):
            row[f"learning_rate/{part}"] = 1e-3 * min(1, step / 10)
        row["learning_rate/decoder.base"] = 1e-4 * max(0.0, (step - 20) / 20)
        if step % 20 == 0:
            row |= {f"validation/{name}": value for name, value in {**terms, "loss": 2.5 + fall}.items()}
        lines.append(json.dumps(row))
    (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {"condition": condition, "seed": seed, "model": f"resources/models/{model}", "run": {}}
    write_json(directory / "run.json", {"module": "stillhouse.studies.consistency_lens.train", "settings": settings})
    write_manifest(directory)
    return directory
