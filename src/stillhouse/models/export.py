"""Real conversion: a merged and quantised model as a directory that transformers loads, and vLLM for int4.

Each format is written in the layout of the library that reads it. The numbers are those of `quantization`, so that
the exported model computes what the fake-quantised one did.
"""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.config.training import Precision


def export_quantized(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase | None, directory: Path
) -> None:
    """Write a model that `fake_quantized` has gone over, its adapter merged, its weights converted, to `directory`.

    The caller stages the directory and writes its manifest.
    """
    raise NotImplementedError


def load_exported(
    directory: Path | str, precision: Precision = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load what `export_quantized` wrote (or llmcompressor), in evaluation mode, its weights decompressed."""
    raise NotImplementedError
