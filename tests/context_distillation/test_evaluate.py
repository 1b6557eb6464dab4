"""The evaluation step: what it keeps of an earlier attempt, how each task's answers are scored, what was left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from context_distillation.test_train import train
from support.tiny_models import word_problems

from stillhouse.config.assets import Task
from stillhouse.data.records import MathProblem
from stillhouse.runtime.files import write_manifest
from stillhouse.studies.context_distillation.evaluate import (
    EvaluateStep,
    EvaluationJob,
    find_subjects,
    main,
    skipped_examples,
)


@pytest.fixture
def split_data(tmp_path: Path) -> Path:
    directory = tmp_path / "split"
    directory.mkdir()
    for number, split in enumerate(("train", "validation", "test")):
        rows = word_problems(12)[4 * number : 4 * number + 4]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_manifest(directory)
    return directory


def evaluate_step(model: Path, data: Path, folder: Path, **changes: Any) -> EvaluateStep:
    evaluation = {
        "engine": {"kind": "transformers", "precision": "fp32", "max_model_length": 512},
        "generation": {"max_new_tokens": 4},
        "few_shot_counts": [2],
        "generated_items": 1,
    }
    return EvaluateStep.model_validate(
        {
            "model": model,
            "data": data,
            "results": folder / "results.json",
            "item_scores": folder / "items.parquet",
            "record": folder / "run.json",
            "work": folder / "work",
            "model_name": "tiny",
            "model_note": "",
            "dataset": "made_up",
            "dataset_note": "",
            "task": "math_word_problem",
            "conditions": ["base_zero_shot", "base_few_shot"],
            "prompt_format": "plain",
            "evaluation": evaluation | changes.pop("evaluation", {}),
            "served_by_vllm": False,
            "trust_remote_code": False,
            **changes,
        }
    )


def parts(step: EvaluateStep) -> tuple[int, int]:
    """How many parts a run computed, and how many it kept."""
    main(step)
    record = json.loads(step.record.read_text())
    return record["parts_computed"], record["parts_kept"]


def test_scores_are_kept_for_the_same_computation_and_for_no_other(
    tiny_model: Path, split_data: Path, tmp_path: Path
) -> None:
    step = evaluate_step(tiny_model, split_data, tmp_path)
    assert parts(step) == (4, 0)  # gold NLL and answers of two subjects
    assert parts(step) == (0, 4)
    bf16 = step.evaluation.engine.model_copy(update={"precision": "bf16"})
    assert parts(step.model_copy(update={"evaluation": step.evaluation.model_copy(update={"engine": bf16})})) == (4, 0)


@pytest.mark.parametrize(
    ("task", "gold", "right", "wrong"),
    [
        ("math_word_problem", "#### 1,200", "#### 1200", "#### 1201"),
        ("multiple_choice", "#### B", "It is so. #### B", "#### C"),
        ("competition_math", "So \\boxed{\\frac{1}{2}}.", "\\boxed{\\frac{1}{2}}", "\\boxed{2}"),
    ],
)
@pytest.mark.parametrize("scorer", ["corrected", "as_published"])
def test_answers_of_every_task_can_be_right_under_either_scorer(
    scorer: str, task: Task, gold: str, right: str, wrong: str, tiny_model: Path, split_data: Path, tmp_path: Path
) -> None:
    job = EvaluationJob(evaluate_step(tiny_model, split_data, tmp_path, evaluation={"scorer": scorer}))
    problem = MathProblem(id="0", question="", answer=gold)
    assert job._score(right, problem, task)[0]
    assert not job._score(wrong, problem, task)[0]


def test_the_published_scorer_drops_the_sign_of_numbers_only(
    tiny_model: Path, split_data: Path, tmp_path: Path
) -> None:
    problem = MathProblem(id="0", question="", answer="#### -5")
    for scorer, accepted in (("corrected", True), ("as_published", False)):
        job = EvaluationJob(evaluate_step(tiny_model, split_data, tmp_path, evaluation={"scorer": scorer}))
        assert job._score("#### -5", problem, "math_word_problem")[0] == accepted


def test_training_examples_over_the_limit_are_counted_by_condition(tiny_model: Path, tmp_path: Path) -> None:
    rows = word_problems(12)
    rows[2]["question"] *= 40
    data = tmp_path / "task"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_manifest(data)
    lengths = {"max_length": 400, "overlong": "skip", "distillation": {"loss": "none"}}
    train(tiny_model, data, tmp_path, None, left_out=1, **lengths)
    assert skipped_examples([tmp_path / "out"]) == {"online_v1": 1}
    step = evaluate_step(tiny_model, data, tmp_path, students=[tmp_path / "out"], conditions=["online_v1"])
    assert [subject.condition for subject in find_subjects(step)] == ["online_v1"]
