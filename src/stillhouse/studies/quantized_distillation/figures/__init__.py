"""The study's figures, one module each, and the command line of those of training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from stillhouse.config.base import StrictModel


class CurveStep(StrictModel):
    """The command line of a figure of training: students' directories, as training left them."""

    students: tuple[Path, ...] = ()
    output: Annotated[Path, Field(description="The PNG; the SVG is written beside it.")]
