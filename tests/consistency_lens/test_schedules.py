"""Schedules: the published durations, values clamped at the end, and faults told by their position."""

from __future__ import annotations

import math

import pytest
from pydantic import TypeAdapter, ValidationError

from stillhouse.studies.consistency_lens.schedules import (
    Duration,
    Phase,
    Schedule,
    ScheduleSyntaxError,
    ScheduleText,
    parse_schedule,
)


def test_a_text_is_a_start_value_and_phases_in_steps_and_epochs() -> None:
    assert parse_schedule("1.0, hold 1000s, cosine to 0.1 over 0.5e") == Schedule(
        1.0,
        (Phase("hold", 1.0, Duration(1000, "s")), Phase("cosine", 0.1, Duration(0.5, "e"))),
    )
    assert parse_schedule("2e-3") == Schedule(2e-3)


def test_a_phase_reaches_its_target_at_its_last_update_and_the_end_is_clamped() -> None:
    schedule = parse_schedule("0, linear to 1 over 4s")
    assert [schedule.value(step, 100) for step in (1, 2, 3, 4, 5, 10**9)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_an_epoch_is_as_long_as_the_data() -> None:
    schedule = parse_schedule("0, hold 0.5e, linear to 1 over 0.5e")
    assert [schedule.value(step, 8) for step in (1, 4, 5, 6, 8, 9)] == [0, 0, 0.25, 0.5, 1, 1]
    assert schedule.value(3, 2) == 1


def test_shapes_pass_through_their_half_way_values() -> None:
    def half_way(shape: str) -> float:
        return parse_schedule(f"1, {shape} to 0.01 over 10s").value(5, 1)

    assert half_way("linear") == pytest.approx(0.505)
    assert half_way("cosine") == pytest.approx(0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert half_way("exponential") == pytest.approx(0.1)


def test_a_phase_without_length_is_a_jump() -> None:
    assert parse_schedule("1, linear to 5 over 0s, hold 3s").value(1, 1) == 5


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("", 1, "expected a start value, the text ends"),
        ("fast", 1, "expected a start value, a number, found 'fast'"),
        ("nan", 1, "a number"),
        ("1 linear to 0 over 5s", 3, "expected ',' or the end"),
        ("1, cosin to 0 over 5s", 4, "expected one of hold, linear, cosine, exponential, found 'cosin to 0 over 5s'"),
        ("1, linear 0 over 5s", 11, "expected 'to'"),
        ("1, linear to 0 over 5", 22, "expected the unit s (updates) or e (epochs), the text ends"),
        ("1, linear to 0 over 5m", 22, "expected the unit s (updates) or e (epochs), found 'm'"),
        ("1, linear to 0 over", 20, "expected a duration such as 1000s (updates) or 0.5e (epochs), the text ends"),
        ("1, hold -5s", 9, "expected a duration"),
        ("1, hold 5s,", 12, "expected one of hold"),
        ("0, exponential to 1 over 5s", 4, "exponential needs values above 0"),
    ],
)
def test_a_fault_names_its_position(text: str, position: int, message: str) -> None:
    with pytest.raises(ScheduleSyntaxError) as error:
        parse_schedule(text)
    assert error.value.position + 1 == position
    assert f"position {position}: " in str(error.value) and message in str(error.value)


def test_a_setting_keeps_the_text_and_refuses_what_does_not_parse() -> None:
    adapter = TypeAdapter(ScheduleText)
    assert adapter.validate_python("1, hold 5s") == "1, hold 5s"
    with pytest.raises(ValidationError, match="position 4"):
        adapter.validate_python("1, wait 5s")
