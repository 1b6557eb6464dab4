"""Step program: check every teacher adapter of a model and join them in one folder with one manifest.

Nothing is left out silently: an adapter that is missing, damaged, of another base, rank or targets, or without its
prompts ends the step with the name of the file; one that is no better than its base stays, flagged. Files are linked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from stillhouse.config.base import StrictModel
from stillhouse.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from stillhouse.models.lora_tensors import AdapterTensors, adapter_digest, check_same_layout, read_adapter
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import link_or_copy, staged_directory, verify_manifest, write_manifest
from stillhouse.runtime.logs import logger
from stillhouse.runtime.records import RunRecord, data_digest
from stillhouse.studies.lora_generation.manifest import FACTS_FILE, AdapterRow, read_facts
from stillhouse.studies.lora_generation.prompts import PROMPTS_FILE, read_solved_prompts
from stillhouse.studies.lora_generation.teacher_settings import Teacher

MODULE = "stillhouse.studies.lora_generation.collect"
FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, PROMPTS_FILE, FACTS_FILE)


class CollectStep(StrictModel):
    """The step's command line: `expected` names every adapter that the configuration asks for."""

    model: Path
    teachers: tuple[Path, ...]
    output: Path
    expected: tuple[str, ...]


def main(step: CollectStep) -> None:
    """Check all adapters, link them, and write the manifest."""
    inputs = {"model": step.model, **{str(path): path for path in step.teachers}}
    with RunRecord(MODULE, step, inputs) as record:
        for path in inputs.values():
            verify_manifest(path)
        folders = find_adapters(step.teachers)
        if missing := sorted(set(step.expected) ^ folders.keys()):
            raise UserError(
                f"{step.output}: '{missing[0]}' and {len(missing) - 1} more adapters are trained or expected, but not "
                "both: run the rule that trains teachers again"
            )
        rows = checked_rows(step.expected, folders, data_digest(step.model))
        with staged_directory(step.output) as staging:
            for row in rows:
                (staging / row.name).mkdir(parents=True)
                for file in FILES:
                    link_or_copy(folders[row.name] / file, staging / row.name / file)
            record.add(adapters=len(rows), flagged=sum(row.flagged for row in rows))
            write_manifest(staging, {"adapters": [row.model_dump(mode="json") for row in rows]})
            record.write(staging / "run.json")
    for row in rows:
        if row.flagged:
            logger.warning("%s: is no better than the base on its own task (by %s)", row.name, row.better_by)
    logger.info("%d adapters, %d of them flagged", len(rows), sum(row.flagged for row in rows))


def find_adapters(jobs: Sequence[Path]) -> dict[str, Path]:
    """The folder of each adapter by its name."""
    found = {}
    for facts_file in sorted(path for job in jobs for path in job.glob(f"*/*/{FACTS_FILE}")):
        facts = read_facts(facts_file.parent)
        found[Teacher(facts.task, facts.shard, facts.seed, facts.step).name] = facts_file.parent
    return found


def checked_rows(names: Sequence[str], folders: dict[str, Path], base_digest: str) -> list[AdapterRow]:
    """A row for each adapter. Raises `UserError`, naming the file, for one that the others cannot stand beside."""
    rows: list[AdapterRow] = []
    first: AdapterTensors | None = None
    for name in names:
        folder = folders[name]
        facts, adapter = read_facts(folder), read_adapter(folder)
        first = first or adapter
        check_same_layout(adapter.layout, first.layout, folder)
        if facts.base_digest != base_digest:
            raise UserError(f"{folder / FACTS_FILE}: the adapter is of another base model: train it on this one")
        if not all(torch.isfinite(tensor).all() for matrices in (adapter.a, adapter.b) for tensor in matrices.values()):
            raise UserError(f"{folder / ADAPTER_WEIGHTS}: holds values that are not finite: lower learning_rate")
        read_solved_prompts(folder / PROMPTS_FILE)
        rows.append(
            AdapterRow(
                **facts.model_dump(),
                name=name,
                digest=adapter_digest(adapter),
                rank=adapter.layout.rank,
                alpha=adapter.layout.alpha,
                targets=adapter.layout.targets,
                tensors=len(adapter.a) + len(adapter.b),
            )
        )
    return rows


if __name__ == "__main__":
    run_step(CollectStep, main)
