"""The systems that an evaluation compares: what each is, read from the records of the steps that made it, and its
weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from stillhouse.config.quantization import WeightFormat
from stillhouse.config.training import Precision
from stillhouse.models.export import load_exported
from stillhouse.models.loading import load_model
from stillhouse.models.quantized_lora import load_student, quantized_once
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json
from stillhouse.runtime.records import data_digest
from stillhouse.studies.quantized_distillation.results import TEACHER, System, SystemFacts, Variant
from stillhouse.studies.quantized_distillation.run_settings import RunSettings
from stillhouse.training.tracking import METRICS_FILE, read_metrics


@dataclass(frozen=True)
class EvaluatedSystem:
    """One system. exported: the converted model's directory, None for the teacher. student: its training's."""

    system: System
    model: Path
    exported: Path | None = None
    student: Path | None = None

    @cached_property
    def record(self) -> dict[str, Any]:
        """What the export recorded."""
        assert self.exported
        record: dict[str, Any] = read_json(self.exported / "run.json")
        return record

    @cached_property
    def weight_format(self) -> WeightFormat:
        """The format that the weights were converted to."""
        return WeightFormat.model_validate(self.record["settings"]["format"])

    @cached_property
    def run(self) -> RunSettings | None:
        """The settings that the student was trained with."""
        if self.student is None:
            return None
        return RunSettings.model_validate(read_json(self.student / "run.json")["settings"]["run"])

    @property
    def digest(self) -> str:
        """What determines the system's rows, beside the code: the converted weights, or what they were made from."""
        variant = self.system.variant
        made_from = f"{data_digest(self.student)}-{self.record['selected_step']}" if self.student else ""
        return f"{variant}-{data_digest(self.exported or self.model)}-{made_from}"

    def facts(self) -> SystemFacts:
        """How it was made, for figures and tables."""
        names = {"condition": self.system.condition, "seed": self.system.seed}
        if self.exported is None:
            size = sum(file.stat().st_size for file in self.model.glob("*.safetensors"))
            return SystemFacts(**names, weight_format=None, weight_bytes=size)
        trained: dict[str, Any] = {}
        if self.student and (run := self.run):
            trained = {
                "placement": run.lora_quantisation,
                "learning_rate": run.training.learning_rate,
                "beta": run.distillation.beta,
                "on_policy_share": run.distillation.on_policy_share,
                "lora_rank": run.training.lora.rank,
                "checkpoint_step": self.record["selected_step"],
                "selection": self.record["settings"]["selection"],
                "validation_kl": _validation_kl(self.student, self.record["selected_step"]),
            }
        return SystemFacts(
            **names,
            weight_format=self.weight_format.name,
            weight_bytes=self.record["bytes"],
            largest_logit_difference=self.record.get("largest_logit_difference"),
            **trained,
        )

    def before_conversion(self, variant: Variant) -> EvaluatedSystem:
        """The same student fake-quantised, with its LoRA merged or beside."""
        return replace(self, system=replace(self.system, variant=variant))

    @contextmanager
    def loaded(self, precision: Precision, trust_remote_code: bool) -> Iterator[PreTrainedModel]:
        """The weights, in evaluation mode; released on leaving."""
        if self.system.variant == "deployed":
            load = load_exported if self.exported else load_model
            yield load(self.exported or self.model, precision, trust_remote_code=trust_remote_code)
            return
        assert self.student
        checkpoint = self.student / f"checkpoint-{self.record['selected_step']}"
        student = load_student(
            self.model, checkpoint, self.weight_format, self.system.variant, precision, trust_remote_code
        )
        with quantized_once(student):
            yield student


def _validation_kl(student: Path, step: int) -> float | None:
    """What training measured at a checkpoint."""
    rows = {int(row["step"]): row for row in read_metrics(student / METRICS_FILE)}
    return rows.get(step, {}).get("validation_kl")


def read_systems(
    model: Path,
    exported: tuple[Path, ...],
    conditions: tuple[str, ...],
    seeds: tuple[int, ...],
    students: tuple[Path, ...],
) -> list[EvaluatedSystem]:
    """The teacher, then one system for each exported directory, of that condition and seed.

    Raises `UserError` where an export was made from a student that is not given.
    """
    known = {str(path): path for path in students}
    systems = [EvaluatedSystem(System(TEACHER, 0), model)]
    for directory, condition, seed in zip(exported, conditions, seeds, strict=True):
        made_from = read_json(directory / "run.json")["settings"].get("student")
        if made_from is not None and made_from not in known:
            raise UserError(f"{directory}: was made from {made_from}, which is not among the students: export it again")
        systems.append(EvaluatedSystem(System(condition, seed), model, directory, known.get(made_from)))
    return systems
