"""LoRA through peft: adding an adapter, telling checkpoints apart, and the base model behind an adapter.

With the adapter off, a student's own base is the teacher: one copy of the weights serves both.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from stillhouse.config.training import LoraSettings, Precision, TrainingSettings
from stillhouse.models.loading import check_safetensors, check_weights, evaluation_mode, load_model
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.seeds import derived_seed

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CheckpointKind = Literal["lora", "full"]


def add_lora(model: PreTrainedModel, settings: LoraSettings, seed: int) -> PeftModel:
    """Wrap `model` with a new adapter in fp32; its base is frozen. The same seed gives the same initial
    weights.

    Raises `UserError` for a target module that the model lacks: peft ignores one that is missing among
    others.
    """
    _check_target_modules(model, settings.target_modules)
    configuration = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
    )
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(seed, "lora"))
        adapted = get_peft_model(model, configuration)
    assert isinstance(adapted, PeftModel)
    return adapted


def load_trainable(
    path: Path | str,
    settings: TrainingSettings,
    seed: int,
    device: torch.device | str | None = None,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
) -> PreTrainedModel | PeftModel:
    """A model ready for the training loop: a frozen base with a new adapter, or all weights in fp32."""
    full = settings.method == "full"
    model = load_model(path, settings.precision, device, attention, trust_remote_code, master_weights=full)
    return model if full else add_lora(model, settings.lora, seed)


def checkpoint_kind(path: Path | str) -> CheckpointKind:
    """Whether a directory holds an adapter or a whole model; a `UserError` where it holds neither."""
    path = Path(path)
    if (path / ADAPTER_CONFIG).is_file():
        return "lora"
    if (path / "config.json").is_file():
        return "full"
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint: train it first, or correct the step")
    raise UserError(f"{path}: holds neither {ADAPTER_CONFIG} nor config.json: it is not a checkpoint")


def load_checkpoint(model: PreTrainedModel | PeftModel, path: Path | str) -> PreTrainedModel | PeftModel:
    """The model with the weights of a checkpoint, in evaluation mode, nothing trained.

    An adapter is put on `model` in place of any that it has; a full checkpoint is loaded afresh with the
    type, device and attention of `model`, which is left as it is.
    Raises `UserError` for a damaged checkpoint and for one of another architecture.
    """
    path = Path(path)
    base = model.unload() if isinstance(model, PeftModel) else model
    if checkpoint_kind(path) == "full":
        check_weights(path)
        precision: Precision = "bf16" if base.dtype == torch.bfloat16 else "fp32"
        return load_model(path, precision, base.device, attention=base.config._attn_implementation)
    check_safetensors(path / ADAPTER_WEIGHTS)
    try:
        return PeftModel.from_pretrained(base, str(path)).eval()
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: the adapter does not fit {type(base).__name__}: {reason}") from error


@contextmanager
def adapter_disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base model behind an adapter, in evaluation mode, as a context.

    Every module's training mode and every parameter's `requires_grad` is restored exactly on leaving.
    """
    if not isinstance(model, PeftModel):
        raise TypeError("only a model with an adapter has a base to go back to: load the teacher separately")
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with evaluation_mode(model), model.disable_adapter():
            yield model
    finally:
        for parameter, required in trained.items():
            parameter.requires_grad_(required)


def _check_target_modules(model: nn.Module, targets: tuple[str, ...]) -> None:
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            nearest = difflib.get_close_matches(target, known, n=1, cutoff=0)
            raise UserError(
                f"lora.target_modules: {type(model).__name__} has no linear module '{target}'; "
                f"nearest: '{nearest[0] if nearest else ''}', all: {', '.join(known)}"
            )
