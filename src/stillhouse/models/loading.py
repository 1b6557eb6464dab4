"""Models and tokenizers from directories: safetensors only, no network, and each fault named in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stillhouse.config.training import Precision
from stillhouse.models.precision import default_device, resolve_precision, torch_dtype
from stillhouse.runtime.errors import UserError

Module = TypeVar("Module", bound=nn.Module)


def load_model(
    path: Path | str,
    precision: Precision,
    device: torch.device | str | None = None,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    master_weights: bool = False,
    in_8bit: bool = False,
) -> PreTrainedModel:
    """Load a causal language model, in evaluation mode, onto `device` (default: the GPU where there is one).

    `master_weights` keeps the weights in fp32 whatever the precision: full fine-tuning needs it, since
    loading in bf16 and casting back would lose bits. `in_8bit` quantises linear weights with bitsandbytes, for
    models that are never trained. Raises `UserError` for a directory that is missing, incomplete or damaged.
    """
    path = Path(path)
    device = torch.device(device) if device is not None else default_device()
    check_weights(path)
    dtype = torch.float32 if master_weights else torch_dtype(resolve_precision(precision, device))
    # A quantised model is placed while it is loaded, and cannot be moved as others can.
    placement: dict[str, Any] = (
        {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}} if in_8bit else {}
    )
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **placement,
        )
    except (ValueError, ImportError, OSError, KeyError) as error:
        raise UserError(f"{path}: transformers cannot load this model: {_first_line(error)}") from error
    if report["missing_keys"]:
        # transformers would go on with random weights in their place.
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(f"{path}: the weights lack {len(report['missing_keys'])} tensors ({names}): fetch it again")
    loaded: PreTrainedModel = model if in_8bit else model.to(device)
    return loaded.eval()


def load_tokenizer(path: Path | str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer; raises `UserError` where the directory or its files are missing or unreadable."""
    path = Path(path)
    _check_directory(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise UserError(f"{path}: the tokenizer cannot be loaded: {_first_line(error)}") from error
    return tokenizer


def frozen(model: Module) -> Module:
    """The same model in evaluation mode, none of its parameters trained."""
    model.requires_grad_(False)
    return model.eval()


@contextmanager
def evaluation_mode(model: Module) -> Iterator[Module]:
    """Evaluation mode as a context; every module's own mode is restored exactly on leaving.

    `.eval()` on modules that are being trained would otherwise stop their dropout for good, silently.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, mode in modes.items():
            module.training = mode


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recompute activations in the backward pass; inputs must require a gradient where the base is frozen."""
    for name in ("gradient_checkpointing_enable", "enable_input_require_grads"):
        if not hasattr(model, name):
            raise UserError(f"gradient_checkpointing: {type(model).__name__} does not offer {name}: switch it off")
    checkpointed: Any = model
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed.enable_input_require_grads()  # after enabling: transformers keeps only one set of hooks


def check_weights(path: Path) -> None:
    """Check that `path` has a config and whole safetensors files; a `UserError` names the file at fault."""
    _check_directory(path)
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: has no config.json: it is not a transformers model directory")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise UserError(f"{path}: has no safetensors weights (pickled weights are never loaded): convert them first")
    for file in files:
        check_safetensors(file)


def check_safetensors(file: Path) -> None:
    """Check a safetensors header against the file's size; a `UserError` where it is missing or damaged."""
    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except FileNotFoundError:
        raise UserError(f"{file}: does not exist: run the rule that makes it") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: is corrupt or half written ({_first_line(error)}): delete it and make it again"
        ) from None


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        raise UserError(f"{path}: no such model directory: run the rule that makes it, or correct the path")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
