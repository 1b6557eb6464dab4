"""The command lines of the step programs that every study has: its figures, and its section with the tables."""

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


class ReportStep(StrictModel):
    """The command line of a report; the items lie beside the results and are named for the workflow's sake."""

    results: Annotated[tuple[Path, ...], Field(min_length=1)]
    item_scores: tuple[Path, ...] = ()
    section: Path
    tables: Annotated[Path, Field(description="Directory for CSV, LaTeX and Markdown, replaced as a whole.")]
