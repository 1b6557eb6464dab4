"""Shots never hold the example they precede, and each control changes what it says and nothing else."""

from __future__ import annotations

import random

import pytest
from support.tiny_models import word_problems

from stillhouse.data.exemplars import ShotSampler, apply_control, evaluation_shots, wrong_answer
from stillhouse.data.records import MathProblem
from stillhouse.runtime.errors import UserError

PROBLEMS = [MathProblem(str(i), f"question {i}", f"so it is {i}.\n#### {i}") for i in range(40)]


def test_per_example_shots_are_the_published_draw() -> None:
    for index in (0, 7, 39):
        others = [problem for place, problem in enumerate(PROBLEMS) if place != index]
        published = random.Random(42 + index).sample(others, 8)
        shots = ShotSampler(PROBLEMS, 8).draw(index)
        assert [shot.question for shot in shots] == [problem.question for problem in published]


@pytest.mark.parametrize("sampling", ["per_example", "grouped", "fixed"])
def test_no_example_is_taught_with_itself_in_the_prompt(sampling) -> None:
    sampler = ShotSampler(PROBLEMS, 8, sampling, groups=4)
    taught = set(range(len(PROBLEMS))) - sampler.reserved_examples()
    for index in taught:
        shots = sampler.draw(index)
        assert len({shot.question for shot in shots}) == 8
        assert PROBLEMS[index].question not in {shot.question for shot in shots}


def test_a_group_shares_shots_and_contains_none_of_them() -> None:
    sampler = ShotSampler(PROBLEMS, 8, "grouped", groups=4)
    assert sampler.draw(1) == sampler.draw(5) != sampler.draw(2)
    members = {PROBLEMS[index].question for index in range(len(PROBLEMS)) if sampler.group(index) == 1}
    assert not members & {shot.question for shot in sampler.draw(1)}


def test_fixed_shots_are_one_reserved_set() -> None:
    sampler = ShotSampler(PROBLEMS, 8, "fixed")
    reserved = sampler.reserved_examples()
    taught = next(index for index in range(len(PROBLEMS)) if index not in reserved)
    assert {shot.question for shot in sampler.draw(taught)} == {PROBLEMS[index].question for index in reserved}
    with pytest.raises(ValueError, match="cannot be taught with itself"):
        sampler.draw(min(reserved))


@pytest.mark.parametrize(
    ("sampling", "groups", "available"),
    [("per_example", 16, 5), ("grouped", 2, 3), ("grouped", 1, 0), ("fixed", 16, 5)],
)
def test_fewer_examples_than_shots_is_an_error_with_both_numbers(sampling, groups, available) -> None:
    with pytest.raises(UserError, match=f"context.shots is 8 but only {available} of 6 training examples"):
        ShotSampler(PROBLEMS[:6], 8, sampling, groups)


def test_few_shot_evaluation_names_both_numbers_too() -> None:
    with pytest.raises(UserError, match="asks for 8 shots but the training set has 6 examples"):
        evaluation_shots(PROBLEMS[:6], 8, seed=0)


def test_evaluation_shots_are_fixed_by_their_seed() -> None:
    assert evaluation_shots(PROBLEMS, 4, seed=1) == evaluation_shots(PROBLEMS, 4, seed=1)
    assert evaluation_shots(PROBLEMS, 4, seed=1) != evaluation_shots(PROBLEMS, 4, seed=2)


@pytest.mark.parametrize("shots", [2, 3, 8])
def test_shuffled_answers_are_a_derangement(shots) -> None:
    for seed in range(50):
        drawn = apply_control(PROBLEMS[:shots], "shuffled_answers", random.Random(seed))
        assert {shot.answer for shot in drawn} == {problem.answer for problem in PROBLEMS[:shots]}
        assert all(shot.answer != problem.answer for shot, problem in zip(drawn, PROBLEMS, strict=False))


def test_the_published_permutation_may_leave_answers_in_place() -> None:
    draws = [apply_control(PROBLEMS[:4], "shuffled_answers_as_published", random.Random(seed)) for seed in range(50)]
    fixed = [sum(s.answer == p.answer for s, p in zip(drawn, PROBLEMS, strict=False)) for drawn in draws]
    assert min(fixed) == 0 and max(fixed) > 0


def test_one_shot_cannot_be_shuffled() -> None:
    with pytest.raises(UserError, match="2 shots or more, but shots is 1"):
        ShotSampler(PROBLEMS, 1, exemplars="shuffled_answers")


@pytest.mark.parametrize("exemplars", ["question_only", "wrong_answers", "shuffled_answers"])
def test_a_control_shows_the_same_questions_as_the_worked_shots(exemplars) -> None:
    worked, control = ShotSampler(PROBLEMS, 8), ShotSampler(PROBLEMS, 8, exemplars=exemplars)
    assert [shot.question for shot in worked.draw(3)] == [shot.question for shot in control.draw(3)]


def test_a_wrong_answer_is_wrong_and_consistent() -> None:
    problem = MathProblem("a", "q", "He has 12 + 1,200 = <<12+1200=1212>>1,212 cows, not 12120 or 1212.5.\n#### 1,212")
    for seed in range(20):
        text = wrong_answer(problem, random.Random(seed))
        number = text.rpartition("#### ")[2]
        assert number != "1,212" and "," in number
        plain = number.replace(",", "")
        assert text == f"He has 12 + 1,200 = <<12+1200={plain}>>{number} cows, not 12120 or 1212.5.\n#### {number}"


def test_a_wrong_answer_keeps_sign_and_decimals() -> None:
    for seed in range(20):
        generator = random.Random(seed)
        assert float(wrong_answer(MathProblem("a", "q", "#### 0.50"), generator)[5:]) % 1 == 0.5
        assert int(wrong_answer(MathProblem("a", "q", "#### 2"), generator)[5:]) >= 0


def test_a_wrong_answer_needs_the_final_number() -> None:
    with pytest.raises(UserError, match="no '#### <number>'"):
        wrong_answer(MathProblem("a", "q", "five"), random.Random(0))


def test_every_made_up_problem_can_be_answered_wrongly() -> None:
    for problem in (MathProblem(**row) for row in word_problems(50)):
        wrong = wrong_answer(problem, random.Random(1))
        assert wrong.rpartition("####")[2] != problem.answer.rpartition("####")[2]
