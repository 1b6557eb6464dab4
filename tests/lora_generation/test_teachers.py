"""Teacher adapters: trained by shards, judged against the base, collected under one manifest, each fault named."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.config.training import TrackingSettings
from stillhouse.models.lora_tensors import read_adapter, write_adapter
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json, write_manifest
from stillhouse.studies.lora_generation import collect, teachers
from stillhouse.studies.lora_generation.collect import CollectStep
from stillhouse.studies.lora_generation.data import Wording, read_items, shard_of, solved
from stillhouse.studies.lora_generation.manifest import read_collection, read_facts
from stillhouse.studies.lora_generation.prompts import read_prompts, read_solved_prompts
from stillhouse.studies.lora_generation.scoring import Scorer
from stillhouse.studies.lora_generation.teacher_settings import Teacher, TeacherTrainingSettings
from stillhouse.studies.lora_generation.teachers import TeachersStep

NAMES = tuple(f"apples/shard_{shard}-seed_42/step_{step}" for shard in (0, 1) for step in (2, 4))


def write_choices(directory: Path) -> Path:
    """Nine questions to learn from, four to validate by: the first choice is right, and always the same words."""
    directory.mkdir(parents=True)
    for split, count in (("train", 9), ("validation", 4)):
        records = [
            {
                "id": f"{split}-{number}",
                "context": "",
                "question": f"Ann has {number} apples. What has she?",
                "choices": ["many apples", "two books", "coins"],
                "gold": 0,
            }
            for number in range(count)
        ]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_manifest(directory)
    return directory


def step_of(folder: Path, model: Path, **changes: Any) -> TeachersStep:
    """Two shards together, two steps of each collected."""
    training = TeacherTrainingSettings.model_validate(
        {
            "steps": 4,
            "batch_size": 2,
            "learning_rate": 0.03,
            "lora": {"rank": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]},
            "schedule": {"warmup_steps": 1},
            "save_every": 2,
            "precision": "fp32",
        }
    )
    settings: dict[str, Any] = {
        "model": model,
        "data": folder / "data",
        "output": folder / "teachers",
        "work": folder / "work",
        "model_name": "tiny",
        "task": "apples",
        "style": "question",
        "seed": 42,
        "first_shard": 0,
        "last_shard": 1,
        "shard_examples": 4,
        "prompts": 3,
        "steps": (2, 4),
        "loss_tokens": "answer",
        "shared_start": True,
        "better_by": "gold_nll",
        "scored_items": None,
        "score": "acc",
        "batch_tokens": 500,
        "training": training,
        "tracking": TrackingSettings(),
    }
    return TeachersStep(**(settings | changes))


@pytest.fixture(scope="module")
def trained(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and one finished job of teachers."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("teachers")
    write_choices(folder / "data")
    teachers.main(step_of(folder, tiny_model))
    return folder


def collect_step(folder: Path, model: Path, output: Path, **changes: Any) -> CollectStep:
    settings = {"model": model, "teachers": (folder / "teachers",), "output": output, "expected": NAMES}
    return CollectStep(**(settings | changes))


def test_each_adapter_has_its_files_and_is_judged_on_its_own_task(trained: Path) -> None:
    for shard in (0, 1):
        for step in (2, 4):
            folder = trained / "teachers" / f"shard_{shard}-seed_42/step_{step}"
            facts = read_facts(folder)
            assert (facts.task, facts.shard, facts.seed, facts.step, facts.examples) == ("apples", shard, 42, step, 4)
            assert facts.accuracy_before.n == 4 and facts.better
            assert facts.gold_nll_after.value < facts.gold_nll_before.value
            assert [one.id for one in read_solved_prompts(folder / "prompts.json")] == [
                f"train-{4 * shard + place}" for place in range(3)
            ]
            assert read_adapter(folder).layout.rank == 2
    record = read_json(trained / "teachers/run.json")
    assert (record["adapters"], record["better"]) == (4, 4)


def test_a_teacher_that_is_not_better_is_flagged_from_its_facts_to_the_manifest(
    trained: Path, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The adapters of the first shard change nothing: they score as the base does, which is not better."""
    shutil.copytree(trained / "teachers", tmp_path / "teachers")
    every = [Teacher("apples", shard, 42, step) for shard in (0, 1) for step in (2, 4)]
    for teacher in every[:2]:
        folder = tmp_path / "teachers" / teacher.folder
        write_adapter(read_adapter(folder).map(torch.zeros_like), folder, "tiny")
    scorer, step = Scorer(tiny_model, **_SCORING), step_of(trained, tiny_model)
    judged = teachers.judge(step, scorer, every, tmp_path / "teachers", seconds=1.0)
    assert [facts.better for facts in judged] == [False, False, True, True]
    assert judged[0].gold_nll_after == judged[0].gold_nll_before
    write_manifest(tmp_path / "teachers")
    with caplog.at_level(logging.WARNING):
        collect.main(collect_step(tmp_path, tiny_model, tmp_path / "adapters"))
    assert {row.name: row.flagged for row in read_collection(tmp_path / "adapters")} == {
        name: "shard_0" in name for name in NAMES
    }
    assert caplog.text.count("is no better than the base on its own task (by gold_nll)") == 2
    assert read_json(tmp_path / "adapters/run.json")["flagged"] == 2


