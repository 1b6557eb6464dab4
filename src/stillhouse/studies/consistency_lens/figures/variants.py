"""How each variant, and what a condition explains, is shown in all figures of the evaluations."""

from __future__ import annotations

from stillhouse.reporting.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILLION, ConditionStyle
from stillhouse.studies.consistency_lens.comparisons import Subject
from stillhouse.studies.consistency_lens.results import LENS

VARIANT_STYLES = {
    LENS: ConditionStyle(VERMILLION, "D"),
    "mean": ConditionStyle(BLACK, "s"),
    "zero": ConditionStyle(BLACK, "o"),
    "original_tokens": ConditionStyle(BLUE, "^"),
    "shuffled": ConditionStyle(PURPLE, "X"),
    "other_explanation": ConditionStyle(PURPLE, "P"),
    "hard_coded": ConditionStyle(ORANGE, "h"),
    "text_continuation": ConditionStyle(SKY, "<"),
    "text_regression": ConditionStyle(GREEN, "v"),
    "untrained": ConditionStyle(GREY, "p"),
}


def heading(subject: Subject) -> str:
    """A condition with what it explains, above its panels."""
    facts = subject.facts
    return f"{subject.evaluation.results.model}, {facts.condition}: layer {facts.layer}, {facts.text_length} tokens"
