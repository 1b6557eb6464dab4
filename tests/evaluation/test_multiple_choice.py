"""Multiple choice: prompts and scores of lm-evaluation-harness, and shared computation that changes no score."""

from __future__ import annotations

import json
import logging
from itertools import chain
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse.assets.choice_readers import CHOICE_READERS
from stillhouse.data.records import ChoiceQuestion
from stillhouse.evaluation.multiple_choice import (
    ChoiceItem,
    ChoiceScore,
    ChoiceStyle,
    choice_item,
    encoded,
    score_choices,
)
from stillhouse.models.branches import Branches, branch_logits, takes_own_masks
from stillhouse.models.prefix import encode_prefix
from stillhouse.runtime.errors import UserError

STOCK = Path(lm_eval.__file__).parent / "tasks"
WORDS = ["Ann has", "two apples", "Ben buys", "many coins", "how many", "the books", "seven", "more than Chen"]


def _phrase(number: int, length: int) -> str:
    return " ".join(WORDS[(number * 3 + 5 * place) % len(WORDS)] for place in range(length))


def _lettered(number: int) -> dict[str, Any]:
    texts = [_phrase(number + place, 1 + (number + place) % 3) for place in range(3 + number % 2)]
    return {"text": texts, "label": ["A", "B", "C", "D"][: len(texts)]}


# Name of the stock task file, our reader and style, and made-up rows with the fields of the published set.
TASKS: dict[str, tuple[str, str, ChoiceStyle, list[dict[str, Any]]]] = {
    "arc_easy": (
        "arc/arc_easy.yaml",
        "arc",
        "question",
        [
            {"question": f"What has {_phrase(n, 3)}?", "choices": _lettered(n), "answerKey": "ABC"[n % 3]}
            for n in range(7)
        ],
    ),
    "openbookqa": (
        "openbookqa/openbookqa.yaml",
        "openbookqa",
        "plain",
        [{"question_stem": _phrase(n, 4), "choices": _lettered(n), "answerKey": "ABC"[n % 3]} for n in range(7)],
    ),
    "boolq": (
        "super_glue/boolq/default.yaml",
        "boolq",
        "passage",
        [
            {
                "passage": f"{_phrase(n, 9)}.",
                "question": f"does {_phrase(n, 2)} have it",
                "answer": n % 2 == 0,
                "label": int(n % 2 == 0),
            }
            for n in range(6)
        ],
    ),
    "hellaswag": (
        "hellaswag/hellaswag.yaml",
        "hellaswag",
        "plain",
        [
            {
                "activity_label": "Shopping",
                "ctx_a": f"[header] {_phrase(n, 4)} [title]",
                "ctx_b": _phrase(n + 1, 1).lower(),
                "endings": [f"{_phrase(n + place, 2 + place)}.  [step] So" for place in range(4)],
                "label": str(n % 4),
            }
            for n in range(6)
        ],
    ),
    "winogrande": (
        "winogrande/default.yaml",
        "winogrande",
        "blank",
        [
            {
                "sentence": f"{_phrase(n, 3)} so _ {_phrase(n + 1, 2)}.",
                "option1": "Ann",
                "option2": "Ben has",
                "answer": str(1 + n % 2),
            }
            for n in range(6)
        ],
    ),
    "piqa": (
        "piqa/piqa.yaml",
        "piqa",
        "question",
        [{"goal": _phrase(n, 3), "sol1": _phrase(n, 2), "sol2": _phrase(n + 2, 3), "label": n % 2} for n in range(6)],
    ),
}


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> tuple[Any, Any]:
    """Model and tokenizer."""
    return AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)


def items_of(name: str, first: int = 0) -> list[ChoiceItem]:
    """Our items of a task's rows."""
    _, reader, style, rows = TASKS[name]
    return [
        choice_item(ChoiceQuestion(id=str(number), **CHOICE_READERS[reader](row)), style)
        for number, row in enumerate(rows[first:])
    ]


