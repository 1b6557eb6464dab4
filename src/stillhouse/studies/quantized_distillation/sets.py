"""What evaluation measures on: texts in windows, the answers of the study's test split, and tasks' questions.

Each set knows what determines it (`facts`), so that a system's rows on it can be kept and found again.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from stillhouse.data.packing import Sequence
from stillhouse.data.prompts import prompt_renderer
from stillhouse.data.records import ChoiceQuestion, read_choice_questions, read_passages
from stillhouse.evaluation.harness import ChoiceScore, drawn_items, task_definition
from stillhouse.evaluation.perplexity import sliding_windows, text_tokens
from stillhouse.evaluation.teacher_agreement import TokenScores
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.records import data_digest
from stillhouse.studies.quantized_distillation.data import read_instructions
from stillhouse.studies.quantized_distillation.evaluation_settings import (
    AnswerRendering,
    EvaluationSettings,
    TaskItems,
    TextTokens,
)
from stillhouse.studies.quantized_distillation.results import ANSWERS, Kind


@dataclass(frozen=True)
class TokenSet:
    """Sequences whose answers are scored token by token.

    stretch: tokens of a text that are one item, whatever its windows; None: each sequence is one.
    """

    kind: Kind
    name: str
    sequences: tuple[Sequence, ...]
    facts: dict[str, Any]
    stretch: int | None = None

    def rows(self, scores: Items[TokenScores]) -> pd.DataFrame:
        """One row an item: tokens, and the sums of nll, kl and agreement."""
        columns = {name: [getattr(score, name) for score in scores] for name in ("nll", "kl", "agrees")}
        if self.stretch:
            columns = {name: list(torch.cat(values).split(self.stretch)) for name, values in columns.items()}
            ids = [f"{self.name}-{number}" for number in range(len(columns["nll"]))]
        else:
            ids = [sequence.example_id for sequence in self.sequences]
        sums = {name: [value.double().sum().item() for value in values] for name, values in columns.items()}
        return pd.DataFrame({"item_id": ids, "tokens": [len(value) for value in columns["nll"]], **sums})


@dataclass(frozen=True)
class TaskSet:
    """The questions of one task."""

    name: str
    questions: tuple[ChoiceQuestion, ...]
    facts: dict[str, Any]
    kind: Kind = "task"

    def rows(self, scores: Items[ChoiceScore]) -> pd.DataFrame:
        """One row a question."""
        records = [
            {
                "item_id": score.item_id,
                "tokens": 1,
                "acc": float(score.acc),
                "acc_norm": None if score.acc_norm is None else float(score.acc_norm),
            }
            for score in scores
        ]
        return pd.DataFrame(records)


MeasuredSet = TokenSet | TaskSet


def text_set(
    name: str, text: TextTokens, dataset: Path, tokenizer: PreTrainedTokenizerBase, settings: EvaluationSettings
) -> TokenSet:
    """A text in sliding windows; raises `UserError` where the split is missing or too short."""
    passages = read_passages(dataset / f"{text.split}.jsonl")
    ids = text_tokens(tokenizer, (passage.text for passage in passages), text.tokens)
    if len(ids) < 2:
        raise UserError(f"evaluation.texts.{name}: {text.dataset} has {len(ids)} tokens: take a longer text")
    windows = sliding_windows(ids, settings.window, settings.stride, name)
    facts = {
        "data": data_digest(dataset),
        "text": text.model_dump(),
        "window": [settings.window, settings.stride, settings.stretch],
    }
    return TokenSet("text", name, tuple(windows), facts, settings.stretch)


def answer_set(
    data: Path, rendering: AnswerRendering, tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> TokenSet:
    """The first examples of the test split that pass the filter."""
    renderer = prompt_renderer(tokenizer, rendering.prompt_format)
    examples = read_instructions(data / "test.jsonl", renderer, rendering.max_length, rendering.response_room, limit)
    facts = {"data": data_digest(data), "rendering": rendering.model_dump(), "limit": limit}
    return TokenSet("answers", ANSWERS, examples.sequences, facts)


def task_set(name: str, task: TaskItems, dataset: Path, seed: int) -> TaskSet:
    """The drawn questions of a task."""
    questions = read_choice_questions(dataset / f"{task.split}.jsonl")
    facts = {
        "data": data_digest(dataset),
        "task": task.model_dump(),
        "seed": seed,
        "definition": task_definition(name),
    }
    return TaskSet(name, tuple(drawn_items(questions, task.items, seed)), facts)
