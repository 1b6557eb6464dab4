"""Training curves as figures read them: the columns of `metrics.jsonl` by step, the seeds of a condition together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json, verify_manifest


@dataclass(frozen=True)
class Curves:
    """What the runs of one condition logged: one table a seed, its rows by step."""

    model: str
    condition: str
    seeds: tuple[pd.DataFrame, ...]

    def columns(self, prefix: str = "") -> list[str]:
        """The logged columns whose names begin with `prefix`."""
        return [name for name in self.seeds[0].columns if name.startswith(prefix)]

    def column(self, name: str) -> pd.DataFrame:
        """One column by step, a column a seed; steps that did not log it are left out."""
        return pd.concat([seed[name] for seed in self.seeds if name in seed], axis=1).dropna()


def read_curves(runs: Sequence[Path]) -> list[Curves]:
    """The curves of training outputs by model and condition, in the order given; a damaged file is a `UserError`."""
    found: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for run in runs:
        verify_manifest(run, "*.json*")
        settings = read_json(run / "run.json")["settings"]
        key = (Path(settings["model"]).name, settings["condition"])
        found.setdefault(key, []).append(read_metrics(run / "metrics.jsonl"))
    return [Curves(model, condition, tuple(seeds)) for (model, condition), seeds in found.items()]


def read_metrics(path: Path) -> pd.DataFrame:
    """What a training logged, a row a logged step; a missing or damaged file is a `UserError` that names it."""
    try:
        return pd.read_json(path, lines=True).set_index("step").astype(float)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: is no metrics file ({error}): train again") from None


def named(curves: Curves, among: Sequence[Curves]) -> str:
    """How a legend calls a condition: with its model where there are several."""
    several = len({one.model for one in among}) > 1
    return f"{curves.model}, {curves.condition}" if several else curves.condition