def harness(tiny: tuple[Any, Any], directory: Path, name: str, shots: int) -> dict[str, Any]:
    """Samples and scores of lm-evaluation-harness on the stock task, pointed at our rows; the first ones are shots."""
    stock, _, _, rows = TASKS[name]
    for split, part in (("shots", rows[:shots] or rows[:1]), ("items", rows[shots:])):
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    files = {split: str(directory / f"{split}.jsonl") for split in ("shots", "items")}
    task = {
        "include": str(STOCK / stock),
        "task": f"local_{name}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "training_split": "shots",
        "validation_split": "items",
        "test_split": None,
        "fewshot_split": "shots",
        "fewshot_config": {"sampler": "first_n"},
    }
    (directory / f"{name}.yaml").write_text(json.dumps(task))
    model, tokenizer = tiny
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    done = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=[f"local_{name}"],
        num_fewshot=shots,
        task_manager=TaskManager(include_path=str(directory), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert done is not None
    return {"scores": done["results"][f"local_{name}"], "samples": done["samples"][f"local_{name}"]}


@pytest.mark.parametrize(("name", "shots"), [*((name, 0) for name in TASKS), ("arc_easy", 2), ("winogrande", 2)])
def test_prompts_log_likelihoods_and_accuracies_are_those_of_the_harness(
    tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, shots: int
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model, tokenizer = tiny
    solved = [item.prompt + item.answer for item in items_of(name)[:shots]]
    ours = score_choices(model, tokenizer, items_of(name, shots), batch_tokens=200, examples=solved)
    theirs = harness(tiny, tmp_path, name, shots)
    for score, sample in zip(ours, sorted(theirs["samples"], key=lambda one: one["doc_id"]), strict=True):
        # BoolQ's choices stand in another order there.
        order = [1, 0] if name == "boolq" else range(len(score.log_likelihoods))
        expected = [float(sample["filtered_resps"][place][0]) for place in order]
        assert score.log_likelihoods == pytest.approx(expected, abs=2e-3)
    assert sum(score.correct for score in ours) / len(ours) == theirs["scores"]["acc,none"]
    if "acc_norm,none" in theirs["scores"]:
        assert sum(score.correct_norm for score in ours) / len(ours) == theirs["scores"]["acc_norm,none"]


def naive(model: Any, tokenizer: Any, item: ChoiceItem, before: str = "") -> list[float]:
    """The log-likelihood of each continuation from a pass of its own over the whole text."""
    sums = []
    for context, continuation in zip(item.contexts, item.continuations, strict=True):
        ids, start = encoded(tokenizer, before + context, continuation)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        sums.append(sum(float(logits[column - 1, ids[column]]) for column in range(start, len(ids))))
    return sums


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("examples", [(), ("Question: Ann?\nAnswer: two apples", "Question: Ben?\nAnswer: coins")])
@pytest.mark.parametrize("budget", [1, 10_000])
def test_shared_stems_examples_and_batches_change_no_log_likelihood(
    tiny_model: Path, attention: str, examples: tuple[str, ...], budget: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=attention).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    before = "".join(f"{example}\n\n" for example in examples)
    for name in ("arc_easy", "winogrande"):
        items = items_of(name)
        for score, item in zip(
            score_choices(model, tokenizer, items, batch_tokens=budget, examples=examples), items, strict=True
        ):
            assert score.log_likelihoods == pytest.approx(naive(model, tokenizer, item, before), abs=1e-4)


def test_a_model_with_a_sliding_window_is_scored_sequence_by_sequence(tiny: tuple[Any, Any]) -> None:
    model, _ = tiny
    rows = [Branches(((5, 6, 7, 8), (5, 6, 9, 10, 11)), (3, 3)), Branches(((7, 8), (7, 9, 4)), (1, 1))]
    prefix = encode_prefix(model, [20, 21, 22])
    with torch.no_grad():
        shared = branch_logits(model, rows, prefix)
        model.config.sliding_window = 64
        try:
            assert not takes_own_masks(model)
            plain = branch_logits(model, rows, prefix)
        finally:
            model.config.sliding_window = None
    for one, other in zip(chain(*shared), chain(*plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_equal_choices_count_for_the_first_and_length_decides_the_normalised_score() -> None:
    item = ChoiceItem("1", ("Q",) * 2, (" ab", " abcd"), (2, 4), 0)
    assert ChoiceScore(item, (-4.0, -4.0), (1, 2)).correct
    assert not ChoiceScore(item, (-4.0, -4.0), (1, 2)).correct_norm
    assert ChoiceScore(item, (-4.0, -4.0), (1, 2)).gold_nll == 4.0


def test_items_that_cannot_be_scored_are_named(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    long = ChoiceItem("long-7", ("many coins " * 2000,) * 2, (" a", " b"), (1, 1), 0)
    with pytest.raises(UserError, match=r"long-7: has .* the model reads 2048"):
        score_choices(model, tokenizer, [long], batch_tokens=100)
    empty = ChoiceItem("empty-3", ("coins",) * 2, ("", " b"), (1, 1), 0)
    with pytest.raises(UserError, match="empty-3: a choice without a token"):
        score_choices(model, tokenizer, [empty], batch_tokens=100)
    with pytest.raises(UserError, match="w-1: the question has no '_'"):
        choice_item(ChoiceQuestion("w-1", "", "no gap", ("a", "b"), 0), "blank")
