"""Answer extraction: cases by hand, and agreement with lm-eval's GSM8K task where the two should agree."""

from __future__ import annotations

from decimal import Decimal
from importlib.resources import files
from typing import Any

import pytest
import yaml

from stillhouse.evaluation.scorers import (
    AnswerScore,
    boxed_answer,
    flexible_answer,
    flexible_choice,
    normalise_expression,
    normalise_number,
    published_answer,
    published_correct,
    score_boxed_answer,
    score_choice_answer,
    score_math_answer,
    strict_answer,
    strict_choice,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", "18"),
        ("1,200", "1200"),
        ("$1,200.00", "1200"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("\u22125", "-5"),
        ("+.5", "0.5"),
        ("12.", "12"),
        ("2.50", "2.5"),
        ("007", "7"),
    ],
)
def test_writings_of_one_number_are_equal(text: str, number: str) -> None:
    assert normalise_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "-", "1.2.3", "five", "1/2", "5%"])
def test_what_is_no_number_is_none(text: str) -> None:
    assert normalise_number(text) is None


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("It is 3+4=7.\n#### 7", 7, 7),
        ("####7", 7, 7),
        ("#### $1,200.50 a year", "1200.50", "1200.50"),
        ("#### -3", -3, -3),
        ("#### 5.", 5, 5),
        ("#### 5\n\nQuestion: Tom has 9 books", 5, 9),
        ("#### Answer: 5", None, 5),
        ("#### Steps\n1. add\n#### 8", 8, 8),
        ("The answer is 12 apples", None, 12),
        ("so 10-3", None, 3),
        ("so 10 - 3", None, 3),
        ("it fell to -3", None, -3),
        ("pick 1,2", None, 2),
        ("no number", None, None),
        ("", None, None),
    ],
)
def test_strict_takes_the_marked_number_and_flexible_the_last(text: str, strict: Any, flexible: Any) -> None:
    assert strict_answer(text) == (None if strict is None else Decimal(strict))
    assert flexible_answer(text) == (None if flexible is None else Decimal(flexible))


def test_the_published_scorer_sees_no_sign_and_cuts_decimals() -> None:
    assert published_answer("#### 1,200") == "1200"
    assert published_answer("#### -5") is None
    assert published_answer("#### 2.50") == "2"
    assert (
        published_correct("#### 2.75", "... #### 2.50")
        and not score_math_answer("#### 2.75", "#### 2.50").strict_correct
    )


def test_a_score_keeps_strict_flexible_and_marker_apart() -> None:
    gold = "She has 3+4=<<3+4=7>>7.\n#### 7"
    assert score_math_answer("#### 7.0", gold) == AnswerScore(True, True, True)
    assert score_math_answer("It is 7", gold) == AnswerScore(False, True, False)
    assert score_math_answer("#### seven, no, 8", gold) == AnswerScore(False, False, True)
    assert score_math_answer("7", "7").flexible_correct


def test_a_gold_answer_without_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="without a number"):
        score_math_answer("#### 7", "#### seven")


