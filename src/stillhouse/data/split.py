"""Step program: divide a materialised data set into our train, validation and test splits by seed.

Stands between the asset, whose files are the published splits, and the studies. One published split may feed several
of ours (the packaged GSM8K has test items only); they never overlap.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from stillhouse.config.base import StrictModel
from stillhouse.data.records import MathProblem, read_problems
from stillhouse.data.splits import split_by_seed
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import atomic_write_text, staged_directory, verify_manifest, write_manifest
from stillhouse.runtime.logs import logger
from stillhouse.runtime.records import RunRecord

MODULE = "stillhouse.data.split"


class SplitSource(StrictModel):
    """A published split and the number of its examples to take; None takes what is left."""

    source: str
    size: int | None = None


class SplitStep(StrictModel):
    """The step's command line."""

    dataset: Path
    output: Path
    split_seed: int
    splits: dict[str, SplitSource]


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
            for name, problems in split_by_seed(read_problems(path), sizes, step.split_seed).items():
                write_problems(staging / f"{name}.jsonl", problems)
                logger.info("%s: %d examples from the published %s split", name, len(problems), source)
        write_manifest(staging)
        record.write(staging / "run.json")


def write_problems(path: Path, problems: list[MathProblem]) -> None:
    """Write problems as JSON lines, in the order given."""
    lines = [json.dumps({"id": p.id, "question": p.question, "answer": p.answer}, ensure_ascii=False) for p in problems]
    atomic_write_text(path, "\n".join(lines) + "\n")


if __name__ == "__main__":
    run_step(SplitStep, main)