def test_adapters_of_a_shared_start_begin_at_the_same_a(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    batches = [
        teachers.new_adapters(
            step_of(trained, tiny_model, shared_start=shared), Scorer(tiny_model, **_SCORING).model
        ).adapters()
        for shared in (True, False)
    ]
    for batch, equal in zip(batches, (True, False), strict=True):
        name = batch.layout.modules[0].name
        assert torch.equal(batch.a[name][0], batch.a[name][1]) is equal


_SCORING: dict[str, Any] = {"precision": "fp32", "batch_tokens": 500, "score": "acc"}


def test_a_collection_has_a_row_for_every_adapter(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    collect.main(collect_step(trained, tiny_model, tmp_path / "adapters"))
    rows = read_collection(tmp_path / "adapters")
    assert tuple(row.name for row in rows) == NAMES
    for row in rows:
        assert (row.rank, row.alpha, row.tensors, row.flagged) == (2, 4, 8, False)
        assert len(read_prompts(tmp_path / "adapters" / row.name / "prompts.json")) == 3
    assert len({row.digest for row in rows}) == 4


def test_scores_under_an_adapter_are_those_of_the_merged_model(trained: Path, tiny_model: Path) -> None:
    from peft import PeftModel

    folder = trained / "teachers/shard_1-seed_42/step_4"
    items = read_items(trained / "data/validation.jsonl", "question")
    scorer = Scorer(tiny_model, **_SCORING)
    shots = [solved(item) for item in shard_of(trained / "data/train.jsonl", "question", 0, 2)]
    ours = scorer.score("question", items, folder, shots)
    merged = Scorer(tiny_model, **_SCORING)
    merged.__dict__["model"] = PeftModel.from_pretrained(merged.model, str(folder)).merge_and_unload().eval()
    theirs = merged.score("question", items, None, shots)
    assert ours["gold_nll"].tolist() == pytest.approx(theirs["gold_nll"].tolist(), abs=1e-4)
    without = scorer.score("question", items, None)
    assert without["gold_nll"].tolist() != pytest.approx(ours["gold_nll"].tolist(), abs=1e-2)


@pytest.mark.parametrize("loss_tokens", ["answer", "all"])
def test_an_adapter_learns_the_answer_or_all_tokens(trained: Path, tiny_model: Path, loss_tokens: str) -> None:
    scorer = Scorer(tiny_model, **_SCORING)
    wording = Wording.of(scorer.model, scorer.tokenizer, "question")
    [item] = read_items(trained / "data/train.jsonl", "question", limit=1)
    [sequence] = wording.learnt([solved(item)], loss_tokens)
    text = scorer.tokenizer.decode(sequence.input_ids[sequence.answer_start :])
    assert text == (" many apples" if loss_tokens == "answer" else scorer.tokenizer.decode(sequence.input_ids[1:]))


def test_a_train_split_that_is_too_small_is_named(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl: has 9 examples, shard 2 ends at 12"):
        teachers.main(step_of(trained, tiny_model, last_shard=2, output=tmp_path / "out", work=tmp_path / "work"))


def test_an_empty_task_is_named(trained: Path, tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "data", tmp_path / "data")
    (tmp_path / "data/train.jsonl").write_text("")
    write_manifest(tmp_path / "data")
    with pytest.raises(UserError, match=r"train\.jsonl: holds no examples"):
        teachers.main(step_of(tmp_path, tiny_model))


def _damage(name: str, folder: Path) -> None:
    """One fault in the second adapter, its job's manifest made to agree: only the collection can tell."""
    adapter = folder / "shard_0-seed_42/step_4"
    match name:
        case "prompts":
            (adapter / "prompts.json").unlink()
        case "weights":
            (adapter / "adapter_model.safetensors").write_bytes(b"not safetensors")
        case "rank":
            configuration = read_json(adapter / "adapter_config.json")
            (adapter / "adapter_config.json").write_text(json.dumps(configuration | {"r": 3}))
        case "base":
            facts = read_json(adapter / "teacher.json")
            (adapter / "teacher.json").write_text(json.dumps(facts | {"base_digest": "another"}))
        case "missing":
            shutil.rmtree(adapter)
    write_manifest(folder)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("prompts", r"shard_0-seed_42/step_4/prompts\.json: does not exist"),
        ("weights", r"shard_0-seed_42/step_4/adapter_model\.safetensors: is corrupt"),
        ("rank", r"adapter_model\.safetensors: A and B of .* not of rank 3"),
        ("base", r"step_4/teacher\.json: the adapter is of another base model"),
        ("missing", r"'apples/shard_0-seed_42/step_4' and 0 more adapters are trained or expected, but not both"),
    ],
)
def test_an_adapter_that_cannot_stand_beside_the_others_is_named(
    trained: Path, tiny_model: Path, tmp_path: Path, fault: str, message: str
) -> None:
    shutil.copytree(trained / "teachers", tmp_path / "teachers")
    _damage(fault, tmp_path / "teachers")
    with pytest.raises(UserError, match=message):
        collect.main(collect_step(tmp_path, tiny_model, tmp_path / "adapters"))
    assert not (tmp_path / "adapters").exists()
