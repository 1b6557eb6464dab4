"""How fast activations are extracted, beside one plain forward pass at a time; their equality is checked on the way.

    PYTHONPATH=src:. python benchmarks/activation_extraction.py model=DIRECTORY [layer=6] [documents=64] ...

The naive form reads every document whole, alone, through all layers and the lm_head, and keeps one hidden state. The
extraction stops at the chosen token and at the layer, and batches documents of like length. Printed beside both: the
rate of the extraction's own batches through the whole model, which says how much batching alone brings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.config.base import StrictModel
from stillhouse.models.loading import frozen, load_model
from stillhouse.models.prefix import token_batches
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.studies.consistency_lens.activations import extract_activations
from stillhouse.studies.consistency_lens.data import Example, choose_position, pad_contexts
from stillhouse.studies.consistency_lens.run_settings import PositionSettings


class Benchmark(StrictModel):
    """The command line; documents of `shortest` to `longest` random tokens."""

    model: Path
    layer: Annotated[int, Field(ge=0)] = 6
    documents: Annotated[int, Field(ge=1)] = 64
    shortest: Annotated[int, Field(ge=8)] = 60
    longest: Annotated[int, Field(ge=8)] = 120
    batch_tokens: Annotated[int, Field(ge=1)] = 1024
    tolerance: Annotated[float, Field(gt=0, description="Of the relative error.")] = 1e-4


def main(settings: Benchmark) -> None:
    """Print documents per second of each form; refuse a result that differs from the naive one."""
    model = frozen(load_model(settings.model, "fp32"))
    examples = make_examples(settings, model.config.get_text_config().vocab_size)
    forms: dict[str, Callable[[], Tensor]] = {
        "one document at a time": lambda: one_at_a_time(model, settings.layer, examples),
        "batches through the whole model": lambda: whole_model(model, examples, settings.batch_tokens),
        "extraction": lambda: extract_activations(model, settings.layer, examples, settings.batch_tokens),
    }
    one_at_a_time(model, settings.layer, examples[:2])  # warm
    results, rates = {}, {}
    for name, form in forms.items():
        start = time.perf_counter()
        results[name] = form()
        rates[name] = len(examples) / (time.perf_counter() - start)
        print(f"{name}: {rates[name]:.1f} documents/s")
    naive, fast = results["one document at a time"], results["extraction"]
    error = float((naive - fast).norm() / naive.norm())
    print(f"extraction is {rates['extraction'] / rates['one document at a time']:.1f} times the naive form")
    print(f"relative difference of the activations: {error:.1e}")
    if error > settings.tolerance:
        raise UserError(f"the two forms differ by {error:.1e}, above tolerance {settings.tolerance:.0e}")


def make_examples(settings: Benchmark, vocabulary: int) -> list[Example]:
    """Documents of random tokens, with random positions as the default policy draws them."""
    chance = torch.Generator().manual_seed(0)
    lengths = torch.randint(settings.shortest, settings.longest + 1, (settings.documents,), generator=chance).tolist()
    return [
        Example(
            str(number),
            torch.randint(vocabulary, (length,), generator=chance),
            choose_position(length, PositionSettings(), str(number)),
        )
        for number, length in enumerate(lengths)
    ]


@torch.no_grad()
def one_at_a_time(model: PreTrainedModel, layer: int, examples: Sequence[Example]) -> Tensor:
    """[documents, hidden] by one plain pass each; the last layer's would be after the final norm."""
    rows = []
    for example in examples:
        states = model(example.token_ids[None].to(model.device), output_hidden_states=True).hidden_states
        rows.append(states[layer][0, example.position].float().cpu())
    return torch.stack(rows)


@torch.no_grad()
def whole_model(model: PreTrainedModel, examples: Sequence[Example], batch_tokens: int) -> Tensor:
    """The extraction's batches through every layer, without the lm_head."""
    last = torch.empty(0)
    for batch in token_batches([example.position + 1 for example in examples], batch_tokens):
        input_ids, _, _ = pad_contexts([examples[place] for place in batch])
        last = model.base_model(input_ids=input_ids.to(model.device), use_cache=False).last_hidden_state
    return last.cpu()


if __name__ == "__main__":
    run_step(Benchmark, main)
