"""The training step: a student is the same whether its teacher's targets were cached or are computed in each step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from context_distillation.conftest import CONTEXTS
from safetensors.torch import load_file
from support.forked import run_step_in_two

from stillhouse.config.training import TrackingSettings
from stillhouse.studies.context_distillation.run_settings import RunSettings
from stillhouse.studies.context_distillation.train import TrainStep, main
from stillhouse.training.tracking import read_metrics

TRAINING: dict[str, Any] = {
    "steps": 3,
    "batch_size": 4,
    "save_every": 3,
    "precision": "fp32",
    "learning_rate": 1e-2,
    "schedule": {"warmup_steps": 1},
    "lora": {"rank": 2, "dropout": 0.0},
}


def step_of(tiny_model: Path, task_data: Path, folder: Path, cache: Path | None, **run: Any) -> TrainStep:
    return TrainStep(
        model=tiny_model,
        data=task_data,
        cache=cache,
        output=folder / "out",
        work=folder / "work",
        condition="online_v1",
        seed=42,
        run=RunSettings.model_validate({"training": TRAINING, **run}),
        tracking=TrackingSettings(),
        trust_remote_code=False,
    )


def train(
    tiny_model: Path, task_data: Path, folder: Path, cache: Path | None, left_out: int = 0, **run: Any
) -> dict[str, torch.Tensor]:
    """The step program's adapter."""
    main(step_of(tiny_model, task_data, folder, cache, **run))
    record = json.loads((folder / "out" / "run.json").read_text())
    assert len(record["skipped"]["examples"]) == left_out and record["untaught"] == []
    return load_file(folder / "out" / "checkpoint-3" / "adapter_model.safetensors")


@pytest.mark.parametrize(("loss", "mode"), [("mse_top_k", "top_k"), ("kl", "hidden")])
def test_cached_and_online_targets_train_the_same_student(
    loss: str, mode: str, tiny_model: Path, task_data: Path, build_cache: Any, tmp_path: Path
) -> None:
    context = CONTEXTS["per_example"]
    teacher = {"context": context.model_dump(), "cache_top_k": 16, "max_length": 2048, "precision": "fp32"}
    distillation = {"loss": loss, "top_k": 16, "weight": 5.0}
    cached = train(
        tiny_model,
        task_data,
        tmp_path / "cached",
        build_cache(mode, context),
        teacher=teacher,
        distillation=distillation,
    )
    online = train(
        tiny_model,
        task_data,
        tmp_path / "online",
        None,
        teacher={**teacher, "targets": "online"},
        distillation=distillation,
    )
    alone = train(tiny_model, task_data, tmp_path / "alone", None, teacher=teacher, distillation={"loss": "none"})
    for name, weight in cached.items():
        torch.testing.assert_close(weight, online[name], rtol=1e-3, atol=1e-6)
    assert any(not torch.allclose(weight, alone[name], rtol=1e-2, atol=1e-4) for name, weight in cached.items())


@pytest.mark.slow
@pytest.mark.xdist_group("programs")
def test_two_processes_train_the_student_of_one(tiny_model: Path, task_data: Path, tmp_path: Path) -> None:
    """A batch of five splits unevenly, and each process asks the teacher for its own examples."""
    changes: dict[str, Any] = {
        "teacher": {"context": CONTEXTS["per_example"].model_dump(), "max_length": 2048, "precision": "fp32"}
        | {"targets": "online"},
        "distillation": {"loss": "mse_top_k", "top_k": 16, "weight": 5.0},
        "training": TRAINING | {"batch_size": 5},
    }
    alone = train(tiny_model, task_data, tmp_path / "one", None, **changes)
    run_step_in_two(
        "stillhouse.studies.context_distillation.train",
        step_of(tiny_model, task_data, tmp_path / "two", None, **changes),
    )
    together = load_file(tmp_path / "two/out/checkpoint-3/adapter_model.safetensors")
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)
    curves = [[row["loss"] for row in read_metrics(tmp_path / name / "out/metrics.jsonl")] for name in ("one", "two")]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
