"""The configuration of the consistency lens: conditions as overrides of one set of run settings.

A run's settings are the study's `defaults`, then the model's, the condition's and the sweep point's overrides, merged
in that order. Runs that agree on `ActivationSettings` share one extraction. Imports no torch: the workflow reads this
while it builds the DAG.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stillhouse.config.base import SettingError, StrictModel, remembered
from stillhouse.config.data import DataSettings, SplitSettings
from stillhouse.config.references import Reference
from stillhouse.config.runs import ConditionRuns, Overrides, laid_over
from stillhouse.config.sweeps import Sweep
from stillhouse.config.training import Precision, ScheduleSettings, TrainingSettings
from stillhouse.runtime.digests import short_digest
from stillhouse.studies.consistency_lens.schedules import ScheduleText, parse_schedule

EMBED, TEXT = "<embed>", "<text>"
Weight = Annotated[float, Field(ge=0)]


class PositionSettings(StrictModel):
    """Which token of a document is explained."""

    policy: Annotated[
        Literal["midpoint", "random"],
        Field(description="Half way between the minimum and the end (as published), or drawn per document."),
    ] = "random"
    minimum: Annotated[int, Field(ge=1, description="First token that may be chosen; the first token is 0.")] = 5
    seed: Annotated[int, Field(description="Draws the positions of policy random.")] = 42


class TokenSettings(StrictModel):
    """The pre-tokenised corpus, made once per model."""

    max_length: Annotated[int, Field(ge=3, description="Tokens kept of a document.")] = 256
    shard_documents: Annotated[int, Field(ge=1, description="Documents of one shard.")] = 4096


class ExtractionSettings(StrictModel):
    """How activations are extracted; changes speed, not results."""

    processes: Annotated[int, Field(ge=1)] = 1
    batch_tokens: Annotated[int, Field(ge=1, description="Token budget of one forward pass.")] = 8192


class ActivationSettings(StrictModel):
    """What determines an extraction, and nothing else: runs that agree on it share the artefact."""

    layer: Annotated[int, Field(ge=0)]
    positions: PositionSettings
    max_length: int
    dtype: Literal["float32", "bfloat16", "float16"]
    precision: Precision

    @property
    def name(self) -> str:
        """A name for paths: readable, and different wherever the activations are."""
        return f"layer_{self.layer}-{self.positions.policy}-{short_digest(self.model_dump(mode='json'))}"


class PartSettings(StrictModel):
    """One part of the decoder or the encoder: whether it learns, how fast, and from when."""

    trained: bool = True
    learning_rate_multiplier: Annotated[float, Field(gt=0)] = 1.0
    unfreezing: Annotated[
        ScheduleText,
        Field(description="Factor of its learning rate; while 0 the part is frozen: 0, hold 1e, linear to 1 over 100s"),
    ] = "1"


class FrozenPartSettings(PartSettings):
    """A part that stays as it is, and shares its weights with the original, unless it is asked to learn."""

    trained: bool = False


class DecoderSettings(StrictModel):
    """Activation to text: the prompt with the projected activation in place of `<embed>`, and the parts that learn."""

    prompt_text: Annotated[
        str, Field(description="Start of the prompt embeddings; the activation stands where <embed> does.")
    ] = "In a word, <embed> means:"
    projection: PartSettings = PartSettings()
    prompt: PartSettings = PartSettings()
    base: Annotated[FrozenPartSettings, Field(description="Blocks and final norm.")] = FrozenPartSettings()
    embeddings: FrozenPartSettings = FrozenPartSettings()
    output_head: FrozenPartSettings = FrozenPartSettings()

    @model_validator(mode="after")
    def prompt_has_one_place(self) -> DecoderSettings:
        """Refuse a prompt without exactly one `<embed>`."""
        if (count := self.prompt_text.count(EMBED)) != 1:
            raise SettingError(("prompt_text",), f"'{self.prompt_text}' needs {EMBED} once, it has it {count} times")
        return self

    @property
    def parts(self) -> dict[str, PartSettings]:
        """The parts by name."""
        return {name: getattr(self, name) for name in ("projection", "prompt", "base", "embeddings", "output_head")}


class EncoderSettings(StrictModel):
    """Text to activation: soft prompt and text, the hidden state of a layer at the last token, a projection."""

    prompt_text: Annotated[
        str, Field(description="Start of the soft prompt around the explanation, which stands where <text> does.")
    ] = "<text>"
    output_layer: Annotated[
        int, Field(ge=-1, description="Hidden state that is projected: -1 last, 0 embeddings, 1..n after a block.")
    ] = -1
    projection: PartSettings = PartSettings()
    prompt: PartSettings = PartSettings()
    base: Annotated[FrozenPartSettings, Field(description="Blocks and final norm.")] = FrozenPartSettings()
    embeddings: FrozenPartSettings = FrozenPartSettings()

    @model_validator(mode="after")
    def prompt_has_one_place(self) -> EncoderSettings:
        """Refuse a prompt without exactly one `<text>`."""
        if (count := self.prompt_text.count(TEXT)) != 1:
            raise SettingError(("prompt_text",), f"'{self.prompt_text}' needs {TEXT} once, it has it {count} times")
        return self

    @property
    def parts(self) -> dict[str, PartSettings]:
        """The parts by name."""
        return {name: getattr(self, name) for name in ("projection", "prompt", "base", "embeddings")}


class LensSettings(StrictModel):
    """The lens as a model: what it reads, how it is built, which parts of it learn."""

    layer: Annotated[
        int, Field(ge=0, description="Residual stream that is explained: after block 1..n, 0 embeddings.")
    ] = 6
    text_length: Annotated[int, Field(ge=1, description="T: tokens of an explanation.")] = 8
    decoder: DecoderSettings = DecoderSettings()
    encoder: EncoderSettings = EncoderSettings()
    frozen_8bit: Annotated[bool, Field(description="Hold frozen weights in 8 bit (needs bitsandbytes).")] = False
    attention: Annotated[
        Literal["sdpa", "flash_attention_2", "eager"], Field(description="Attention implementation.")
    ] = "sdpa"
    compile: Annotated[bool, Field(description="Compile the blocks with torch.compile.")] = False
    tf32: Annotated[bool, Field(description="TF32 in matrix products on a GPU.")] = True

    @property
    def parts(self) -> dict[str, PartSettings]:
        """Every part by its name: `decoder.projection`, `encoder.base` and so on."""
        roles = {"decoder": self.decoder.parts, "encoder": self.encoder.parts}
        return {f"{role}.{name}": part for role, parts in roles.items() for name, part in parts.items()}

    @property
    def trained(self) -> dict[str, PartSettings]:
        """The parts that learn, by name."""
        return {name: part for name, part in self.parts.items() if part.trained}

    @model_validator(mode="after")
    def something_learns_from_the_start(self) -> LensSettings:
        """Refuse a lens of which nothing learns in the first update."""
        if not any(parse_schedule(part.unfreezing).value(1, 1e6) for part in self.trained.values()):
            raise ValueError("no part of the lens learns from the start: train one whose unfreezing starts above 0")
        return self


class LossSettings(StrictModel):
    """Weights of the loss's terms. All terms are computed and logged, whatever their weight."""

    reconstruction_kl: Annotated[
        Weight, Field(description="KL of the original's next-token distribution with A and with the reconstruction.")
    ] = 1.0
    resample_kl: Annotated[
        Weight, Field(description="The same with the reconstruction plus the partner's error, A' - its reconstruction.")
    ] = 1.0
    resample_stop_gradient: Annotated[bool, Field(description="Treat the partner's error as a constant.")] = True
    language_model: Annotated[
        Weight, Field(description="KL of the decoder against the original on the same text, times alpha.")
    ] = 1.0
    language_model_positions: Annotated[
        Literal["aligned", "one_late"],
        Field(description="Compare predictions of the same token, or the original's next one as published."),
    ] = "aligned"
    entropy: Annotated[float, Field(description="Entropy of the decoder's distributions; below 0 rewards it.")] = 0.0
    mse: Weight = 0.0

    @model_validator(mode="after")
    def something_is_asked_for(self) -> LossSettings:
        """Refuse a loss without any term."""
        if not any((self.reconstruction_kl, self.resample_kl, self.language_model, self.entropy, self.mse)):
            raise ValueError("every weight is 0: the lens has nothing to learn")
        return self


