"""The step programs on a tiny model: cache, training, resume, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.forked import run_step_in_two
from support.tiny_models import make_tiny_llama, word_problems

from stillhouse.config.quantization import WeightFormat
from stillhouse.config.training import TrackingSettings
from stillhouse.models.export import load_exported
from stillhouse.models.quantized_lora import load_student
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json, write_manifest
from stillhouse.studies.quantized_distillation import export, teacher, train
from stillhouse.studies.quantized_distillation.run_settings import RunSettings
from stillhouse.training.processes import TrainingInterrupted
from stillhouse.training.tracking import read_metrics

SMALL: dict[str, Any] = {
    "max_length": 64,
    "response_room": 4,
    "format": {"group_size": 16},
    "sampling": {"min_new_tokens": 2, "max_new_tokens": 6},
    "validation": {"items": 4, "text_tokens": 96, "window": 32, "stride": 16},
    "teacher": {"batch_tokens": 128},
    "training": {
        "lora": {"rank": 4, "alpha": 8},
        "steps": 4,
        "batch_size": 4,
        "micro_batch_tokens": 256,
        "learning_rate": 1e-3,
        "schedule": {"warmup_steps": 1},
        "save_every": 2,
        "resume_every": 1,
        "precision": "fp32",
    },
}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, split instructions and a text, as the workflow leaves them."""
    root = tmp_path_factory.mktemp("house")
    make_tiny_llama(root / "model")
    problems = word_problems(24)
    splits = {"train": problems[:16], "validation": problems[16:]}
    for folder, files in {
        "data": splits,
        "text": {"train": [{"id": problem["id"], "text": problem["answer"]} for problem in problems]},
    }.items():
        (root / folder).mkdir()
        for name, rows in files.items():
            (root / folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_manifest(root / folder)
    return root


def settings(**overrides: Any) -> RunSettings:
    return RunSettings.model_validate({**SMALL, **overrides})


def step(house: Path, root: Path, run: RunSettings, cache: Path | None = None) -> train.TrainStep:
    return train.TrainStep(
        model=house / "model",
        data=house / "data",
        cache=cache,
        text=house / "text",
        output=root / "student",
        work=root / "work",
        condition="test",
        seed=1,
        run=run,
        tracking=TrackingSettings(),
        trust_remote_code=False,
    )


def adapter(student: Path, number: int) -> dict[str, torch.Tensor]:
    return load_file(student / f"checkpoint-{number}" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def cached(house: Path) -> Path:
    """The student that learns from the data set through the cache, and what it left."""
    run = settings()
    assert run.cache is not None
    teacher.main(
        teacher.TeacherStep(
            model=house / "model", data=house / "data", output=house / "cache", work=house / "work", cache=run.cache
        )
    )
    train.main(step(house, house, run, house / "cache"))
    return house / "student"


def test_a_student_comes_nearer_to_its_teacher_and_the_record_says_from_where(cached: Path) -> None:
    record = read_json(cached / "run.json")
    rows = [row for row in read_metrics(cached / "metrics.jsonl") if "validation_kl" in row]
    assert [row["step"] for row in rows] == [2, 4]
    before = record["validation"]["before"]
    assert set(before) == {"validation_kl", "validation_agreement", "perplexity"}
    assert rows[-1]["validation_kl"] < before["validation_kl"]
    assert record["validation"]["teacher"]["perplexity"] > 1
    assert record["examples"] == 16


def test_targets_from_the_cache_train_the_same_student_as_online_ones(
    cached: Path, house: Path, tmp_path: Path
) -> None:
    train.main(step(house, tmp_path, settings(teacher={"targets": "online"})))
    ours, theirs = (read_metrics(root / "metrics.jsonl") for root in (cached, tmp_path / "student"))
    # Rounding parts them later: the difference of a last digit may turn a code.
    assert [row["loss"] for row in ours[:2]] == pytest.approx([row["loss"] for row in theirs[:2]], rel=1e-4)


def test_an_interrupted_run_on_samples_continues_to_the_very_same_student(
    house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = settings(distillation={"on_policy_share": 0.5, "seq_kd": True})
    train.main(step(house, tmp_path / "whole", run))
    plain = train.GkdObjective.__call__

    def interrupted(self: Any, model: Any, batch: Any, number: int) -> Any:
        if number == 3:
            raise TrainingInterrupted
        return plain(self, model, batch, number)

    with monkeypatch.context() as patch, pytest.raises(TrainingInterrupted):
        patch.setattr(train.GkdObjective, "__call__", interrupted)
        train.main(step(house, tmp_path / "parts", run))
    train.main(step(house, tmp_path / "parts", run))
    for number in (2, 4):
        torch.testing.assert_close(
            adapter(tmp_path / "parts" / "student", number),
            adapter(tmp_path / "whole" / "student", number),
            rtol=0,
            atol=0,
        )
    assert read_json(tmp_path / "parts" / "student" / "run.json")["training"]["resumed_from"] == 2


def test_the_exported_student_is_the_checkpoint_with_the_lowest_validation_kl(
    cached: Path, house: Path, tmp_path: Path
) -> None:
    student = tmp_path / "student"
    shutil.copytree(cached, student)
    rows = read_metrics(student / "metrics.jsonl")
    for row in rows:
        if "validation_kl" in row:
            row["validation_kl"] = {2: 0.1, 4: 0.2}[int(row["step"])]
    (student / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_manifest(student)
    weight_format = WeightFormat(group_size=16)
    assert export.selected_step(student, "last") == 4
    export.main(
        export.ExportStep(
            model=house / "model", student=student, output=tmp_path / "out", format=weight_format, precision="fp32"
        )
    )
    record = read_json(tmp_path / "out" / "run.json")
    assert record["selected_step"] == 2
    assert record["largest_logit_difference"] < 1e-5
    ids = torch.arange(5, 15)[None]
    fake = load_student(house / "model", student / "checkpoint-2", weight_format, precision="fp32")
    with torch.no_grad():
        real = load_exported(tmp_path / "out", "fp32")
        torch.testing.assert_close(real(input_ids=ids).logits, fake(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_an_export_whose_logits_are_not_the_students_is_refused() -> None:
    expected = torch.tensor([[1.0, -2.0]])
    assert export.relative_difference(expected + 1e-3, expected, WeightFormat()) == pytest.approx(5e-4, rel=1e-2)
    with pytest.raises(UserError, match=r"int4-g128: .* differ by 0\.005 of their size .*tolerance 0\.001"):
        export.relative_difference(expected + 1e-2, expected, WeightFormat())


def test_a_student_without_validation_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(UserError, match="has no validation_kl: train again"):
        export.selected_step(tmp_path, "validation_kl")


def test_a_group_size_that_does_not_fit_is_refused_before_training(house: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"format\.group_size: 48 does not divide"):
        train.main(step(house, tmp_path, settings(format={"group_size": 48})))


@pytest.mark.slow
@pytest.mark.xdist_group("programs")
def test_two_processes_train_the_student_of_one(house: Path, tmp_path: Path) -> None:
    """A batch of five splits unevenly. Two updates are compared: later a last digit may turn a code, as above."""
    training = SMALL["training"] | {"batch_size": 5, "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}
    one, two = (
        step(house, tmp_path / name, settings(teacher={"targets": "online"}, training=training))
        for name in ("one", "two")
    )
    train.main(one)
    run_step_in_two("stillhouse.studies.quantized_distillation.train", two)
    alone, together = (read_metrics(each.output / "metrics.jsonl") for each in (one, two))
    assert len(together) == len(alone) == 4
    assert [row["loss"] for row in together[:2]] == pytest.approx([row["loss"] for row in alone[:2]], rel=1e-4)
    torch.testing.assert_close(adapter(two.output, 2), adapter(one.output, 2), atol=1e-4, rtol=1e-3)
