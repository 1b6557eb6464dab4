"""An evaluation that was never run: two tasks with one held out, two seeds, every arm, and scores that can be told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from stillhouse.evaluation.results_files import Interval, write_results
from stillhouse.runtime.files import write_json, write_manifest
from stillhouse.studies.lora_generation.config import ARMS
from stillhouse.studies.lora_generation.manifest import AdapterRow
from stillhouse.studies.lora_generation.results import (
    ITEM_COLUMNS,
    OF_COLLECTION,
    ChosenGenerator,
    Closeness,
    Clusters,
    GeneratorFacts,
    Measurement,
    ModelResults,
    Point,
    TaskFacts,
    measured,
)

ITEMS = 40
TASKS = ("apples", "rivers")  # rivers are held out
SEEDS = (42, 7)
CASES = (3, 4)
CONDITIONS = ("multi_task", "weight_only")
# The share of right answers by arm; a generated adapter is as good as this says.
RIGHT = {"base": 0.3, "teacher": 0.9, "nearest_adapter": 0.5, "in_context": 0.4, "few_prompt_lora": 0.6}


def write_fake_evaluation(
    directory: Path,
    generated: float = 0.95,
    arms: tuple[str, ...] = ARMS,
    flagged: Sequence[int] = (),
    weight_only: float | None = None,
    cases: Sequence[int] = CASES,
    seeds: Sequence[int] = SEEDS,
    conditions: Sequence[str] = CONDITIONS,
) -> Path:
    """Write results.json and items.parquet; `generated` is that arm's share of right answers.

    flagged: shards whose teachers are no better than the base. weight_only: the share of that condition, where it is
    another one.
    """
    rows, measurements = [], []
    for task in TASKS:
        for arm in arms:
            shards = [None] if arm == "base" else list(cases)
            for case in shards:
                for condition in conditions if arm == "generated" else (None,):
                    for seed in seeds if arm == "generated" else (None,):
                        subject = {
                            "task": task,
                            "arm": arm,
                            "shard": case,
                            "teacher_seed": 42 if case is not None else None,
                            "condition": condition,
                            "seed": seed,
                            "held_out": "rivers" if arm in (*OF_COLLECTION, "generated") else None,
                        }
                        right = RIGHT.get(arm, 0.45) if arm != "generated" else generated
                        if condition == "weight_only" and weight_only is not None:
                            right = weight_only
                        scores = _scores(right, arm)
                        rows.append(scores.assign(model="tiny", **subject))
                        accuracy, nll = measured(scores)
                        adapter = arm not in ("base", "in_context")
                        role = None if case is None else "held_out_task" if task == "rivers" else "held_out_shard"
                        cosine = 1.0 if arm == "teacher" else 0.5
                        if condition == "multi_task":
                            cosine = {3: 0.75, 4: 0.85}[case]
                        measurements.append(
                            Measurement(
                                **subject,
                                role=role,
                                accuracy=accuracy,
                                gold_nll=nll,
                                closeness=Closeness(cosine=cosine, norm_ratio=0.9, relative_error=0.7)
                                if adapter
                                else None,
                                seconds=0.25 if arm == "generated" else 12.5 if adapter else None,
                                source=None,
                            )
                        )
    results = ModelResults(
        model="tiny",
        model_note="a tiny model",
        evaluation={"arms": list(arms), "in_context_examples": None, "selection": "validation_loss"},
        condition=conditions[0],
        flagged="exclude",
        loss_tokens="answer",
        probes="generic",
        probe_texts=5,
        tasks=tuple(
            TaskFacts(task=task, dataset="tiny_choices", dataset_note="", style="question", items=ITEMS)
            for task in TASKS
        ),
        adapters=tuple(_row(task, shard, flagged) for task in TASKS for shard in range(5)),
        points=tuple(
            Point(name=f"{task}/{shard}", task=task, by_delta=(place, shard / 9), by_weights=(shard / 3, shard % 2))
            for place, task in enumerate(TASKS)
            for shard in range(5)
        ),
        clusters=Clusters(by_delta=_interval(0.8), by_weights=_interval(0.1)),
        generators=tuple(
            GeneratorFacts(
                condition=condition,
                held_out="rivers",
                kind="compact",
                weight=1.0,
                weight_kind="delta_w",
                delta=0.1 if condition == "multi_task" else 0.0,
                delta_kind="mse",
                norm=0.1,
                guided=False,
                prompts=8,
                parameters=12345,
                adapters=3,
                start="mean",
                apart_from_losses="0",
            )
            for condition in conditions
        ),
        selections=tuple(
            ChosenGenerator(condition=condition, seed=seed, step=10, validation_loss=0.9 - 0.1 * place)
            for place, condition in enumerate(conditions)
            for seed in seeds
        ),
        measurements=tuple(measurements),
    )
    items = pd.concat(rows, ignore_index=True)
    write_results(results, directory / "results.json", items, ITEM_COLUMNS, directory / "items.parquet")
    return directory / "results.json"


def write_fake_generator(directory: Path, condition: str, seed: int) -> Path:
    """Training curves as a generator leaves them."""
    write_json(directory / "run.json", {"settings": {"model": "models/tiny", "condition": condition, "seed": seed}})
    steps = np.arange(1, 31)
    rows = pd.DataFrame({"step": steps, "loss": 2 / steps, "delta_w": 1.2 / steps**0.5, "delta": 1 / steps})
    rows.loc[rows["step"] % 10 == 0, "validation/loss"] = 0.5
    rows.to_json(directory / "metrics.jsonl", orient="records", lines=True)
    write_manifest(directory)
    return directory


def _scores(share: float, arm: str) -> pd.DataFrame:
    right = np.arange(ITEMS) < round(share * ITEMS)
    return pd.DataFrame(
        {
            "item_id": [f"item-{number}" for number in range(ITEMS)],
            "correct": right,
            "gold_nll": np.where(right, 1.0, 3.0) + np.arange(ITEMS) / 100 + len(arm) / 50,
            "gold_tokens": 1 + np.arange(ITEMS) % 3,
        }
    )


def _interval(value: float) -> Interval:
    return Interval(n=10, value=value, low=value - 0.1, high=value + 0.1)


def _row(task: str, shard: int, flagged: Sequence[int]) -> AdapterRow:
    return AdapterRow(
        name=f"{task}/shard_{shard}-seed_42/step_9",
        task=task,
        shard=shard,
        seed=42,
        step=9,
        examples=8,
        base_digest="0",
        accuracy_before=_interval(0.3),
        accuracy_after=_interval(0.5),
        gold_nll_before=_interval(2.0),
        gold_nll_after=_interval(1.0),
        better_by="accuracy",
        better=shard not in flagged,
        seconds=12.5,
        digest=f"{task}{shard}",
        rank=2,
        alpha=4,
        targets=("q_proj",),
        tensors=4,
    )
