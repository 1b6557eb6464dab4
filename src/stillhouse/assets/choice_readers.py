"""Readers of multiple-choice sets (task `answer_choices`), each for the rows as published or as a harness keeps them.

Part of `assets.datasets.READERS`. What a benchmark does to its text before a model reads it (HellaSwag's brackets)
is done here, so that the records are what the published scores were measured on; prompts are the task files' matter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_FRAMED = re.compile(r"(?:(?P<context>.*)\n)?(?:Question|Goal): (?P<question>.*)\nAnswer:", re.DOTALL)


def _choice_question(question: str, choices: Sequence[str], gold: int, context: str = "") -> dict[str, Any]:
    """The fields of a record. No space is stripped: scores depend on it."""
    return {"context": context, "question": question, "choices": tuple(choices), "gold": gold}


def _lettered(question: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Choices by label, the right one named by `answerKey`."""
    labels = row["choices"]["label"]
    if row["answerKey"] not in labels:
        raise ValueError(f"answerKey {row['answerKey']!r} is none of its choices")
    return _choice_question(question, row["choices"]["text"], labels.index(row["answerKey"]))


def _arc(row: Mapping[str, Any]) -> dict[str, Any]:
    """ARC, Easy and Challenge (arXiv 1803.05457), as published."""
    return _lettered(row["question"], row)


def _openbookqa(row: Mapping[str, Any]) -> dict[str, Any]:
    """OpenBookQA (arXiv 1809.02789), as published."""
    return _lettered(row["question_stem"], row)


def _boolq(row: Mapping[str, Any]) -> dict[str, Any]:
    """BoolQ (arXiv 1905.10044), as published: a passage, a yes/no question, a truth value."""
    return _choice_question(row["question"], ("yes", "no"), 0 if row["answer"] else 1, row["passage"])


def _framed_query(row: Mapping[str, Any]) -> dict[str, Any]:
    """A harness's record whose `query` is `Question: ...\\nAnswer:`, a passage perhaps before it."""
    framed = _FRAMED.fullmatch(row["query"])
    if framed is None:
        raise ValueError("'query' is not made of Question and Answer")
    return _choice_question(framed["question"], row["choices"], row["gold"], framed["context"] or "")


def _plain_query(row: Mapping[str, Any]) -> dict[str, Any]:
    """A harness's record whose `query` is the text that the choices continue."""
    return _choice_question(row["query"], row["choices"], row["gold"])


def _hellaswag(row: Mapping[str, Any]) -> dict[str, Any]:
    """HellaSwag (arXiv 1905.07830) as published; the text is cleaned as lm-evaluation-harness cleans it."""
    start = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return _choice_question(
        _without_brackets(start), [_without_brackets(ending) for ending in row["endings"]], int(row["label"])
    )


def _without_brackets(text: str) -> str:
    """WikiHow's `[title]` ends a sentence, its other brackets go."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _piqa(row: Mapping[str, Any]) -> dict[str, Any]:
    """PIQA (arXiv 1911.11641): a goal and two ways to it."""
    return _choice_question(row["goal"], (row["sol1"], row["sol2"]), int(row["label"]))


def _winogrande(row: Mapping[str, Any]) -> dict[str, Any]:
    """WinoGrande (arXiv 1907.10641): a sentence with `_`, where one of two names goes."""
    if "_" not in row["sentence"]:
        raise ValueError("'sentence' has no '_'")
    return _choice_question(row["sentence"], (row["option1"], row["option2"]), int(row["answer"]) - 1)


def _mmlu(row: Mapping[str, Any]) -> dict[str, Any]:
    """MMLU (arXiv 2009.03300); the subject is the context."""
    return _choice_question(row["question"], row["choices"], int(row["answer"]), row["subject"])


CHOICE_READERS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "arc": _arc,
    "openbookqa": _openbookqa,
    "boolq": _boolq,
    "framed_query": _framed_query,
    "plain_query": _plain_query,
    "hellaswag": _hellaswag,
    "piqa": _piqa,
    "winogrande": _winogrande,
    "mmlu": _mmlu,
}
