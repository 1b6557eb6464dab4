"""Made-up evaluations in the files that evaluation leaves, for tests of figures, tables and comparisons."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stillhouse.evaluation.results_files import write_results
from stillhouse.runtime.files import write_json, write_manifest
from stillhouse.studies.quantized_distillation.evaluation_settings import EvaluationSettings, reasons_not_run
from stillhouse.studies.quantized_distillation.results import ITEM_COLUMNS, QuantizedResults, SystemFacts, measure

# How far each condition is from the teacher: 0 as good, 1 as bad as rounding to nearest.
DISTANCES = {"teacher": 0.0, "ptq": 1.0, "gptq": 0.7, "off_policy": 0.5, "on_policy": 0.4}
UNTRAINED = ("teacher", "ptq", "gptq")
SEEDS = (42, 123, 456)
ITEMS = {"wikipedia": 24, "answers": 20, "arc_easy": 120, "winogrande": 90}


def system_facts(condition: str, seed: int, **changed: Any) -> SystemFacts:
    """A system; students have all that training would say of them."""
    facts: dict[str, Any] = {"condition": condition, "seed": seed, "weight_format": "int4-g64", "weight_bytes": 85_000}
    if condition == "teacher":
        facts |= {"weight_format": None, "weight_bytes": 270_000}
    elif condition not in UNTRAINED:
        facts |= {
            "placement": "merged",
            "learning_rate": 1e-4,
            "beta": 0.5,
            "on_policy_share": float(condition.startswith("on")),
            "lora_rank": 8,
            "checkpoint_step": 20,
            "selection": "validation_kl",
            "validation_kl": 0.1 * DISTANCES.get(condition, 0.5),
            "largest_logit_difference": 1e-6,
        }
    return SystemFacts(**{**facts, **changed})


def system_rows(condition: str, seed: int, variant: str, distance: float, tasks: bool) -> pd.DataFrame:
    """The rows of one system on all sets; the same items are hard for all."""
    frames = []
    for name, items in ITEMS.items():
        shared, own = np.random.default_rng(items), np.random.default_rng([seed, len(condition)])
        base = {"condition": condition, "seed": seed, "variant": variant, "name": name}
        ids = [f"{name}-{number}" for number in range(items)]
        if name in ("arc_easy", "winogrande"):
            right = (shared.random(items) + 0.25 * distance < 0.6).astype(float)
            norm = right if name == "arc_easy" else np.nan
            rows = {"kind": "task", "tokens": 1.0, "acc": right, "acc_norm": norm}
        else:
            tokens = np.full(items, 128.0)
            noise = own.normal(0, 0.2, items)
            rows = {
                "kind": "answers" if name == "answers" else "text",
                "tokens": tokens,
                "nll": shared.normal(400, 40, items) + 51 * distance * (1 + noise),
                "kl": 45 * distance * (1 + noise),
                "agrees": 128 - 40 * distance * (1 + noise),
            }
        if tasks or rows["kind"] == "text":
            frames.append(pd.DataFrame({**base, "item_id": ids, **rows}))
    return pd.concat(frames, ignore_index=True)


def write_evaluation(
    folder: Path,
    model: str = "tiny",
    distances: Mapping[str, float] = DISTANCES,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    seeds: Sequence[int] = SEEDS,
) -> Path:
    """An evaluation of these conditions as files; returns the path of its results.json."""
    systems, frames = [], []
    for condition, distance in distances.items():
        for seed in (0,) if condition in UNTRAINED else seeds:
            system = system_facts(condition, seed, **(facts or {}).get(condition, {}))
            systems.append(system)
            frames.append(system_rows(condition, seed, "deployed", distance, tasks=True))
            if system.trained:
                frames.append(system_rows(condition, seed, "merged", distance, tasks=False))
                frames.append(system_rows(condition, seed, "beside", 0.8 * distance, tasks=False))
    items = pd.concat(frames, ignore_index=True)
    results = QuantizedResults(
        model=model,
        model_note="a model, dequantised from a file",
        dataset="instructions",
        dataset_note="",
        set_notes={"wikipedia": "not WikiText"},
        conditions=tuple(distances),
        task_versions={"arc_easy": "1.0", "winogrande": "1.0"},
        evaluation=EvaluationSettings().model_dump(mode="json"),
        not_run=reasons_not_run(tuple(distances)),
        systems=tuple(systems),
        measurements=tuple(measure(items)),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_results(results, folder / "results.json", items, ITEM_COLUMNS, folder / "items.parquet")
    return folder / "results.json"


def swept(folder: Path) -> Path:
    """With one seed: two policies at three learning rates, ranks and formats, and a full grid of beta and lambda."""
    distances, facts = {"teacher": 0.0, "ptq": 1.0}, {}
    for share in (0.0, 1.0):
        for rate, distance in ((1e-5, 0.8), (1e-4, 0.5), (1e-3, 0.9)):
            name = f"policy{share:g}+learning_rate-{rate:g}"
            distances[name] = distance - 0.05 * share
            facts[name] = {
                "learning_rate": rate,
                "on_policy_share": share,
                "validation_kl": 0.1 * distances[name],
            }
        for axis, points in (("lora_rank", {4: 0.7, 16: 0.42}), ("weight_format", {"nf4": 0.3, "fp4": 0.6})):
            for value, distance in points.items():
                name = f"policy{share:g}+{axis}-{value}"
                distances[name] = distance + 0.05 * share
                facts[name] = {axis: value, "on_policy_share": share, "validation_kl": 0.1 * distances[name]}
    for beta in (0.0, 0.5, 1.0):
        for share in (0.0, 0.5, 1.0):
            name = f"grid+beta-{beta:g}+on_policy_share-{share:g}"
            distances[name] = 0.4 + 0.1 * beta + 0.1 * abs(share - 0.5)
            facts[name] = {
                "beta": beta,
                "on_policy_share": share,
                "learning_rate": 2e-4,
                "validation_kl": 0.1 * distances[name],
            }
    return write_evaluation(folder, distances=distances, facts=facts, seeds=SEEDS[:1])


def write_student(folder: Path, condition: str, seed: int, model: str = "tiny") -> Path:
    """What a training leaves, as far as the curves read it."""
    folder.mkdir(parents=True, exist_ok=True)
    before = {"perplexity": 45.0, "validation_kl": 0.4, "validation_agreement": 0.7}
    record = {
        "settings": {"model": f"resources/models/{model}", "condition": condition, "seed": seed},
        "validation": {"before": before, "teacher": {"perplexity": 30.0}},
    }
    write_json(folder / "run.json", record)
    rows: list[dict[str, float]] = []
    for step in range(1, 21):
        rows.append({"step": step, "loss": 1.0})
        if step % 5 == 0:
            share = DISTANCES[condition] ** (step / 20) + seed / 20_000
            rows[-1] |= {
                "perplexity": 30 + 15 * share,
                "validation_kl": 0.4 * share,
                "validation_agreement": 1 - 0.3 * share,
            }
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_manifest(folder)
    return folder
