"""The study's figures, one module each, and the styles and command line that they share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from stillhouse.config.base import StrictModel
from stillhouse.reporting.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALETTE,
    PURPLE,
    SKY,
    VERMILLION,
    ConditionStyle,
)

ARM_STYLES = {
    "full_text": ConditionStyle(BLACK, "s"),
    "latent": ConditionStyle(VERMILLION, "D"),
    "byte_budget_compressed": ConditionStyle(BLUE, "o"),
    "byte_budget_cut": ConditionStyle(SKY, "v"),
    "token_budget_content_only": ConditionStyle(GREEN, "^"),
    "token_budget_chat_full": ConditionStyle(GREEN, "<"),
    "no_context": ConditionStyle(GREY, "X"),
    "replay_raw": ConditionStyle(PURPLE, "P"),
    "replay_anchor": ConditionStyle(PURPLE, "p"),
    "replay_adapter": ConditionStyle(PURPLE, "h"),
}
_READER_STYLES = (ConditionStyle(BLUE, "o"), ConditionStyle(VERMILLION, "D"), ConditionStyle(GREEN, "^"))
_CHANNEL_COLOURS = (VERMILLION, PURPLE, ORANGE, GREEN, BLACK, *PALETTE)
_CHANNEL_MARKERS = ("D", "p", "^", "h", "P", "<", ">", "*")


class CurvesStep(StrictModel):
    """The command line of a figure of training: channels' directories, as training left them."""

    channels: Annotated[tuple[Path, ...], Field(min_length=1)]
    output: Annotated[Path, Field(description="The PNG; the SVG is written beside it.")]


def channel_styles(conditions: Sequence[str]) -> dict[str, ConditionStyle]:
    """A colour and a marker for each channel, by its place in the configuration."""
    return {
        condition: ConditionStyle(
            _CHANNEL_COLOURS[place % len(_CHANNEL_COLOURS)], _CHANNEL_MARKERS[place % len(_CHANNEL_MARKERS)]
        )
        for place, condition in enumerate(dict.fromkeys(conditions))
    }


def reader_styles(readers: Sequence[str]) -> dict[str, ConditionStyle]:
    """A colour and a marker for each reader by its place in the pair, and for all of them together."""
    styles = {name: _READER_STYLES[place % len(_READER_STYLES)] for place, name in enumerate(readers)}
    return styles | {"all readers": ConditionStyle(BLACK, "s")}
