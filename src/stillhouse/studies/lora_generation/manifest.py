"""The collection of a model's teacher adapters: a folder for each, and one manifest with a row for each.

`teachers` leaves adapters with their facts, `collect` checks and joins them, everything else reads them here; no torch.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from stillhouse.config.base import StrictModel
from stillhouse.evaluation.results_files import Interval
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import MANIFEST, read_json, verify_manifest

FACTS_FILE = "teacher.json"


class TeacherFacts(StrictModel):
    """`teacher.json` of an adapter: what it is of, and what it does on validation items of its own task.

    gold_nll: nats per token of the right answers. seconds: of training, with the other adapters of its job.
    better: by the measure that the settings name (`better_by`).
    """

    task: str
    shard: int
    seed: int
    step: int
    examples: int
    base_digest: str
    accuracy_before: Interval
    accuracy_after: Interval
    gold_nll_before: Interval
    gold_nll_after: Interval
    better_by: str
    better: bool
    seconds: float


class AdapterRow(TeacherFacts):
    """A row of the collection's manifest. name: its folder below the collection. digest: of its layout and values."""

    name: str
    digest: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    tensors: int

    @property
    def flagged(self) -> bool:
        """Whether it is no better than the base on its own task."""
        return not self.better


def read_facts(directory: Path) -> TeacherFacts:
    """The facts of one adapter; a damaged file is a `UserError` that names it."""
    path = directory / FACTS_FILE
    try:
        return TeacherFacts.model_validate(read_json(path))
    except ValidationError:
        raise UserError(f"{path}: is not the record of a teacher of this version: train it again") from None


def read_collection(directory: Path) -> list[AdapterRow]:
    """The rows of a collection, its files verified; a damaged one is a `UserError` that names the file at fault."""
    try:
        return [AdapterRow.model_validate(row) for row in verify_manifest(directory)["adapters"]]
    except (KeyError, ValidationError):
        raise UserError(f"{directory / MANIFEST}: lists no adapters of this version: collect them again") from None
