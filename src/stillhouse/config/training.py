"""Settings of the one training loop, shared by every study: optimiser, schedule, LoRA, checkpoints, trackers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stillhouse.config.base import StrictModel

Precision = Annotated[
    Literal["auto", "bf16", "fp32"],
    Field(description="auto: bf16 where the device computes in it, fp32 on other processors."),
]


class LoraSettings(StrictModel):
    """A LoRA adapter (arXiv 2106.09685), trained through peft."""

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )


class ScheduleSettings(StrictModel):
    """The learning rate's factor over optimiser updates: a linear warm-up, then one of six shapes."""

    kind: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "exponential"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    final_factor: Annotated[float, Field(ge=0, le=1, description="Factor reached at the last step.")] = 0.0
    cycles: Annotated[int, Field(ge=1, description="Number of cycles of cosine_with_restarts.")] = 1
    power: Annotated[float, Field(gt=0, description="Exponent of polynomial.")] = 1.0

    @model_validator(mode="after")
    def exponential_needs_a_final_factor(self) -> ScheduleSettings:
        """Refuse a geometric decay to zero, which has no rate."""
        if self.kind == "exponential" and self.final_factor == 0:
            raise ValueError("final_factor must be above 0 for kind exponential (it decays from 1 to final_factor)")
        return self


class TrainingSettings(StrictModel):
    """One training run. The effective batch is fixed here, never by the number of processes."""

    method: Literal["lora", "full"] = "lora"
    lora: LoraSettings = LoraSettings()
    steps: Annotated[int, Field(ge=1, description="Optimiser updates.")] = 1000
    batch_size: Annotated[int, Field(ge=1, description="Examples per optimiser update, over all processes.")] = 32
    micro_batch_tokens: Annotated[
        int,
        Field(
            ge=1,
            description="Token budget of one forward pass; changes speed, memory and what is drawn in a pass (dropout "
            "masks, Gumbel noise, latent dropout), else nothing beyond rounding.",
        ),
    ] = 8192
    packing: Annotated[bool, Field(description="Pack sequences into one row; false pads them.")] = True
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    learning_rate_multipliers: Annotated[
        dict[str, Annotated[float, Field(gt=0)]],
        Field(description="Factor per module name, for example {embed_tokens: 0.1}."),
    ] = {}
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_gradient_norm: Annotated[float, Field(gt=0)] = 1.0
    schedule: ScheduleSettings = ScheduleSettings()
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    sharding: Annotated[
        Literal["none", "fsdp", "zero2"],
        Field(
            description="Spread weights, gradients and moments of full fine-tuning over the processes (FSDP2); zero2 "
            "keeps a layer's weights gathered between its two passes. Equal results within rounding."
        ),
    ] = "none"
    save_every: Annotated[int, Field(ge=1, description="Steps between saved checkpoints.")] = 200
    resume_every: Annotated[int, Field(ge=1, description="Steps between resumable states in work/.")] = 50
    keep_resume_states: Annotated[int, Field(ge=1, description="Resumable states kept; older are pruned.")] = 2
    log_every: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def sharding_is_for_full_fine_tuning(self) -> TrainingSettings:
        """Refuse to shard what LoRA trains: a frozen base and its small adapter fit on each device."""
        if self.sharding != "none" and self.method != "full":
            raise ValueError(f"sharding {self.sharding} needs method full: set sharding to none for {self.method}")
        return self

    @model_validator(mode="after")
    def warmup_ends_before_training_does(self) -> TrainingSettings:
        """Refuse a warm-up longer than the run."""
        if self.schedule.warmup_steps >= self.steps:
            raise ValueError(f"schedule.warmup_steps ({self.schedule.warmup_steps}) must be below steps ({self.steps})")
        return self

    @property
    def saved_steps(self) -> tuple[int, ...]:
        """The steps whose weights are kept: every `save_every`, and the last."""
        return tuple(sorted({*range(self.save_every, self.steps + 1, self.save_every), self.steps}))


class TrackingSettings(StrictModel):
    """Where training curves go. TensorBoard is always written; others are accelerate's trackers by name."""

    trackers: tuple[Literal["wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "trackio"], ...] = ()
    project: str = "stillhouse"
