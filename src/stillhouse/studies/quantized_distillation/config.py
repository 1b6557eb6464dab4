"""The configuration of quantised distillation: conditions as overrides of one set of run settings.

A run's settings are the study's `defaults`, then the model's, the condition's and the sweep point's overrides,
merged in that order. This module stands between the workflow, which resolves runs while it builds the DAG, and
the step programs, which receive the resolved leaves; it imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from stillhouse.config.base import StrictModel, remembered
from stillhouse.config.data import DataSettings, SplitSettings
from stillhouse.config.quantization import WeightFormat
from stillhouse.config.references import Reference
from stillhouse.config.runs import ConditionRuns, Overrides, laid_over
from stillhouse.config.sweeps import Sweep
from stillhouse.studies.quantized_distillation.evaluation_settings import BaselineSettings, EvaluationSettings
from stillhouse.studies.quantized_distillation.run_settings import CacheSettings, RunSettings, Selection


class ExportSettings(StrictModel):
    """Which checkpoint of a student is merged, converted and evaluated."""

    selection: Annotated[
        Selection,
        Field(description="The lowest KL to the teacher on validation, or the last one."),
    ] = "validation_kl"


class TaskSettings(DataSettings):
    """The instruction data and its division into train, validation and test by seed."""

    dataset: str = "alpaca_packaged"
    train: SplitSettings = SplitSettings(source="train")
    validation: SplitSettings = SplitSettings(source="train", size=100)
    test: SplitSettings = SplitSettings(source="train", size=200)


# Evaluated, never trained: the full-precision model, and its weights rounded after training by three methods.
UNTRAINED = ("teacher", "ptq", "gptq", "awq")

CONDITIONS: dict[str, Overrides] = {
    "off_policy": {},
    "on_policy": {"distillation": {"on_policy_share": 1.0}},
    "mixed_policy": {"distillation": {"on_policy_share": 0.5}},
    "teacher_samples": {"distillation": {"seq_kd": True}},
    "off_policy_beside": {"lora_quantisation": "beside"},
    "on_policy_beside": {"lora_quantisation": "beside", "distillation": {"on_policy_share": 1.0}},
}


class QuantizedDistillationConfig(StrictModel, ConditionRuns[RunSettings]):
    """The whole study: which models, conditions and seeds run, and what each of them overrides."""

    untrained: ClassVar[tuple[str, ...]] = UNTRAINED

    models: Annotated[tuple[str, ...], Field(description="Catalogue names of the models.")] = ("smollm2_135m",)
    conditions: Annotated[tuple[str, ...], Field(min_length=1, description="Conditions to run and report.")] = (
        "teacher",
        "ptq",
        "off_policy",
        "on_policy",
    )
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (42, 123, 456)
    task: TaskSettings = TaskSettings()
    defaults: Annotated[RunSettings, Field(description="Settings of a run before any override.")] = RunSettings()
    model_settings: Annotated[dict[str, Overrides], Field(description="Overrides of the defaults per model.")] = {}
    condition_settings: Annotated[
        dict[str, Overrides], Field(description="Overrides per condition; a new name is a new condition.")
    ] = CONDITIONS
    sweeps: dict[str, Sweep] = {}
    export: ExportSettings = ExportSettings()
    baselines: BaselineSettings = BaselineSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def names_are_known_and_runs_resolve(self) -> QuantizedDistillationConfig:
        """Refuse unknown conditions and overrides that do not make valid run settings."""
        self.check_condition_names()
        for model in self.models:
            for condition in dict.fromkeys([*self.condition_settings, *self.trained_conditions]):
                self.run_settings(model, condition)
        return self

    def references(self) -> Iterator[Reference]:
        """The catalogue names that the study uses: models, training data, what is evaluated on."""
        for model in self.models:
            yield Reference("model", model, ("models",))
            for condition in self.trained_conditions:
                text = self.run_settings(model, condition).validation.text
                yield Reference("data set", text, ("defaults", "validation", "text"))
        yield Reference("data set", self.task.dataset, ("task", "dataset"))
        for name, location in self.evaluation.datasets():
            yield Reference("data set", name, ("evaluation", *location))

    @remembered
    def subject_defaults(self, subject: str) -> RunSettings:
        """The run settings of a model before any condition; the baselines' weight format is theirs."""
        return laid_over(self.defaults, ("model_settings", subject), self.model_settings.get(subject, {}))

    @remembered
    def caches(self, model: str) -> dict[str, CacheSettings]:
        """The teacher caches of a model by name; conditions, sweep points and seeds share them."""
        runs = (self.run_settings(model, condition) for condition in self.trained_conditions)
        return {cache.name: cache for run in runs if (cache := run.cache)}

    @remembered
    def formats(self, model: str) -> dict[str, WeightFormat]:
        """The weight formats of a model's students by name, that of the baselines first; each has its own `ptq`."""
        runs = (self.run_settings(model, condition) for condition in self.trained_conditions)
        used = (self.subject_defaults(model).format, *(run.format for run in runs))
        return {chosen.name: chosen for chosen in used}


# The study at a size for two cores: a real model and real data, too few steps and items for a claim about the method.
# SmolLM2's packaged weights come from an asymmetric 4-bit grid of group 32, on which rounding shows no gap at all:
# symmetric groups of 64 do. The learning rate is for a few steps; hundreds want far less.
EMBEDDED: Overrides = {
    "conditions": ["teacher", "ptq", "gptq", "off_policy", "on_policy"],
    "task": {
        "train": {"source": "train", "size": 128},
        "validation": {"source": "train", "size": 16},
        "test": {"source": "train", "size": 64},
    },
    "defaults": {
        "prompt_format": "plain",
        "max_length": 48,
        "response_room": 16,
        "format": {"kind": "int4", "group_size": 64},
        "distillation": {"beta": 0.0},
        "sampling": {"min_new_tokens": 8, "max_new_tokens": 12},
        "teacher": {"batch_tokens": 1024},
        "validation": {"items": 8, "text_tokens": 256, "window": 256, "stride": 128, "batch_tokens": 1024},
        "training": {
            "lora": {"rank": 32, "alpha": 64, "dropout": 0.05},
            "steps": 4,
            "batch_size": 3,
            "micro_batch_tokens": 1024,
            "learning_rate": 1e-3,
            "schedule": {"kind": "linear", "warmup_steps": 1},
            "save_every": 2,
            "resume_every": 2,
        },
    },
    "baselines": {"samples": 16, "tokens": 256},
    "evaluation": {
        "tasks": {"arc_easy": {"dataset": "arc_easy_packaged", "split": "test", "items": 12}},
        "texts": {"wikipedia": {"dataset": "wiki_packaged", "tokens": 768}},
        "window": 256,
        "stride": 192,
        # 24 items of a text that two cores can afford; in stretches of 128 tokens, as at full size, it would have 6.
        "stretch": 32,
        "answers": 16,
        "gap_seeds": 1,
        "batch_tokens": 2048,
    },
}
