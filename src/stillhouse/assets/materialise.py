"""Step program: fetch one model or data set, verify it, and store it normalised with a manifest.

    python -m stillhouse.assets.materialise kind=model name=mine output=resources/models/mine \\
        'entry.sources=[{kind: path, path: /models/mine}]'

The output is whole or absent: it is made in a scratch folder beside and moved into place.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Literal

from stillhouse.assets.datasets import normalise_dataset
from stillhouse.assets.fetch import fetch
from stillhouse.config.assets import DatasetEntry, ModelEntry
from stillhouse.config.base import StrictModel
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.files import staged_directory, write_manifest
from stillhouse.runtime.logs import logger
from stillhouse.runtime.records import RunRecord

MODULE = "stillhouse.assets.materialise"


class ModelStep(StrictModel):
    """The command line for a model."""

    kind: Literal["model"]
    name: str
    entry: ModelEntry
    output: Path


class DatasetStep(StrictModel):
    """The command line for a data set."""

    kind: Literal["dataset"]
    name: str
    entry: DatasetEntry
    output: Path


def main(step: ModelStep | DatasetStep) -> None:
    """Make `step.output`; raises `UserError` where no source yields the asset or it cannot be read."""
    scratch = step.output.parent / f".{step.output.name}.fetch"
    try:
        with RunRecord(MODULE, step, {}) as record:
            if isinstance(step, ModelStep):
                _materialise_model(step, scratch, record)
            else:
                path = fetch(step.name, step.entry, tuple(step.entry.splits.values()), scratch)
                with staged_directory(step.output) as staging:
                    counts = normalise_dataset(step.name, step.entry, path, staging)
                    write_manifest(staging, {"task": step.entry.task, "examples": counts})
                    record.write(staging / "run.json")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    logger.info("%s: ready in %s", step.name, step.output)


def _materialise_model(step: ModelStep, scratch: Path, record: RunRecord) -> None:
    # Imported here, because it loads torch and a data set needs none of it.
    from stillhouse.assets.models import convert_gguf, copy_transformers_model, wanted_files

    path = fetch(step.name, step.entry, wanted_files(step.entry.trust_remote_code), scratch)
    with staged_directory(step.output) as staging:
        if step.entry.format == "gguf":
            convert_gguf(path, step.entry.fixes, staging)
        else:
            copy_transformers_model(path, step.entry.trust_remote_code, staging)
        # The record stays outside the manifest: making the asset again does not change what is said to be in it.
        write_manifest(staging)
        record.write(staging / "run.json")


if __name__ == "__main__":
    if "kind=dataset" in sys.argv:
        run_step(DatasetStep, main)
    else:
        run_step(ModelStep, main)
