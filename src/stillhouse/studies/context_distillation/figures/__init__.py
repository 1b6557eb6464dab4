"""The study's figures, one module each, and the frame and command line that they share."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Annotated

from matplotlib.figure import Figure
from pydantic import Field

from stillhouse.config.base import StrictModel
from stillhouse.reporting.style import figure, save_figure


class FigureStep(StrictModel):
    """The command line of a figure; the items lie beside the results and are named for the workflow's sake."""

    results: Annotated[tuple[Path, ...], Field(min_length=1)]
    item_scores: tuple[Path, ...] = ()
    output: Annotated[Path, Field(description="The PNG; the SVG is written beside it.")]


def draw_frame(drawing: Figure, title: str, note: str) -> None:
    """The message above a figure and the small print below it, wrapped to its width."""
    width = int(drawing.get_figwidth() * 17)
    drawing.suptitle(fill(title, int(width * 0.6)), x=0.01, ha="left", fontsize=11, fontweight="bold")
    drawing.supxlabel(fill(note, width), x=0.01, ha="left", fontsize=8)


def draw_notice(output: Path, text: str) -> None:
    """A figure that says why there is nothing to draw, so that a small configuration still makes every target."""
    with figure(7, 1.2) as drawing:
        drawing.text(0.5, 0.5, text, ha="center", va="center")
        save_figure(drawing, output)
