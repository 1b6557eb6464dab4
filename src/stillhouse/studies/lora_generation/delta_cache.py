"""Step program: the delta activations of all teacher adapters of a model, and the reader of what it leaves.

The directory has `manifest.json` (digest of the model, probes with their texts, digest and file of each adapter),
`base_activation.npy` and `deltas/<digest>.npy`. What was computed stays in the work folder, keyed by model, code,
probes and the adapter's digest: a killed run goes on where it was, and new adapters cost no more than themselves.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.config.base import StrictModel
from stillhouse.models.loading import frozen, load_model, load_tokenizer
from stillhouse.models.lora_tensors import AdapterTensors, adapter_digest, check_fits, read_adapter, stacked
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import (
    MANIFEST,
    atomic_write_bytes,
    link_or_copy,
    staged_directory,
    verify_manifest,
    write_manifest,
)
from stillhouse.runtime.logs import logger
from stillhouse.runtime.records import RunRecord, data_digest, fingerprint
from stillhouse.studies.lora_generation.deltas import Behaviour, Probes, base_activation, delta_activation
from stillhouse.studies.lora_generation.manifest import AdapterRow, read_collection
from stillhouse.studies.lora_generation.probes import ProbeSettings

MODULE = "stillhouse.studies.lora_generation.delta_cache"
BASE_FILE = "base_activation.npy"


class DeltasStep(StrictModel):
    """The step's command line: `adapters` is the collection of a model's teachers."""

    model: Path
    adapters: Path
    output: Path
    work: Path
    probes: ProbeSettings
    trust_remote_code: bool = False


@dataclass(frozen=True)
class DeltaCache:
    """The probes, the base activation [hidden], and each adapter's delta activation [hidden] by its digest."""

    directory: Path
    model_digest: str
    probes: ProbeSettings
    base: Tensor
    deltas: dict[str, Tensor]

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read and verify a directory; a damaged one is a `UserError` that names the file."""
        manifest = verify_manifest(directory)
        try:
            model_digest, files = manifest["model"], manifest["adapters"]
            probes = ProbeSettings.model_validate(manifest["probes"])
        except (KeyError, ValidationError):
            raise UserError(f"{directory / MANIFEST}: describes no delta activations: make them again") from None
        base, *deltas = (
            torch.from_numpy(numpy.load(directory / file, allow_pickle=False)) for file in (BASE_FILE, *files.values())
        )
        return cls(directory, model_digest, probes, base, dict(zip(files, deltas, strict=True)))

    def of(self, digests: Sequence[str]) -> Tensor:
        """The delta activations [adapters, hidden] of adapters by digest; `UserError` for one that is not there."""
        if missing := [key for key in digests if key not in self.deltas]:
            raise UserError(
                f"{self.directory}: has no delta activation of the adapter with digest {missing[0][:16]}: run the rule "
                "that makes it again"
            )
        return torch.stack([self.deltas[key] for key in digests])

    def behaviour(self, model: Path, trust_remote_code: bool = False) -> Behaviour:
        """What the delta activations of other adapters are computed with; `UserError` for another base model."""
        if data_digest(model) != self.model_digest:
            raise UserError(f"{self.directory}: its delta activations are not those of {model}: make them again")
        loaded, probes = load_probed(model, self.probes, trust_remote_code)
        return Behaviour(loaded, probes, self.base.to(loaded.device))


def main(step: DeltasStep) -> None:
    """Compute what the work folder does not hold yet, and put the directory into place."""
    inputs = {"model": step.model, "adapters": step.adapters}
    with RunRecord(MODULE, step, inputs) as record:
        verify_manifest(step.model)
        rows = read_collection(step.adapters)
        paths = {"model", "adapters", "output", "work"}
        work = step.work / fingerprint(MODULE, step, {"model": step.model}, exclude=paths)
        missing = [row for row in rows if not (work / f"{row.digest}.npy").is_file()]
        if missing or not (work / BASE_FILE).is_file():
            compute(step, missing, work)
        logger.info("%d delta activations, %d of them computed now", len(rows), len(missing))
        record.add(adapters=len(rows), computed=len(missing))
        facts: dict[str, Any] = {
            "model": data_digest(step.model),
            "probes": step.probes.model_dump(mode="json"),
            "probe_texts": step.probes.texts,
            "adapters": {row.digest: f"deltas/{row.digest[:16]}.npy" for row in rows},
        }
        with staged_directory(step.output) as staging:
            (staging / "deltas").mkdir()
            link_or_copy(work / BASE_FILE, staging / BASE_FILE)
            for digest, file in facts["adapters"].items():
                link_or_copy(work / f"{digest}.npy", staging / file)
            write_manifest(staging, facts)
            record.write(staging / "run.json")


def compute(step: DeltasStep, rows: Sequence[AdapterRow], work: Path) -> None:
    """Leave the base activation and the delta activations of `rows` in the work folder, a file for each adapter."""
    model, probes = load_probed(step.model, step.probes, step.trust_remote_code)
    base = base_activation(model, probes)
    write_array(work / BASE_FILE, base)
    for start in range(0, len(rows), step.probes.at_once):
        group = rows[start : start + step.probes.at_once]
        batch = stacked([checked_adapter(step.adapters / row.name, row, model) for row in group])
        with torch.no_grad():
            deltas = delta_activation(model, batch.to(model.device), probes, base)
        for row, delta in zip(group, deltas, strict=True):
            write_array(work / f"{row.digest}.npy", delta)


def load_probed(path: Path, probes: ProbeSettings, trust_remote_code: bool) -> tuple[PreTrainedModel, Probes]:
    """The frozen base model in fp32, and the probes as it reads them."""
    model = frozen(load_model(path, "fp32", trust_remote_code=trust_remote_code))
    return model, Probes.tokenise(probes, load_tokenizer(path, trust_remote_code), model)


def checked_adapter(directory: Path, row: AdapterRow, model: PreTrainedModel) -> AdapterTensors:
    """The adapter of a row. Raises `UserError` where it is of another base, or not the one that the row is about."""
    adapter = read_adapter(directory)
    check_fits(adapter.layout, model, directory)
    if adapter_digest(adapter) != row.digest:
        raise UserError(f"{directory}: is not the adapter that the collection's manifest lists: collect them again")
    return adapter


def write_array(path: Path, values: Tensor) -> None:
    """Write a tensor as .npy, whole or not at all."""
    content = io.BytesIO()
    numpy.save(content, values.cpu().numpy())
    atomic_write_bytes(path, content.getvalue())


if __name__ == "__main__":
    run_step(DeltasStep, main)
