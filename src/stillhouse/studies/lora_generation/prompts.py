"""The prompts that stand for an adapter: `prompts.json` in its folder, examples of the shard that it learnt from."""

from __future__ import annotations

from pathlib import Path

from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json

PROMPTS_FILE = "prompts.json"


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, in order. Raises `UserError` for a file that is missing, damaged or without prompts."""
    content = read_json(path)
    prompts = content.get("prompts") if isinstance(content, dict) else None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(f"{path}: holds no list 'prompts' of texts: make the adapter again")
    return prompts
