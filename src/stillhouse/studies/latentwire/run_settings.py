"""The settings of one channel: what a condition, a pair or a sweep point may change.

They stand below `config`, which resolves them run by run; no torch here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stillhouse.config.base import SettingError, StrictModel
from stillhouse.config.training import LoraSettings, Precision, ScheduleSettings, TrainingSettings
from stillhouse.runtime.digests import short_digest

WireKind = Literal["fp16", "int8", "int6", "int4"]


PromptStyle = Literal["auto", "chat_full", "content_only"]


Share = Annotated[float, Field(ge=0, le=1)]


class LatentSettings(StrictModel):
    """Z: the M x d_z numbers that go over the wire, once per text and for every reader."""

    length: Annotated[int, Field(ge=1, le=1024, description="M: vectors on the wire, private ones included.")] = 32
    private: Annotated[
        int, Field(ge=0, description="Vectors of each model's own; the other M are shared by all models.")
    ] = 0
    dimension: Annotated[int, Field(ge=1, le=8192, description="d_z.")] = 256

    def shared(self, models: int) -> int:
        """The vectors that every one of `models` readers gets."""
        return self.length - self.private * models

    def per_model(self, models: int) -> int:
        """The vectors that one reader gets: the shared ones and its own."""
        return self.shared(models) + self.private


class EncoderSettings(StrictModel):
    """From text to Z. The whole text must fit: nothing is cut unless `overlong` and `max_cut_share` allow it."""

    kind: Annotated[
        Literal["bytes", "sentence", "language_model"],
        Field(
            description="A transformer over bytes, a frozen sentence encoder, or a reader itself with a LoRA; each "
            "with learned queries that pool its states into Z."
        ),
    ] = "bytes"
    model: Annotated[
        str | None,
        Field(description="Catalogue name for kinds sentence and language_model; null: the pair's first model."),
    ] = None
    layers: Annotated[int, Field(ge=1, description="Of the transformer over bytes.")] = 6
    width: Annotated[int, Field(ge=8, description="Of the transformer over bytes and of the pooling.")] = 256
    heads: Annotated[int, Field(ge=1)] = 8
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    lora: Annotated[LoraSettings, Field(description="Of kind language_model.")] = LoraSettings()
    max_length: Annotated[
        int, Field(ge=8, description="Longest text: bytes for kind bytes, else tokens of the encoder's own.")
    ] = 4096
    overlong: Annotated[
        Literal["error", "cut_end", "cut_start"],
        Field(description="A text over max_length: refuse it, or cut it at one end and count."),
    ] = "error"
    max_cut_share: Annotated[
        Share, Field(description="Refuse a split of which a larger share would be cut; for overlong other than error.")
    ] = 0.0

    @model_validator(mode="after")
    def heads_divide_width(self) -> EncoderSettings:
        """Refuse a width that the attention heads cannot share, and a sentence encoder without a model."""
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) must be a multiple of heads ({self.heads})")
        if self.kind == "sentence" and self.model is None:
            raise ValueError("kind sentence needs 'model': the catalogue name of a sentence encoder (minilm_l6)")
        return self


class AdapterSettings(StrictModel):
    """From Z to one model's embedding space: LayerNorm, an MLP with a skip, optional FiLM, and a calibrated size."""

    hidden_multiple: Annotated[float, Field(gt=0, description="Width of the MLP as a multiple of d_z.")] = 4.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    film: Annotated[bool, Field(description="Scale and shift each vector by the mean of the example's Z.")] = False
    calibration: Annotated[
        Literal["none", "embed_rms", "fixed", "train_stats"],
        Field(
            description="Size of each example's prefix: as it comes, the RMS of the model's embeddings, `rms`, or the "
            "RMS of the embeddings of the training texts' tokens."
        ),
    ] = "embed_rms"
    rms: Annotated[float, Field(gt=0, description="Of calibration fixed.")] = 0.05


