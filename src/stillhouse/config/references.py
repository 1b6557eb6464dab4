"""What a study's section names in the catalogue; the whole configuration checks that it is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Reference:
    """A model or data set by name, and the key below the study's section that names it."""

    kind: Literal["model", "data set"]
    name: str
    location: tuple[str, ...]
