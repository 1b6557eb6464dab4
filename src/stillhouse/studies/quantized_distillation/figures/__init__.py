"""The study's figures, one module each, and the command lines that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from stillhouse.config.base import StrictModel


class FigureStep(StrictModel):
    """The command line of a figure; the items lie beside the results and are named for the workflow's sake."""

    results: Annotated[tuple[Path, ...], Field(min_length=1)]
    item_scores: tuple[Path, ...] = ()
    output: Annotated[Path, Field(description="The PNG; the SVG is written beside it.")]


class CurveStep(StrictModel):
    """The command line of a figure of training: students' directories, as training left them."""

    students: tuple[Path, ...] = ()
    output: Annotated[Path, Field(description="The PNG; the SVG is written beside it.")]