class ReaderSettings(StrictModel):
    """How a frozen model reads a prefix or a text. Training and evaluation share every one of these."""

    anchor: Annotated[
        str,
        Field(
            min_length=1,
            description="Text between the prompt and the answer. White space at its end goes to the answer's first "
            "token, where tokenizers put it.",
        ),
    ] = "Answer: "
    bos: Annotated[
        Literal["auto", "always", "never"],
        Field(description="A beginning-of-sequence token before the prefix; auto: as the tokenizer does for a text."),
    ] = "auto"
    text_prompt: Annotated[
        PromptStyle,
        Field(description="The full-text arm and the teacher: chat_full, content_only; auto: chat with a template."),
    ] = "auto"
    padding: Annotated[
        Literal["left", "right"], Field(description="Side on which shorter prompts of a batch are padded.")
    ] = "left"
    precision: Precision = "auto"
    lora: Annotated[LoraSettings | None, Field(description="Train a LoRA in each reader; null: frozen.")] = None
    prefix_tuning: Annotated[
        int, Field(ge=0, description="Learned keys and values per layer before every prompt, the same for all texts.")
    ] = 0
    deep_prefix: Annotated[
        bool, Field(description="Z also gives keys and values to every layer (M positions), not only embeddings.")
    ] = False


class LossSettings(StrictModel):
    """Weights of the terms; each is a mean over an example's answer tokens, then over models and examples."""

    ce: Annotated[float, Field(ge=0, description="Teacher-forced cross entropy of the whole answer.")] = 1.0
    first_token: Annotated[float, Field(ge=0, description="Cross entropy of the answer's first token.")] = 0.5
    first_token_autoscale: Annotated[
        bool,
        Field(description="Weigh an example's first token by its loss over the answer's mean, within [1/4, 4]."),
    ] = False
    first_k: Annotated[float, Field(ge=0, description="Cross entropy of the first k tokens.")] = 0.0
    k: Annotated[int, Field(ge=1, description="K of first_k, kd and state_kd.")] = 4
    kd: Annotated[
        float, Field(ge=0, description="tau^2 KL(model on text || model on latent) over the first k steps.")
    ] = 0.0
    temperature: Annotated[float, Field(gt=0, description="tau of kd.")] = 1.0
    state_kd: Annotated[
        float, Field(ge=0, description="Relative squared distance of the final hidden states over the first k steps.")
    ] = 0.0
    scale: Annotated[float, Field(ge=0, description="Square of the adapter's scale minus 1.")] = 0.0
    rms: Annotated[
        float, Field(ge=0, description="Square of log(RMS of the uncalibrated prefix / RMS of the embeddings).")
    ] = 0.0
    gist: Annotated[
        float, Field(ge=0, description="Cross entropy of the text's first bytes, decoded from Z alone by a small head.")
    ] = 0.0
    gist_bytes: Annotated[int, Field(ge=1)] = 64

    @property
    def needs_teacher(self) -> bool:
        """Whether a term compares with the model on the full text."""
        return self.kd > 0 or self.state_kd > 0


class CurriculumSettings(StrictModel):
    """What makes the beginning of training easier, or the latents more robust; 0 switches each off."""

    text_warmup: Annotated[
        float,
        Field(ge=0, lt=1, description="Share of the steps in which the text stands before the prefix, ever shorter."),
    ] = 0.0
    latent_dropout: Annotated[
        float, Field(ge=0, lt=1, description="Share of an example's vectors that the readers do not see at the start.")
    ] = 0.0
    latent_dropout_end: Annotated[float, Field(ge=0, lt=1, description="The same at the last step.")] = 0.0


class TeacherSettings(StrictModel):
    """The model on the full text, for kd and state_kd."""

    targets: Annotated[
        Literal["cached", "online"],
        Field(description="Targets from the teacher cache, or from a second forward pass in each step."),
    ] = "cached"
    batch_tokens: Annotated[int, Field(ge=16, description="Token budget of one teacher forward pass.")] = 8192