class LensSchedules(StrictModel):
    """What changes over a run: `1.0, hold 100s, cosine to 0.1 over 0.5e`; s counts updates, e epochs."""

    temperature: Annotated[ScheduleText, Field(description="Gumbel-softmax temperature.")] = (
        "1.0, cosine to 0.1 over 1e"
    )
    noise: Annotated[
        ScheduleText,
        Field(
            description="Factor of the Gumbel noise: 1 samples the decoder's distributions (as published), 0 nothing."
        ),
    ] = "1"
    alpha: Annotated[ScheduleText, Field(description="Factor of the language-model term.")] = (
        "0, linear to 0.1 over 0.5e"
    )
    learning_rate: Annotated[ScheduleText, Field(description="Factor of training.learning_rate.")] = (
        "0, linear to 1 over 100s"
    )

    @model_validator(mode="after")
    def values_make_sense(self) -> LensSchedules:
        """Refuse a temperature that reaches 0, and negative factors."""
        if min(parse_schedule(self.temperature).values) <= 0:
            raise SettingError(("temperature",), f"'{self.temperature}' must stay above 0")
        for name in ("noise", "alpha", "learning_rate"):
            if min(parse_schedule(getattr(self, name)).values) < 0:
                raise SettingError((name,), f"'{getattr(self, name)}' must not go below 0")
        return self


