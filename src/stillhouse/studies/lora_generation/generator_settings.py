"""Settings of a generator: how prompts become numbers, the network, what it is trained by, and the conditions."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stillhouse.config.base import SettingError, StrictModel
from stillhouse.config.runs import Overrides
from stillhouse.config.training import ScheduleSettings, TrainingSettings

Weight = Annotated[float, Field(ge=0)]


class TextSettings(StrictModel):
    """How prompts become numbers: a frozen sentence encoder, whose embeddings are cached."""

    encoder: Annotated[str, Field(description="Catalogue name of the sentence encoder.")] = "minilm_l6"
    states: Annotated[
        Literal["sentence", "tokens"],
        Field(description="One mean-pooled vector per prompt, or the states of its first `length` tokens."),
    ] = "sentence"
    length: Annotated[
        int, Field(ge=1, description="Tokens per prompt of states tokens; shorter prompts get zeros.")
    ] = 64
    batch_size: Annotated[int, Field(ge=1)] = 64

    @property
    def vectors(self) -> int:
        """Vectors that stand for one prompt."""
        return self.length if self.states == "tokens" else 1


class TokenSettings(StrictModel):
    """Blocks of A and B transposed that are one token each: rows along the rank, columns along the features."""

    rows: Annotated[int, Field(ge=1)] = 10
    columns: Annotated[int, Field(ge=1)] = 130


class Stage(StrictModel):
    """The size of the three axes behind one hyper-convolution block."""

    tokens: Annotated[int, Field(ge=1)]
    rows: Annotated[int, Field(ge=1)]
    columns: Annotated[int, Field(ge=1)]


class GeneratorSettings(StrictModel):
    """The network from prompt embeddings to adapter weights."""

    kind: Annotated[
        Literal["compact", "hyper_convolution"],
        Field(
            description="A decoder per layer and matrix with shared heads, or Drag-and-Drop's cascade of convolutions."
        ),
    ] = "compact"
    prompts: Annotated[
        int, Field(ge=1, description="Prompts read for one adapter; drawn anew in each update, the first ones later.")
    ] = 16
    width: Annotated[int, Field(ge=1, description="Of the compact decoder, and of guidance.")] = 256
    layers: Annotated[int, Field(ge=1, description="Residual blocks of the compact decoder.")] = 2
    stages: Annotated[
        tuple[Stage, ...],
        Field(description="Blocks of the cascade between prompts and the token grid; hyper_convolution."),
    ] = (
        Stage(tokens=256, rows=32, columns=192),
        Stage(tokens=1024, rows=16, columns=160),
    )
    kernel: Annotated[int, Field(ge=1, description="Of the cascade's convolutions; odd.")] = 5
    start: Annotated[
        Literal["mean", "zero"],
        Field(
            description="What a generated adapter is a deviation from: the mean of the training adapters, or nothing."
        ),
    ] = "mean"

    @model_validator(mode="after")
    def kernel_has_a_middle(self) -> GeneratorSettings:
        """Refuse an even kernel, which would shift what it reads."""
        if self.kernel % 2 == 0:
            raise SettingError(("kernel",), f"is {self.kernel}: it must be odd")
        return self


class LossSettings(StrictModel):
    """What a generated adapter is compared by. Each term is 1 for a generator that gives no adapter at all."""

    weight: Annotated[Weight, Field(description="lambda_w: distance of weights.")] = 1.0
    weight_kind: Annotated[
        Literal["delta_w", "matrices"],
        Field(description="Squared error of B A alpha/r, whatever its factors, or of the standardised A and B."),
    ] = "delta_w"
    delta: Annotated[Weight, Field(description="lambda_d: distance of delta activations.")] = 0.1
    delta_kind: Annotated[
        Literal["mse", "cosine"], Field(description="Squared error, or 1 - cosine beside the norm's own term.")
    ] = "mse"
    norm: Annotated[
        Weight, Field(description="Of delta_kind cosine: squared logarithm of the norms' ratio, which cosine ignores.")
    ] = 0.1
    guided: Annotated[
        bool, Field(description="Predict the delta activation from the prompts first, and decode from both.")
    ] = False
    guide: Annotated[Weight, Field(description="Of guided: squared error of the predicted delta activation.")] = 1.0

    @model_validator(mode="after")
    def something_is_asked_for(self) -> LossSettings:
        """Refuse a loss without any term on the adapter."""
        if not (self.weight or self.delta):
            raise ValueError("weight and delta are both 0: the generator has nothing to learn")
        return self


class RunSettings(StrictModel):
    """Everything that the training of one generator reads."""

    seed_offset: Annotated[int, Field(description="Added to the seed, for replicas of a condition.")] = 0
    held_out_tasks: Annotated[
        tuple[str, ...], Field(description="Tasks whose adapters the generator never sees; new ones are asked of it.")
    ] = ()
    generator: GeneratorSettings = GeneratorSettings()
    tokens: TokenSettings = TokenSettings()
    losses: LossSettings = LossSettings()
    training: Annotated[
        TrainingSettings, Field(description="Its method, lora and packing mean nothing here and stay as they are.")
    ] = TrainingSettings(
        steps=2000,
        batch_size=8,
        learning_rate=3e-4,
        schedule=ScheduleSettings(warmup_steps=100),
        save_every=500,
        resume_every=250,
    )

    def leaves(self) -> dict[str, Any]:
        """The settings that this generator's training reads: others would only make it run again."""
        leaves = self.model_dump(mode="json")
        for unread in ("method", "lora", "packing"):
            del leaves["training"][unread]
        for unread in ("stages", "kernel") if self.generator.kind == "compact" else ("layers",):
            del leaves["generator"][unread]
        return leaves

    @model_validator(mode="after")
    def settings_fit_each_other(self) -> RunSettings:
        """Refuse settings of the shared loop that this study does not read or offer."""
        unread = TrainingSettings()
        for name in ("method", "lora", "packing"):
            if getattr(self.training, name) != getattr(unread, name):
                raise SettingError(("training", name), "is not read here: teachers.training has the adapters' settings")
        if self.training.gradient_checkpointing:
            raise SettingError(("training", "gradient_checkpointing"), "generators do not offer it: switch it off")
        return self


CONDITIONS: dict[str, Overrides] = {
    "multi_task": {"losses": {"weight": 1.0, "delta": 0.1}},
    "balanced": {"losses": {"weight": 0.5, "delta": 0.5}},
    "delta_only": {"losses": {"weight": 0.0, "delta": 1.0}},
    "weight_only": {"losses": {"weight": 1.0, "delta": 0.0}},
    "matrices_only": {"losses": {"weight": 1.0, "weight_kind": "matrices", "delta": 0.0}},
    "cosine": {"losses": {"weight": 0.0, "delta": 1.0, "delta_kind": "cosine"}},
    "delta_guided": {"losses": {"weight": 1.0, "delta": 0.1, "guided": True}},
    "hyper_convolution": {"generator": {"kind": "hyper_convolution"}},
}
