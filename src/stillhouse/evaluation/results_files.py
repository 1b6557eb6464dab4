"""The two files that every evaluation leaves: `results.json`, what was measured, and `items.parquet`, row by row.

Stands between a study's `evaluate`, which writes both, and its `report` and `figures`, which read nothing else; what
they hold is the study's `results.py`. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import pandas as pd
from pydantic import ValidationError

from stillhouse.config.base import StrictModel
from stillhouse.evaluation.statistics import Estimate
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import (
    atomic_write_bytes,
    disk_errors,
    read_sealed_json,
    sha256_file,
    write_sealed_json,
)

# What `results.json` says of the file beside it.
ITEMS_DIGEST = "items_sha256"
Results = TypeVar("Results", bound=StrictModel)


class Interval(StrictModel):
    """A value over n items with its 95 % interval."""

    n: int
    value: float
    low: float
    high: float

    @classmethod
    def of(cls, estimate: Estimate, **further: Any) -> Self:
        """The estimate, rounded for the file, with a subclass's `further` fields."""
        value, low, high = (float(f"{number:.7g}") for number in (estimate.value, estimate.low, estimate.high))
        return cls(n=estimate.n, value=value, low=low, high=high, **further)


class Selection(StrictModel):
    """The checkpoint that stands for one trained condition and seed."""

    condition: str
    seed: int
    step: int


@dataclass(frozen=True, eq=False)
class Evaluation(Generic[Results]):
    """Results with the per-item rows behind them. subject: the columns that say what was scored, and on what."""

    results: Results
    items: pd.DataFrame
    subject: tuple[str, ...]

    @cached_property
    def rows(self) -> Mapping[tuple[Any, ...], pd.DataFrame]:
        """The rows of each subject in the order of item ids, by its values of the columns, None for no value."""
        groups = self.items.sort_values("item_id").groupby(list(self.subject), dropna=False, sort=False)
        return {tuple(None if pd.isna(value) else value for value in key): rows for key, rows in groups}


def load_evaluation(kind: type[Results], results: Path, subject: Sequence[str]) -> Evaluation[Results]:
    """Read `results.json` and the `items.parquet` beside it; a missing or damaged file is a `UserError`."""
    content = read_sealed_json(results)
    expected = content.pop(ITEMS_DIGEST, None)
    try:
        read = kind.model_validate(content)
    except ValidationError as error:
        raise UserError(
            f"{results}: is not a result of this version ({error.error_count()} faults): run evaluate"
        ) from None
    path = results.parent / "items.parquet"
    try:
        if sha256_file(path) != expected:
            raise UserError(f"{path}: is corrupt, or of another run than {results.name}: delete both and run again")
        items = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}): delete it and run again") from None
    return Evaluation(read, items, tuple(subject))


def typed(items: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """The rows with all `columns` and their types, so that a column without values joins others as what it is."""
    return items.reindex(columns=list(columns)).astype(columns)


def write_results(
    results: StrictModel, path: Path, items: pd.DataFrame, columns: Mapping[str, str], items_path: Path
) -> None:
    """Write per-item rows with their fixed columns and types, then the results, which vouch for both files."""
    with disk_errors(items_path):
        items_path.parent.mkdir(parents=True, exist_ok=True)
        typed(items, columns).to_parquet(items_path, index=False)
    write_sealed_json(path, results.model_dump(mode="json") | {ITEMS_DIGEST: sha256_file(items_path)})


def write_part(rows: pd.DataFrame, path: Path) -> None:
    """Keep one subject's rows where the next attempt finds them: whole, or not at all."""
    atomic_write_bytes(path, rows.to_parquet(index=False))
