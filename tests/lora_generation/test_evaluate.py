"""The checkpoint that is scored, and worked answers: asked and judged as in context distillation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from support.tiny_models import word_problems

from stillhouse.config.evaluation import EngineSettings, GenerationSettings
from stillhouse.evaluation.engines.base import Completion
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import write_json, write_manifest
from stillhouse.studies.context_distillation import evaluate as context_distillation
from stillhouse.studies.context_distillation.config import EvaluationSettings
from stillhouse.studies.context_distillation.evaluate import EvaluateStep, EvaluationJob, Subject
from stillhouse.studies.lora_generation import scoring
from stillhouse.studies.lora_generation.data import read_items
from stillhouse.studies.lora_generation.evaluate import select_checkpoint
from stillhouse.studies.lora_generation.prompts import SolvedPrompt
from stillhouse.studies.lora_generation.scoring import Scorer


def generator_with(directory: Path, losses: dict[int, float | None]) -> Path:
    """What training leaves of a generator, with a checkpoint at each step; None: a step without validation."""
    write_json(directory / "run.json", {"settings": {"condition": "multi_task", "seed": 42}})
    rows = []
    for step, loss in losses.items():
        (directory / f"checkpoint-{step}").mkdir(parents=True)
        rows.append({"step": step, "loss": 1.0} | ({} if loss is None else {"validation/loss": loss}))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.mark.parametrize(
    ("losses", "rule", "expected"),
    [
        ({5: 0.4, 10: 0.2, 15: 0.3}, "validation_loss", 10),
        ({5: 0.2, 10: 0.2, 15: 0.3}, "validation_loss", 5),
        ({5: 0.1, 10: 0.2, 100: 0.3}, "last", 100),
        ({5: None, 10: None}, "last", 10),
    ],
)
def test_the_checkpoint_of_the_lowest_validation_loss_or_the_last_is_scored(
    tmp_path: Path, losses: dict[int, float | None], rule: str, expected: int
) -> None:
    chosen = select_checkpoint(generator_with(tmp_path / "generator", losses), rule)
    assert (chosen.condition, chosen.seed, chosen.step) == ("multi_task", 42, expected)


def test_a_checkpoint_without_its_validation_loss_is_named(tmp_path: Path) -> None:
    generator = generator_with(tmp_path / "generator", {5: 0.4, 10: None, 15: 0.3})
    with pytest.raises(UserError, match=r"metrics\.jsonl: has no validation/loss of step 10: train it again"):
        select_checkpoint(generator, "validation_loss")


class ScriptedEngine:
    """Gives set answers, right, right but for the marker, and wrong, and keeps what it was asked."""

    def __init__(self, answers: Sequence[str]) -> None:
        self.answers, self.asked = answers, list[list[int]]()

    def generate(self, prompts: Sequence[Sequence[int]], *_: object) -> list[Completion]:
        self.asked += [list(prompt) for prompt in prompts]
        return [Completion((1,), text, True) for text in self.answers]

    def close(self) -> None:
        """Nothing to free."""


@pytest.mark.parametrize("shots", [0, 2])
def test_worked_answers_are_asked_and_judged_as_in_context_distillation(
    shots: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems, data = word_problems(7), tmp_path / "data"
    data.mkdir()
    for split, rows in (("test", problems[:3]), ("train", problems[3:]), ("validation", problems[3:])):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_manifest(data)
    right = [row["answer"] for row in problems[:3]]
    answers = [right[0], right[1].replace("####", "so"), "It is #### -1"]
    engines = [ScriptedEngine(answers), ScriptedEngine(answers)]
    for module, engine in zip((scoring, context_distillation), engines, strict=True):
        monkeypatch.setattr(module, "open_engine", lambda *_, engine=engine, **__: engine)
    settings = {"engine": EngineSettings(kind="transformers", precision="fp32"), "batch_tokens": 500}
    job = EvaluationJob(
        EvaluateStep(
            model=tiny_model,
            data=data,
            results=tmp_path / "results.json",
            item_scores=tmp_path / "items.parquet",
            record=tmp_path / "run.json",
            work=tmp_path / "work",
            model_name="tiny",
            model_note="",
            dataset="tiny_arithmetic",
            dataset_note="",
            task="math_word_problem",
            conditions=("base_zero_shot", "base_few_shot"),
            prompt_format="auto",
            evaluation=EvaluationSettings.model_validate(settings),
            served_by_vllm=False,
            trust_remote_code=False,
        )
    )
    subject = Subject("base_few_shot" if shots else "base_zero_shot", 0, 0, shots, None)
    theirs = job.gold_nll([subject]).merge(job.answers([subject]), on="item_id").set_index("item_id")
    context = [
        SolvedPrompt(str(place), shot.question, shot.answer or "") for place, shot in enumerate(job.shots(subject))
    ]
    scorer = Scorer(
        tiny_model,
        precision="fp32",
        batch_tokens=500,
        score="acc",
        engine=settings["engine"],
        generation=GenerationSettings(),
    )
    with closing(scorer):
        ours = scorer.score("worked", read_items(data / "test.jsonl", "worked"), None, context).set_index("item_id")
    assert engines[0].asked == engines[1].asked and len(engines[0].asked) == 3
    assert ours["correct"].tolist() == theirs["strict_correct"].tolist() == [True, False, False]
    assert ours["gold_tokens"].tolist() == theirs["gold_tokens"].tolist()
    assert ours["gold_nll"].tolist() == pytest.approx(theirs["gold_nll"].tolist(), abs=1e-3)
