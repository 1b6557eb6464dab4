"""Our task files ask what lm-evaluation-harness' own tasks ask, and score as it does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from stillhouse.assets.choice_readers import CHOICE_READERS
from stillhouse.data.records import ChoiceQuestion
from stillhouse.evaluation.harness import _with_data, drawn_items, score_choices, task_definition, task_versions
from stillhouse.models.loading import load_model, load_tokenizer

STOCK = Path(lm_eval.__file__).parent / "tasks"
CHOICES = {"text": ["the tide", "a saw", "wood "], "label": ["A", "B", "C"]}
# Rows as published: of which our readers make records, and which the stock tasks read themselves.
ROWS: dict[str, tuple[str, str, list[dict[str, Any]]]] = {
    "arc_easy": (
        "arc/arc_easy.yaml",
        "arc",
        [{"question": "What moves ships? ", "choices": CHOICES, "answerKey": key} for key in "AC"],
    ),
    "arc_challenge": (
        "arc/arc_challenge.yaml",
        "arc",
        [{"question": "What cuts?", "choices": CHOICES, "answerKey": "B"}],
    ),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        "hellaswag",
        [
            {
                "activity_label": "Fishing",
                "ctx_a": "How to fish [title] Begin. [step] Sit  down.",
                "ctx_b": "the rod",
                "endings": ["[substeps] bends.", "sings [title] well.", ", it breaks.", "falls"],
                "label": "2",
            }
        ],
    ),
    "winogrande": (
        "winogrande/default.yaml",
        "winogrande",
        [
            {"sentence": "Ann thanked Eve since _ had 'won', \"so\".", "option1": "Ann", "option2": "Eve", "answer": a}
            for a in "12"
        ],
    ),
    "mmlu": (
        "mmlu/default/mmlu_high_school_european_history.yaml",
        "mmlu",
        [
            {
                "question": " 1 + {1}? ",
                "subject": "high_school_european_history",
                "choices": ["1", "2", "3", "4"],
                "answer": 1,
            }
        ],
    ),
}


def asked(definition: dict[str, Any]) -> list[tuple[str, str]]:
    """The contexts and continuations that a task sends to a model."""
    [task] = TaskManager(include_defaults=False).load([definition])["tasks"].values()
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(rank=0, world_size=1)
    return [instance.arguments for instance in task.instances]


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_task_asks_what_the_stock_task_asks(name: str, tmp_path: Path) -> None:
    stock, reader, rows = ROWS[name]
    questions = [ChoiceQuestion(id=str(n), **CHOICE_READERS[reader](row)) for n, row in enumerate(rows)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    definition = {
        **load_yaml(STOCK / stock),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(file) for split in ("train", "validation", "test", "dev")},
            "cache_dir": str(tmp_path / "cache"),
        },
    }
    (tmp_path / "ours").mkdir()
    assert asked(_with_data(name, questions, tmp_path / "ours")) == asked(definition)


def test_every_subject_of_mmlu_is_described_as_its_stock_task_describes_it() -> None:
    template = task_definition("mmlu")["doc_to_text"].split("{{question")[0]
    files = sorted((STOCK / "mmlu/default").glob("mmlu_*.yaml"))
    assert len(files) == 57
    for file in files:
        stock = load_yaml(file)
        assert re.sub(r"\{\{.*?\}\}", stock["dataset_name"].replace("_", " "), template) == stock["description"]


def test_the_measures_and_versions_are_the_stock_tasks() -> None:
    for name, (stock, _, _) in ROWS.items():
        ours, theirs = task_definition(name), load_yaml(STOCK / stock)
        assert ours["metric_list"] == theirs["metric_list"]
        if name != "mmlu":  # its version is that of the group, which takes the mean
            assert ours["metadata"] == theirs["metadata"]
    assert str(load_yaml(STOCK / "mmlu/default/_mmlu.yaml")["metadata"]["version"]) == "2"
    assert task_versions(["mmlu", "arc_easy"]) == {"mmlu": "2.0", "arc_easy": "1.0"}


def test_outcomes_follow_from_the_likelihoods_of_the_choices(tiny_model: Path) -> None:
    model, tokenizer = load_model(tiny_model, "fp32"), load_tokenizer(tiny_model)
    questions = [
        ChoiceQuestion(f"q{n}", "", f"Ann has {n} apples. How many?", (f"{n}", "many more apples than that", "none"), 0)
        for n in range(5)
    ]
    found = score_choices(model, tokenizer, {"arc_easy": questions}, batch_size=3)["arc_easy"]
    assert [score.item_id for score in found] == [question.id for question in questions]
    for question, score in zip(questions, found, strict=True):
        expected = [naive(model, tokenizer, question.question, choice) for choice in question.choices]
        assert score.log_likelihoods == pytest.approx(expected, abs=1e-4)
        by_length = [value / len(choice) for value, choice in zip(expected, question.choices, strict=True)]
        assert score.acc == (max(expected) == expected[0])
        assert score.acc_norm == (max(by_length) == by_length[0])


def naive(model: torch.nn.Module, tokenizer: Any, question: str, choice: str) -> float:
    """The choice's log-likelihood after the prompt, from one plain forward pass."""
    prompt = f"Question: {question}\nAnswer:"
    ids, whole = tokenizer(prompt).input_ids, tokenizer(f"{prompt} {choice}").input_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logits[place - 1, whole[place]].item() for place in range(len(ids), len(whole)))


def test_a_part_of_a_task_is_drawn_by_seed_and_keeps_its_order() -> None:
    questions = [ChoiceQuestion(str(n), "", "?", ("a", "b"), 0) for n in range(50)]
    drawn = drawn_items(questions, 10, seed=3)
    assert drawn == drawn_items(questions, 10, seed=3) != drawn_items(questions, 10, seed=4)
    assert [int(one.id) for one in drawn] == sorted(int(one.id) for one in drawn)
    assert [one.id for one in drawn] != [str(n) for n in range(10)]
    assert drawn_items(questions, None, 0) == drawn_items(questions, 99, 0) == questions
