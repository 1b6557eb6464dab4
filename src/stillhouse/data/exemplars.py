"""Which worked examples a prompt shows, and their controls.

Shots come from the training set and never hold the example that they precede. `per_example` is the published
draw, `random.Random(seed + index)`. `grouped` sorts examples into groups (index modulo the number of groups) that
share one draw from outside the group. `fixed` reserves the first shots of a shuffled order for all examples; the
reserved ones must not be taught, which `reserved_examples` tells.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import Literal

from stillhouse.data.records import Problem
from stillhouse.runtime.errors import UserError

Sampling = Literal["per_example", "grouped", "fixed"]
Exemplars = Literal["worked", "question_only", "shuffled_answers", "shuffled_answers_as_published", "wrong_answers"]
_FINAL_NUMBER = re.compile(r"####\s*(-?[\d,]*\.?\d+)")


@dataclass(frozen=True)
class Shot:
    """One example in a prompt; without an answer it is the question-only control."""

    question: str
    answer: str | None


@dataclass(frozen=True)
class ShotSampler:
    """Draws the shots of every example of a training set, as `sampling` and `exemplars` say."""

    problems: Items[Problem]
    shots: int
    sampling: Sampling = "per_example"
    groups: int = 16
    exemplars: Exemplars = "worked"
    seed: int = 42

    def __post_init__(self) -> None:
        smallest = len(self.problems) - 1
        if self.sampling == "grouped":
            largest_group = -(-len(self.problems) // self.groups)
            smallest = len(self.problems) - largest_group
        if self.shots and smallest < self.shots:
            raise UserError(
                f"context.shots is {self.shots} but only {max(smallest, 0)} of {len(self.problems)} training "
                f"examples can be shown ({self.sampling} sampling leaves out what is being taught): "
                "lower shots or use more examples"
            )
        if self.exemplars.startswith("shuffled") and self.shots == 1:
            raise UserError("context.exemplars: answers can be shuffled among 2 shots or more, but shots is 1")

    def group(self, index: int) -> int | None:
        """Which examples share one set of shots with example `index`; None where each has its own."""
        return {"per_example": None, "grouped": index % self.groups, "fixed": 0}[self.sampling]

    def reserved_examples(self) -> frozenset[int]:
        """Examples that serve as the fixed shots of all others and are therefore not taught."""
        if self.sampling != "fixed":
            return frozenset()
        order = list(range(len(self.problems)))
        random.Random(self.seed).shuffle(order)
        return frozenset(order[: self.shots])

    def draw(self, index: int) -> list[Shot]:
        """The shots that precede example `index`. Raises ValueError for a reserved example."""
        count = len(self.problems)
        group = self.group(index)
        if group is None:
            # Sampling positions of the list without `index`, and then shifting, draws what the published code does.
            generator = random.Random(self.seed + index)
            chosen = [place + (place >= index) for place in generator.sample(range(count - 1), self.shots)]
        elif self.sampling == "grouped":
            generator = random.Random(self.seed + group)
            others = [place for place in range(count) if place % self.groups != group]
            chosen = generator.sample(others, self.shots)
        else:
            if index in self.reserved_examples():
                raise ValueError(f"example {index} is one of the fixed shots and cannot be taught with itself")
            generator = random.Random(self.seed)
            order = list(range(count))
            generator.shuffle(order)
            chosen = order[: self.shots]
        return apply_control([self.problems[place] for place in chosen], self.exemplars, generator)


def evaluation_shots(train_problems: Items[Problem], count: int, seed: int) -> list[Shot]:
    """One fixed set of worked shots for few-shot evaluation, drawn from the training set."""
    if len(train_problems) < count:
        raise UserError(
            f"few-shot evaluation asks for {count} shots but the training set has {len(train_problems)} examples"
        )
    return apply_control(random.Random(seed).sample(list(train_problems), count), "worked", random.Random(seed))


def apply_control(problems: Items[Problem], exemplars: Exemplars, generator: random.Random) -> list[Shot]:
    """Turn chosen problems into shots: as they are, or as one of the controls."""
    shots = [Shot(problem.question, problem.answer) for problem in problems]
    if exemplars == "worked":
        return shots
    if exemplars == "question_only":
        return [replace(shot, answer=None) for shot in shots]
    if exemplars == "wrong_answers":
        return [
            replace(shot, answer=wrong_answer(problem, generator))
            for shot, problem in zip(shots, problems, strict=True)
        ]
    order = list(range(len(shots)))
    generator.shuffle(order)
    while exemplars == "shuffled_answers" and any(place == own for own, place in enumerate(order)):
        generator.shuffle(order)
    return [replace(shot, answer=shots[place].answer) for shot, place in zip(shots, order, strict=True)]


def wrong_answer(problem: Problem, generator: random.Random) -> str:
    """The worked answer with its final number changed wherever it occurs, so that the text stays consistent.

    Raises UserError for an answer without `#### <number>`.
    """
    found = _FINAL_NUMBER.search(problem.answer)
    try:
        number = Decimal(found.group(1).replace(",", "")) if found else None
    except InvalidOperation:
        number = None
    if number is None:
        raise UserError(
            f"{problem.id}: the answer has no '#### <number>', which wrong_answers replaces: "
            "mend the record or choose other exemplars"
        )
    offset = generator.choice([step for step in range(-9, 10) if step and (number < 0 or number + step >= 0)])
    spellings = "|".join(re.escape(text) for text in {f"{number}", f"{number:,}"})
    pattern = re.compile(rf"(?<![\d.,])(?:{spellings})(?!\d|[.,]\d)")
    return pattern.sub(
        lambda match: f"{number + offset:,}" if "," in match.group() else f"{number + offset}", problem.answer
    )
