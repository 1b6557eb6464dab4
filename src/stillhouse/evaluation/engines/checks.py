"""What is checked before any engine starts, and what both engines must agree on: stop tokens, lengths, text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from stillhouse.config.evaluation import EngineSettings, GenerationSettings
from stillhouse.models.loading import check_safetensors
from stillhouse.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import MANIFEST, read_json, verify_manifest


def check_adapter(directory: Path) -> dict[str, Any]:
    """Refuse a directory that is no whole LoRA adapter, naming the file; return its adapter_config.json.

    A directory with a manifest is compared with it byte for byte, others by the weights file's own header.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: no such adapter directory: train it first or correct the path")
    if (directory / MANIFEST).is_file():
        verify_manifest(directory)
    config: dict[str, Any] = read_json(directory / ADAPTER_CONFIG)
    check_safetensors(directory / ADAPTER_WEIGHTS)
    return config


def context_length(model_directory: Path, settings: EngineSettings) -> int:
    """Tokens of prompt and answer that the engine takes: the setting, or less where the model ends earlier."""
    config = read_json(model_directory / "config.json")
    limit = config.get("max_position_embeddings") or config.get("text_config", {}).get("max_position_embeddings")
    return min(settings.max_model_length, limit or settings.max_model_length)


def check_prompt_lengths(
    prompts: Sequence[Sequence[int]], settings: GenerationSettings, limit: int, description: str
) -> None:
    """Refuse, before anything is generated, an empty prompt and one that leaves no room for the answer."""
    for index, prompt in enumerate(prompts):
        name = f"{description}: prompt {index}" if description else f"prompt {index}"
        if not prompt:
            raise UserError(f"{name} is empty")
        if len(prompt) + settings.max_new_tokens > limit:
            raise UserError(
                f"{name} has {len(prompt)} tokens, which with max_new_tokens {settings.max_new_tokens} is over the "
                f"limit of {limit}: raise engine.max_model_length (within what the model takes) or shorten the prompt"
            )


def stop_token_ids(model_directory: Path, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's, and those that the model's own files list."""
    found = {tokenizer.eos_token_id}
    for name in ("config.json", "generation_config.json"):
        if (model_directory / name).is_file():
            value = read_json(model_directory / name).get("eos_token_id")
            found.update(value if isinstance(value, list) else [value])
    return tuple(sorted(found - {None}))


def cut_at_stop(token_ids: Sequence[int], stop_ids: Collection[int]) -> tuple[tuple[int, ...], bool]:
    """The tokens before the first stop token, and whether there was one."""
    for position, token in enumerate(token_ids):
        if token in stop_ids:
            return tuple(token_ids[:position]), True
    return tuple(token_ids), False
