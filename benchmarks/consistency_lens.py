"""How much faster the lens's decoder is with its differentiable KV cache than without, forward and backward.

    PYTHONPATH=src:. python benchmarks/consistency_lens.py [model=DIRECTORY] [batch=8] [lengths=[10,32]] [repeats=2]

Without a model, a random Llama of 4 layers of width 256 is made. The form without a cache, which the tests compare
with, reads the whole sequence again for each token.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse.config.base import StrictModel
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.files import write_manifest
from stillhouse.studies.consistency_lens.model import Lens
from stillhouse.studies.consistency_lens.run_settings import LensSettings
from tests.consistency_lens.lenses import naive_explanation
from tests.support.tiny_models import make_tiny_tokenizer


class Benchmark(StrictModel):
    """The command line."""

    model: Path | None = None
    batch: Annotated[int, Field(ge=1)] = 8
    lengths: tuple[Annotated[int, Field(ge=1)], ...] = (10, 32)
    repeats: Annotated[int, Field(ge=1)] = 2


def main(settings: Benchmark) -> None:
    """Print seconds of an explanation with its gradients, the best of the repeats, and the factor between the forms."""
    with tempfile.TemporaryDirectory() as folder:
        model_dir = settings.model or make_model(Path(folder) / "model")
        for length in settings.lengths:
            lens = Lens.build(model_dir, LensSettings(layer=1, text_length=length), "fp32")
            activations = torch.randn(settings.batch, lens.decoder.prompt.shape[1], device=lens.decoder.prompt.device)

            def cached(lens: Lens = lens, activations: Tensor = activations) -> Tensor:
                return lens.explain(activations).embeddings

            def uncached(lens: Lens = lens, activations: Tensor = activations) -> Tensor:
                return naive_explanation(lens, activations, 1.0, True)[1]

            fast, slow = (seconds(form, settings.repeats) for form in (cached, uncached))
            print(f"T = {length:3d}: cached {fast:.3f} s, uncached {slow:.3f} s, {slow / fast:.1f} times faster")


def seconds(form: Callable[[], Tensor], repeats: int) -> float:
    """The fastest of `repeats` forward and backward passes."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        form().square().sum().backward()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def make_model(directory: Path) -> Path:
    """A random model with a tokenizer."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    make_tiny_tokenizer().save_pretrained(directory)
    write_manifest(directory)
    return directory


if __name__ == "__main__":
    run_step(Benchmark, main)
