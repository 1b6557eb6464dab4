"""The settings of one lens: what a condition, a model or a sweep point may change.

They stand below `config`, which resolves them run by run; no torch here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stillhouse.config.base import SettingError, StrictModel
from stillhouse.config.training import Precision, ScheduleSettings, TrainingSettings
from stillhouse.runtime.digests import short_digest
from stillhouse.studies.consistency_lens.schedules import ScheduleText, parse_schedule

EMBED, TEXT = "<embed>", "<text>"
# Settings of the shared loop that mean nothing here, and what to do instead.
UNREAD = {
    "schedule": "set schedules.learning_rate instead",
    "learning_rate_multipliers": "each part has learning_rate_multiplier",
    "lora": "lens.decoder and lens.encoder say which parts learn, and these learn whole",
    "packing": "documents are padded, leave it out",
    "sharding": "each part has a learning rate of its own, leave it out",
}

Weight = Annotated[float, Field(ge=0)]


class PositionSettings(StrictModel):
    """Which token of a document is explained."""

    policy: Annotated[
        Literal["midpoint", "random"],
        Field(description="Half way between the minimum and the end (as published), or drawn per document."),
    ] = "random"
    minimum: Annotated[int, Field(ge=1, description="First token that may be chosen; the first token is 0.")] = 5
    seed: Annotated[int, Field(description="Draws the positions of policy random.")] = 42


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

    @property
    def begins_frozen(self) -> bool:
        """Whether the part does not learn in the first update, however long an epoch is."""
        return not parse_schedule(self.unfreezing).value(1, 1e6)


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
    compile: Annotated[
        bool, Field(description="Compile each block with torch.compile, which takes minutes at a run's start.")
    ] = False
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
        if all(part.begins_frozen for part in self.trained.values()):
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
        """Refuse settings that the lens has other keys for, or none: here they would do nothing, or work twice."""
        for name, instead in UNREAD.items():
            if getattr(self, name) != LensTrainingSettings.model_fields[name].default:
                raise SettingError((name,), f"the lens does not read it: {instead}")
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
    training: Annotated[
        LensTrainingSettings, Field(description=f"Its {', '.join(UNREAD)} mean nothing here and stay as they are.")
    ] = LensTrainingSettings()

    def leaves(self) -> dict[str, Any]:
        """The settings that this run's training reads: others would only make it run again."""
        return self.model_dump(mode="json", exclude={"training": set(UNREAD)})

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
