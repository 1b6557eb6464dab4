"""The study's figures, one module each, and the styles and command lines that they share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated

from matplotlib.axes import Axes
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
    YELLOW,
    ConditionStyle,
)
from stillhouse.studies.lora_generation.config import Arm

ARM_STYLES: dict[Arm, ConditionStyle] = {
    "base": ConditionStyle(GREY, "o"),
    "generated": ConditionStyle(VERMILLION, "D"),
    "teacher": ConditionStyle(BLACK, "s"),
    "mean_adapter": ConditionStyle(SKY, "v"),
    "nearest_adapter": ConditionStyle(BLUE, "^"),
    "other_task": ConditionStyle(PURPLE, "X"),
    "in_context": ConditionStyle(ORANGE, "P"),
    "few_prompt_lora": ConditionStyle(GREEN, "p"),
}
_MARKERS = ("o", "D", "^", "s", "v", "P", "X", "p")
_COLOURS = tuple(colour for colour in PALETTE if colour != YELLOW)  # yellow is too faint for small marks


class CurvesStep(StrictModel):
    """The command line of a figure of training: generators' directories, as training left them."""

    generators: Annotated[tuple[Path, ...], Field(min_length=1)]
    output: Annotated[Path, Field(description="The PNG; the SVG is written beside it.")]


def named_styles(names: Sequence[str]) -> dict[str, ConditionStyle]:
    """A colour and a marker for each task or condition, by its place in the configuration."""
    return {
        name: ConditionStyle(_COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)])
        for place, name in enumerate(dict.fromkeys(names))
    }


def draw_values(axes: Axes, place: int, values: Sequence[float], style: ConditionStyle) -> None:
    """A pale point for each held-out adapter and seed, and a dark one for their mean; nothing where there is none."""
    if values:
        axes.scatter(values, [place] * len(values), color=style.colour, marker=style.marker, s=18, alpha=0.35)
        axes.scatter([fmean(values)], [place], color=style.colour, marker=style.marker, s=46)
