"""Answers in generated text, and whether they are right: `####` numbers, option letters, boxed expressions.

Pure functions of strings; imports no torch. Strict and flexible scores are kept apart everywhere: strict counts
only what the model marked as its answer, flexible takes the last thing in the text that could be one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

# A number as people write it: `1,200` is one number, `1,2` two; a minus between two operands is no sign (`5-3`).
_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
_SIGN = r"[-+\u2212]?\$?[-+\u2212]?"
_MARKED_NUMBER = re.compile(rf"####\s*({_SIGN}{_UNSIGNED})")
_ANY_NUMBER = re.compile(rf"(?<![\w.]){_SIGN}{_UNSIGNED}|{_UNSIGNED}")
_PUBLISHED = re.compile(r"####\s*([\d,]+)")
_MARKED_LETTER = re.compile(r"####\s*\(?([A-Z])\b", re.IGNORECASE)
_ANY_LETTER = re.compile(r"(?<![A-Za-z'])([B-HJ]|A(?! [a-z]))(?![A-Za-z'])")  # not the words `A ...` and `I`


@dataclass(frozen=True)
class AnswerScore:
    """One output against one gold answer; `wrote_marker`: the output contains `####` (MATH: `\\boxed`)."""

    strict_correct: bool
    flexible_correct: bool
    wrote_marker: bool


def wrote_marker(text: str) -> bool:
    """Whether the text contains GSM8K's answer marker, with or without a number behind it."""
    return "####" in text


def normalise_number(text: str) -> Decimal | None:
    """The number a string denotes (`$1,200.00` equals `1200`, `+.5` equals `0.5`); None where it denotes none."""
    plain = re.sub(r"[,$\s+]", "", text).replace("\u2212", "-").rstrip(".")
    return Decimal(plain) if re.fullmatch(r"-?(?:\d+(?:\.\d*)?|\.\d+)", plain) else None


def strict_answer(text: str) -> Decimal | None:
    """The number directly after the first `####`, None where there is none.

    The first, because a model that runs on after its answer invents further questions.
    """
    match = _MARKED_NUMBER.search(text)
    return normalise_number(match.group(1)) if match else None


def flexible_answer(text: str) -> Decimal | None:
    """The last number in the text, marked or not."""
    numbers = _ANY_NUMBER.findall(text)
    return normalise_number(numbers[-1]) if numbers else None


def published_answer(text: str) -> str | None:
    """The published scorer, for `as_published`: digits and commas after the first `####`, commas removed.

    It sees no sign and cuts decimals: `#### -5` yields None and `#### 2.50` yields "2".
    """
    match = _PUBLISHED.search(text)
    return match.group(1).replace(",", "") if match else None


def published_correct(output: str, gold: str) -> bool:
    """Whether the published scorer accepts the output: both sides parsed by it and equal as strings."""
    answer = published_answer(output)
    return answer is not None and answer == published_answer(gold)


def score_math_answer(output: str, gold: str) -> AnswerScore:
    """Score an output against a GSM8K gold answer, which ends in `#### N` or is the number alone.

    Raises ValueError where the gold answer holds no number.
    """
    target = strict_answer(gold) if wrote_marker(gold) else normalise_number(gold)
    if target is None:
        raise ValueError(f"gold answer without a number: {gold[-60:]!r}")
    strict, flexible = strict_answer(output) == target, flexible_answer(output) == target
    return AnswerScore(strict, flexible, wrote_marker(output))


def score_choice_answer(output: str, gold: str) -> AnswerScore:
    """Score a multiple-choice output: strict takes the letter after `####`, flexible the last lone letter."""
    target = (strict_choice(gold) or gold.strip().strip("().")).upper()
    strict, flexible = strict_choice(output) == target, flexible_choice(output) == target
    return AnswerScore(strict, flexible, wrote_marker(output))


def strict_choice(text: str) -> str | None:
    """The option letter after the first `####`, upper case."""
    match = _MARKED_LETTER.search(text)
    return match.group(1).upper() if match else None


def flexible_choice(text: str) -> str | None:
    """The last upper-case option letter that stands alone, in parentheses or not."""
    letters = _ANY_LETTER.findall(text)
    return letters[-1] if letters else None


def score_boxed_answer(output: str, gold: str) -> AnswerScore:
    """Score a MATH output: strict compares the last `\\boxed{...}`, flexible also what follows `####`."""
    target = normalise_expression(boxed_answer(gold) or gold)
    boxed = boxed_answer(output)
    strict = boxed is not None and normalise_expression(boxed) == target
    marked = output.rsplit("####", 1)[1] if wrote_marker(output) else ""
    flexible = strict or normalise_expression(boxed_answer(marked) or marked) == target
    return AnswerScore(strict, flexible, boxed is not None)


def boxed_answer(text: str) -> str | None:
    """The content of the last `\\boxed{...}` or `\\fbox{...}`, braces balanced; None if absent or unclosed."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position]
    return None


def normalise_expression(expression: str) -> str:
    """A LaTeX answer with spacing, wrappers, delimiters and number formats made equal (after Hendrycks 2021).

    Compares strings, not values: `1/2` and `\\frac12` agree, `0.5` and `\\frac{1}{2}` do not.
    """
    text = expression.strip().strip("$").rstrip(".")
    text = re.sub(r"\\(?:left|right|displaystyle|!|,|;|:| )", "", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\{\s*([^}]*?)\s*\}", r"\1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac\s*(\w)\s*(\w)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"^(-?\w+)\s*/\s*(\w+)$", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\^\s*\{?\\circ\}?|\\%|%|\\\$", "", text)
    text = re.sub(r"\s+", "", text)
    number = normalise_number(text)
    return text if number is None else format(number.normalize(), "f")
