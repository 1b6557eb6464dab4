"""The study's figures, one module each: a step program that reads metrics files and imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from stillhouse.config.base import StrictModel


class CurvesStep(StrictModel):
    """The command line of figures of the training: the lenses' directories."""

    lenses: Annotated[tuple[Path, ...], Field(min_length=1)]
    output: Annotated[Path, Field(description="The PNG; the SVG is written beside it.")]
