"""Verifiable instructions are scored by the harness's own checks, and what they need is asked for in one line."""

from __future__ import annotations

import json

import pytest

from stillhouse.evaluation.instruction_following import check_instruction_scorer, score_instructions
from stillhouse.runtime.errors import UserError

NO_COMMA = {"id": "punctuation:no_comma", "arguments": {}}
KEYWORDS = {"id": "keywords:existence", "arguments": {"keywords": ["fish"]}}
JSON_FORMAT = {"id": "detectable_format:json_format", "arguments": {}}


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness tries to download a tokenizer on import, which these checks do not use."""
    import nltk

    monkeypatch.setattr(nltk, "download", lambda *arguments, **keywords: False)


@pytest.mark.parametrize(
    ("output", "strict", "loose", "some"),
    [
        ("A fish swims.", True, True, True),
        ("A fish, swims.", False, False, True),
        ("A cod, swims.", False, False, False),
        ("Well, sure:\nA fish swims.", False, True, True),
        ("", False, False, False),
    ],
)
def test_all_constraints_must_hold_and_loose_forgives_a_first_line(
    output: str, strict: bool, loose: bool, some: bool
) -> None:
    score = score_instructions(output, json.dumps([NO_COMMA, KEYWORDS]))
    assert (score.strict_correct, score.flexible_correct, score.wrote_marker) == (strict, loose, some)


def test_scores_equal_the_harness() -> None:
    from lm_eval.tasks.ifeval.utils import process_results

    checks = [NO_COMMA, KEYWORDS, JSON_FORMAT]
    document = {
        "key": 0,
        "prompt": "",
        "instruction_id_list": [check["id"] for check in checks],
        "kwargs": [check["arguments"] for check in checks],
    }
    for output in ('{"a": "fish"}', "fish", '```json\n{"a": "fish, cod"}\n```', "*fish*\n{}"):
        harness = process_results(document, [output])
        score = score_instructions(output, json.dumps(checks))
        assert score.strict_correct == harness["prompt_level_strict_acc"]
        assert score.flexible_correct == harness["prompt_level_loose_acc"]
        assert score.wrote_marker == any(harness["inst_level_strict_acc"])


def test_an_unknown_constraint_is_named() -> None:
    with pytest.raises(UserError, match="unknown constraint 'no:such'"):
        score_instructions("text", json.dumps([{"id": "no:such", "arguments": {}}]))


def test_a_missing_sentence_tokenizer_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    def absent(name: str) -> None:
        raise LookupError(name)

    monkeypatch.setattr(nltk.data, "find", absent)
    with pytest.raises(UserError, match=r"python -m nltk\.downloader punkt_tab"):
        check_instruction_scorer()