class LmEvalGsm8k:
    """lm-eval's own task file, filters and metric for GSM8K."""

    def __init__(self) -> None:
        text = files("lm_eval").joinpath("tasks/gsm8k/gsm8k.yaml").read_text()
        task = yaml.safe_load(text)
        self.patterns = {entry["name"]: entry["filter"][0] for entry in task["filter_list"]}
        (metric,) = task["metric_list"]
        self.options = {key: metric[key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}

    def correct(self, name: str, output: str, gold: str) -> bool:
        """Whether the task's filter `name` and its exact match accept the output."""
        from lm_eval.api.metrics import exact_match_hf_evaluate
        from lm_eval.filters.extraction import RegexFilter

        options = {key: value for key, value in self.patterns[name].items() if key != "function"}
        ((answer,),) = RegexFilter(**options).apply([[output]], [{}])
        return bool(exact_match_hf_evaluate([answer], [gold], **self.options)["exact_match"])


@pytest.fixture(scope="module")
def lm_eval_gsm8k() -> LmEvalGsm8k:
    pytest.importorskip("lm_eval")
    return LmEvalGsm8k()


GOLD = "He pays 3*6=<<3*6=18>>18 dollars.\n#### 18"
SAME_AS_LM_EVAL = [
    (GOLD, GOLD),
    ("#### 18", GOLD),
    ("#### $18", GOLD.replace("18", "19")),
    ("so the answer is 18.", GOLD),
    ("#### 17", GOLD),
    ("#### 18\n\nThat took 3 steps, 42 in all", GOLD),
    ("#### 1,218", "#### 1218"),
    ("It costs $1,218.", "#### 1,218"),
    ("#### -5", "#### -5"),
    ("nothing at all", GOLD),
    ("#### 3\n#### 18", GOLD),
]


@pytest.mark.parametrize(("output", "gold"), SAME_AS_LM_EVAL)
def test_scores_agree_with_lm_eval(output: str, gold: str, lm_eval_gsm8k: LmEvalGsm8k) -> None:
    score = score_math_answer(output, gold)
    assert score.strict_correct == lm_eval_gsm8k.correct("strict-match", output, gold)
    assert score.flexible_correct == lm_eval_gsm8k.correct("flexible-extract", output, gold)


@pytest.mark.parametrize(
    ("output", "filter_name", "ours", "why"),
    [
        ("####18", "strict-match", True, "lm-eval demands the space, the published scorer does not"),
        ("#### $18", "strict-match", True, "lm-eval takes no currency sign after the marker"),
        ("#### 18.0", "strict-match", True, "lm-eval compares strings, Stillhouse numbers"),
        ("20-18", "flexible-extract", True, "a minus between operands is no sign"),
        ("it is 18 ...", "flexible-extract", True, "lm-eval takes a run of full stops for a number"),
    ],
)
def test_each_difference_from_lm_eval_is_deliberate(
    output: str, filter_name: str, ours: bool, why: str, lm_eval_gsm8k: LmEvalGsm8k
) -> None:
    score = score_math_answer(output, GOLD)
    assert (score.strict_correct if filter_name == "strict-match" else score.flexible_correct) == ours, why
    assert lm_eval_gsm8k.correct(filter_name, output, GOLD) != ours, why


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### B", "B", "B"),
        ("####(c) because", "C", None),
        ("The answer is (D).", None, "D"),
        ("I think A cat is B", None, "B"),
        ("I would say A", None, "A"),
        ("Because", None, None),
    ],
)
def test_option_letters_are_found(text: str, strict: str | None, flexible: str | None) -> None:
    assert (strict_choice(text), flexible_choice(text)) == (strict, flexible)


def test_choices_are_scored_against_a_marked_or_plain_letter() -> None:
    assert score_choice_answer("#### B", "It is B.\n#### B") == AnswerScore(True, True, True)
    assert score_choice_answer("(B)", "B") == AnswerScore(False, True, False)


def test_the_last_boxed_expression_is_taken_with_its_braces() -> None:
    assert boxed_answer(r"first \boxed{1}, then $\boxed{\frac{1}{\sqrt{2}}}$.") == r"\frac{1}{\sqrt{2}}"
    assert boxed_answer(r"\boxed{1") is None
    assert boxed_answer("none") is None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (r"\dfrac{1}{2}", "1/2"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"1,\!000", "1000"),
        (r"\left( 3, 4 \right)", "(3,4)"),
        (r"90^\circ", "90"),
        (r"\text{east}", "east"),
        (r"12\%", "12"),
        ("0.50", ".5"),
        (r"\$18.00", "18"),
    ],
)
def test_writings_of_one_expression_are_equal(first: str, second: str) -> None:
    assert normalise_expression(first) == normalise_expression(second)


def test_boxed_answers_are_strict_and_marked_ones_flexible() -> None:
    gold = r"So the area is $\boxed{\frac{3}{4}}$."
    assert score_boxed_answer(r"\boxed{3/4}", gold) == AnswerScore(True, True, True)
    assert score_boxed_answer("#### 3/4", gold) == AnswerScore(False, True, False)
    assert score_boxed_answer("3/4 or so", gold) == AnswerScore(False, False, False)
