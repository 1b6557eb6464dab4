"""Schedules as text: what temperature, alpha, learning rate and unfreezing follow over a run.

    1.0, hold 100s, cosine to 0.1 over 0.5e

A start value, then phases that follow one another: `hold DURATION`, or `linear|cosine|exponential to VALUE over
DURATION`. A duration is a number of updates (`1000s`) or of epochs (`0.5e`), as in the published configurations.
After its last phase a schedule stays at its last value. Stands between the configuration, which parses, and the
training step, which knows how long an epoch is; imports no torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator

Shape = Literal["hold", "linear", "cosine", "exponential"]
SHAPES: tuple[Shape, ...] = ("hold", "linear", "cosine", "exponential")
_TOKEN = re.compile(r"[^\s,]+|,")
_DURATION = re.compile(r"(\d+(?:\.\d+)?|\.\d+)(.*)")


class ScheduleSyntaxError(ValueError):
    """A text that is no schedule; the message gives the position of the fault, counted from 1."""

    def __init__(self, text: str, position: int, expected: str) -> None:
        found = f"found '{rest}'" if (rest := text[position:].split(",")[0].strip()) else "the text ends"
        super().__init__(f"schedule '{text}': position {position + 1}: expected {expected}, {found}")
        self.position = position


@dataclass(frozen=True)
class Duration:
    """A number of updates (`s`) or of epochs (`e`)."""

    amount: float
    unit: Literal["s", "e"]

    def steps(self, steps_per_epoch: float) -> float:
        """The duration in updates."""
        return self.amount * (steps_per_epoch if self.unit == "e" else 1)


@dataclass(frozen=True)
class Phase:
    """One stretch of a schedule: how it goes to `target`, and for how long."""

    shape: Shape
    target: float
    duration: Duration


@dataclass(frozen=True)
class Schedule:
    """A start value and the phases after it."""

    start: float
    phases: tuple[Phase, ...] = ()

    @property
    def values(self) -> tuple[float, ...]:
        """The start and every phase's target; all values lie between two neighbours of these."""
        return (self.start, *(phase.target for phase in self.phases))

    def value(self, step: int, steps_per_epoch: float) -> float:
        """The value for update `step`, counted from 1. A phase of n updates reaches its target at its n-th."""
        value, elapsed = self.start, float(step)
        for phase in self.phases:
            length = phase.duration.steps(steps_per_epoch)
            if elapsed < length:
                return _between(phase.shape, value, phase.target, elapsed / length)
            value, elapsed = phase.target, elapsed - length
        return value


def parse_schedule(text: str) -> Schedule:
    """Read a schedule; raises `ScheduleSyntaxError`, a ValueError, naming the position of the fault."""
    words = _Words(text)
    start = words.number("a start value")
    phases: list[Phase] = []
    while words.next_is(","):
        phases.append(_phase(words, phases[-1].target if phases else start))
    words.end()
    return Schedule(start, tuple(phases))


def _phase(words: _Words, value: float) -> Phase:
    position = words.position
    shape = words.choice(SHAPES)
    if shape == "hold":
        return Phase(shape, value, words.duration())
    words.keyword("to")
    target = words.number("a target value")
    words.keyword("over")
    if shape == "exponential" and (value <= 0 or target <= 0):
        raise ScheduleSyntaxError(words.text, position, "linear or cosine (exponential needs values above 0)")
    return Phase(shape, target, words.duration())


class _Words:
    """The words of a schedule's text, read from left to right."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._words = list(_TOKEN.finditer(text))
        self._index = 0

    @property
    def position(self) -> int:
        return self._words[self._index].start() if self._index < len(self._words) else len(self.text)

    def next_is(self, word: str) -> bool:
        if self._index < len(self._words) and self._words[self._index].group() == word:
            self._index += 1
            return True
        return False

    def keyword(self, word: str) -> None:
        if not self.next_is(word):
            raise self.fault(f"'{word}'")

    def choice(self, words: tuple[Shape, ...]) -> Shape:
        for word in words:
            if self.next_is(word):
                return word
        raise self.fault(f"one of {', '.join(words)}")

    def number(self, what: str) -> float:
        word = self._take(what)
        try:
            value = float(word.group())
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ScheduleSyntaxError(self.text, word.start(), f"{what}, a number")
        return value

    def duration(self) -> Duration:
        what = "a duration such as 1000s (updates) or 0.5e (epochs)"
        word = self._take(what)
        match = _DURATION.fullmatch(word.group())
        if match is None:
            raise ScheduleSyntaxError(self.text, word.start(), what)
        if match[2] not in ("s", "e"):
            raise ScheduleSyntaxError(self.text, word.start() + match.start(2), "the unit s (updates) or e (epochs)")
        return Duration(float(match[1]), "s" if match[2] == "s" else "e")

    def end(self) -> None:
        if self._index < len(self._words):
            raise self.fault("',' or the end")

    def fault(self, expected: str) -> ScheduleSyntaxError:
        return ScheduleSyntaxError(self.text, self.position, expected)

    def _take(self, what: str) -> re.Match[str]:
        if self._index == len(self._words):
            raise self.fault(what)
        self._index += 1
        return self._words[self._index - 1]


def _between(shape: Shape, start: float, target: float, progress: float) -> float:
    """The value at `progress` in [0, 1) of a phase."""
    if shape == "exponential":
        return start * (target / start) ** progress
    share = 0.5 * (1 - math.cos(math.pi * progress)) if shape == "cosine" else progress
    return start + (target - start) * share


def _checked(text: str) -> str:
    parse_schedule(text)
    return text


ScheduleText = Annotated[str, AfterValidator(_checked)]