class CheckpointSettings(StrictModel):
    """Which of the saved checkpoints a finished run keeps; null for both keeps all."""

    best: Annotated[int | None, Field(ge=1, description="The best k by validation loss.")] = None
    last: Annotated[int | None, Field(ge=1, description="The newest n.")] = None
    validation_items: Annotated[int, Field(ge=1, description="Examples of the validation loss, from the first.")] = 256


class LensTrainingSettings(TrainingSettings):
    """The shared loop's settings; `schedules.learning_rate` takes the place of `schedule`."""

    method: Literal["full"] = "full"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    schedule: ScheduleSettings = ScheduleSettings(kind="constant", warmup_steps=0)

    @model_validator(mode="after")
    def the_lens_has_its_own(self) -> LensTrainingSettings:
        """Refuse settings that the lens has other keys for: here they would do nothing, or work twice."""
        constant = ScheduleSettings(kind="constant", warmup_steps=0)
        if self.schedule != constant:
            raise SettingError(("schedule",), "the lens does not read it: set schedules.learning_rate instead")
        if self.learning_rate_multipliers:
            raise SettingError(
                ("learning_rate_multipliers",), "the lens does not read it: each part has learning_rate_multiplier"
            )
        return self


class RunSettings(StrictModel):
    """Everything that one lens's training reads."""

    seed_offset: Annotated[int, Field(description="Added to the seed, for replicas of a condition.")] = 0
    activations: Annotated[
        Literal["cached", "on_the_fly"], Field(description="Extracted beforehand, or computed in the training step.")
    ] = "cached"
    activation_dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], Field(description="Number format of extracted activations.")
    ] = "float32"
    positions: PositionSettings = PositionSettings()
    max_length: Annotated[int, Field(ge=3, description="Tokens read of a document.")] = 256
    lens: LensSettings = LensSettings()
    loss: LossSettings = LossSettings()
    schedules: LensSchedules = LensSchedules()
    checkpoints: CheckpointSettings = CheckpointSettings()
    training: LensTrainingSettings = LensTrainingSettings()

    def leaves(self) -> dict[str, Any]:
        """The settings that this run's training reads."""
        return self.model_dump(mode="json")

    @property
    def extraction(self) -> ActivationSettings:
        """The activations that this run explains; extracted beforehand, they are shared with runs that agree."""
        return ActivationSettings(
            layer=self.lens.layer,
            positions=self.positions,
            max_length=self.max_length,
            dtype=self.activation_dtype,
            precision=self.training.precision,
        )

    @model_validator(mode="after")
    def settings_fit_each_other(self) -> RunSettings:
        """Refuse a position outside the text."""
        if self.positions.minimum + 2 > self.max_length:
            raise ValueError(
                f"positions.minimum ({self.positions.minimum}) leaves no token to explain and predict in max_length "
                f"({self.max_length}): lower it or raise max_length"
            )
        return self


class TaskSettings(DataSettings):
    """The corpus and its division into train, validation and test documents by seed."""

    dataset: str = "lambada_packaged"
    train: SplitSettings = SplitSettings(source="test")
    validation: SplitSettings = SplitSettings(source="test", size=200)
    test: SplitSettings = SplitSettings(source="test", size=500)


class EvaluationSettings(StrictModel):
    """How every lens of a model is scored, on documents that it has never seen and without Gumbel noise."""

    split: Literal["validation", "test"] = "test"
    seed: Annotated[int, Field(description="Draws controls, samples of best-of-K and bootstrap intervals.")] = 42
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
        "train": {"source": "test", "size": 576},
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
            "steps": 36,
            "batch_size": 16,
            "micro_batch_tokens": 4096,
            "save_every": 18,
            "resume_every": 9,
        },
    },
    "evaluation": {"batch_size": 32, "best_of": [1, 2, 4], "verbose_samples": 8, "continuation_tokens": 8},
}
