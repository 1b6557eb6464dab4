"""What a student's training leaves for figures: its measures before training and at each saved checkpoint.

No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json, verify_manifest

MEASURES = ("perplexity", "validation_kl", "validation_agreement")


@dataclass(frozen=True)
class Point:
    """The measures at one step; 0 is before training."""

    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class Curve:
    """One student's measures over its training."""

    model: str
    condition: str
    seed: int
    teacher_perplexity: float
    points: tuple[Point, ...]


def read_curve(student: Path) -> Curve:
    """What a student's directory says; `UserError` where its metrics are missing or damaged."""
    verify_manifest(student, "*.json*")
    record: dict[str, Any] = read_json(student / "run.json")
    path = student / "metrics.jsonl"
    try:
        rows = pd.read_json(path, lines=True)
        saved = rows[rows["perplexity"].notna()]
        points = [Point(int(row["step"]), {name: float(row[name]) for name in MEASURES}) for _, row in saved.iterrows()]
        before = record["validation"]["before"]
        teacher = float(record["validation"]["teacher"]["perplexity"])
        first = Point(0, {name: float(before[name]) for name in MEASURES})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error}): train again") from None
    settings = record["settings"]
    return Curve(Path(settings["model"]).name, settings["condition"], settings["seed"], teacher, (first, *points))
