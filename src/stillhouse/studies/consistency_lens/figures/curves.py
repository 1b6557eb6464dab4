"""The training curves of lenses, as figures read them: the columns of `metrics.jsonl`, seeds taken together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pandas as pd
from pydantic import Field

from stillhouse.config.base import StrictModel
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json


class CurvesStep(StrictModel):
    """The command line of figures of the training: the lenses' directories."""

    lenses: Annotated[tuple[Path, ...], Field(min_length=1)]
    output: Path


@dataclass(frozen=True)
class Curves:
    """What the lenses of one condition logged: one table a seed, its rows by step."""

    model: str
    condition: str
    seeds: tuple[pd.DataFrame, ...]

    def columns(self, prefix: str = "") -> list[str]:
        """The logged columns whose names begin with `prefix`."""
        return [name for name in self.seeds[0].columns if name.startswith(prefix)]

    def column(self, name: str) -> pd.DataFrame:
        """One column by step, a column a seed; steps that did not log it are left out."""
        return pd.concat([seed[name] for seed in self.seeds if name in seed], axis=1).dropna()


def read_curves(lenses: Sequence[Path]) -> list[Curves]:
    """The curves by model and condition, in the order given; a damaged file is a `UserError`."""
    found: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for lens in lenses:
        settings = read_json(lens / "run.json")["settings"]
        path = lens / "metrics.jsonl"
        try:
            rows = pd.read_json(path, lines=True).set_index("step")
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path}: is no metrics file ({error}): train again") from None
        found.setdefault((Path(settings["model"]).name, settings["condition"]), []).append(rows)
    return [Curves(model, condition, tuple(seeds)) for (model, condition), seeds in found.items()]


def named(curves: Curves, among: Sequence[Curves]) -> str:
    """How a legend calls a condition: with its model where there are several."""
    several = len({one.model for one in among}) > 1
    return f"{curves.model}, {curves.condition}" if several else curves.condition