class CacheSettings(StrictModel):
    """What determines a text teacher's targets, and nothing else: channels that agree on it share one cache."""

    anchor: str
    bos: Literal["auto", "always", "never"]
    text_prompt: PromptStyle
    precision: Precision
    train_examples: int | None
    batch_tokens: int

    @property
    def name(self) -> str:
        """A name for paths, different wherever the targets are."""
        return f"{self.text_prompt}-hidden-{short_digest(self.model_dump(mode='json'))}"


def _training() -> TrainingSettings:
    return TrainingSettings(
        steps=32_850,  # 24 epochs of 87,599 examples
        batch_size=64,
        micro_batch_tokens=65_536,
        learning_rate=1e-4,
        schedule=ScheduleSettings(warmup_steps=500),
        save_every=1369,
        resume_every=200,
    )


class RunSettings(StrictModel):
    """Everything that the training of one channel reads."""

    seed_offset: Annotated[int, Field(description="Added to the seed, for replicas of a condition.")] = 0
    latent: LatentSettings = LatentSettings()
    encoder: EncoderSettings = EncoderSettings()
    adapter: AdapterSettings = AdapterSettings()
    reader: ReaderSettings = ReaderSettings()
    losses: LossSettings = LossSettings()
    curriculum: CurriculumSettings = CurriculumSettings()
    teacher: TeacherSettings = TeacherSettings()
    sequential_models: Annotated[
        bool, Field(description="One model's backward pass after the other's: less memory, the same gradient.")
    ] = False
    train_examples: Annotated[int | None, Field(ge=1, description="Use the first N examples; null: all.")] = None
    diagnostics_every: Annotated[int, Field(ge=1, description="Steps between rows of diagnostics.jsonl.")] = 500
    training: Annotated[
        TrainingSettings, Field(description="Its method, lora and packing mean nothing here and stay as they are.")
    ] = _training()

    @property
    def cache(self) -> CacheSettings | None:
        """The teacher cache that this channel's training reads from each model; None if it reads none."""
        if not self.losses.needs_teacher or self.teacher.targets == "online":
            return None
        return CacheSettings(
            **{name: getattr(self.reader, name) for name in ("anchor", "bos", "text_prompt", "precision")},
            train_examples=self.train_examples,
            batch_tokens=self.teacher.batch_tokens,
        )

    def leaves(self) -> dict[str, Any]:
        """The settings that this channel's training reads: others would only make it run again."""
        leaves = self.model_dump(mode="json")
        for unread in ("method", "lora", "packing"):
            del leaves["training"][unread]
        if self.encoder.kind != "language_model":
            del leaves["encoder"]["lora"]
        if not self.losses.needs_teacher:
            del leaves["teacher"]
        elif self.teacher.targets == "cached":
            del leaves["teacher"]["batch_tokens"]
        return leaves

    @model_validator(mode="after")
    def settings_fit_each_other(self) -> RunSettings:
        """Refuse a loss of nothing, and settings that this study does not read."""
        unread = TrainingSettings()
        for name in ("method", "lora", "packing"):
            if getattr(self.training, name) != getattr(unread, name):
                raise SettingError(
                    ("training", name),
                    "is not read here: set reader.lora or encoder.lora, which train beside frozen models",
                )
        if self.training.gradient_checkpointing and (self.reader.deep_prefix or self.reader.prefix_tuning):
            raise SettingError(
                ("training", "gradient_checkpointing"),
                "cannot recompute activations behind the keys and values of reader.deep_prefix or prefix_tuning: "
                "switch one off",
            )
        if not any((self.losses.ce, self.losses.first_token, self.losses.first_k, self.losses.needs_teacher)):
            raise SettingError(("losses",), "at least one of ce, first_token, first_k, kd and state_kd must be above 0")
        return self
