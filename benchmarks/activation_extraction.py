"""Activation extraction: each document is read to its chosen token and to the layer, in batches of like length.

Beside one plain pass per document, and padded batches with all hidden states, as transformers offers them. `forward
alone` is the model's own rate: its first layers over batches of the same lengths, nothing chosen or kept.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.harness import Aim, Benchmark, Floor, Form, Outcome, Work
from benchmarks.scale import Scale, model_directory, random_ids
from stillhouse.models.activations import residual_stream
from stillhouse.models.loading import frozen, load_model
from stillhouse.models.prefix import token_batches
from stillhouse.studies.consistency_lens.activations import extract_activations
from stillhouse.studies.consistency_lens.data import Example, choose_position, pad_contexts
from stillhouse.studies.consistency_lens.run_settings import PositionSettings

BATCH = 8


def layer(scale: Scale) -> int:
    """Half way up."""
    return scale.layers // 2


def examples(scale: Scale) -> list[Example]:
    """Documents of half a context to a whole one, with random positions as the default policy draws them."""
    drawing = torch.Generator().manual_seed(0)
    lengths = torch.randint(scale.context // 2, scale.context + 1, (scale.documents,), generator=drawing).tolist()
    return [
        Example(
            str(number),
            torch.tensor(random_ids(length, scale, number)),
            choose_position(length, PositionSettings(), str(number)),
        )
        for number, length in enumerate(lengths)
    ]


def model_of(folder: Path, scale: Scale) -> PreTrainedModel:
    """The frozen model."""
    return frozen(load_model(model_directory(folder, scale), scale.precision))


def all_hidden_states(batch: int, folder: Path, scale: Scale) -> Work:
    """Whole documents through all layers and the lm_head, `batch` at a time."""
    model, found = model_of(folder, scale), examples(scale)

    @torch.no_grad()
    def work() -> Outcome:
        rows: list[Tensor] = []
        for start in range(0, len(found), batch):
            chosen = found[start : start + batch]
            ids = torch.nn.utils.rnn.pad_sequence([example.token_ids for example in chosen], batch_first=True)
            mask = torch.arange(ids.shape[1]) < torch.tensor([len(example.token_ids) for example in chosen])[:, None]
            states = model(
                input_ids=ids.to(model.device),
                attention_mask=mask.long().to(model.device),
                output_hidden_states=True,
                use_cache=False,
            ).hidden_states
            positions = [example.position for example in chosen]
            rows += states[layer(scale)][range(len(chosen)), positions].float().cpu()
        return {"activations": torch.stack(rows)}

    return work


def one_at_a_time(folder: Path, scale: Scale) -> Work:
    """The naive form."""
    return all_hidden_states(1, folder, scale)


def padded_batches(folder: Path, scale: Scale) -> Work:
    """In the order in which the documents come."""
    return all_hidden_states(BATCH, folder, scale)


def forward_alone(folder: Path, scale: Scale) -> Work:
    """The first layers over the extraction's batches."""
    model, found = model_of(folder, scale), examples(scale)
    batches = [
        pad_contexts([found[place] for place in batch])[0].to(model.device)
        for batch in token_batches([example.position + 1 for example in found], scale.batch_tokens)
    ]

    @torch.no_grad()
    def work() -> Outcome:
        for input_ids in batches:
            last = residual_stream(model, layer(scale), input_ids=input_ids, use_cache=False)
        return {"last": last}

    return work


def extraction(folder: Path, scale: Scale) -> Work:
    """Ours."""
    model, found = model_of(folder, scale), examples(scale)
    return lambda: {"activations": extract_activations(model, layer(scale), found, scale.batch_tokens)}


def floor(folder: Path, scale: Scale) -> Floor:
    """The documents to their tokens, through the layers below."""
    lengths = [example.position + 1 for example in examples(scale)]
    pairs = sum(length * (length + 1) / 2 for length in lengths)
    share = layer(scale) / scale.layers
    return Floor(share * scale.operations(sum(lengths), pairs, 0), share * scale.weight_bytes, sum(lengths))


EXTRACTION = Benchmark(
    name="activation_extraction",
    what="activation extraction",
    forms=(
        Form("one document at a time", "naive", one_at_a_time),
        Form("padded batches", "tool", padded_batches),
        Form("forward alone", "other", forward_alone, equals=None),
        Form("extraction", "ours", extraction),
    ),
    aims=(
        Aim("one document at a time", "time", 3),
        Aim("padded batches", "time", 3),
        Aim(
            "forward alone",
            "time",
            0.9,
            cause="Both do the same operations. Within its time the extraction also sorts the documents by length, "
            "pads each batch, and gathers and copies the chosen rows; `forward alone` finds its batches ready.",
        ),
    ),
    floor=floor,
    floor_formula="layers up to the chosen one / all layers x forward(tokens up to the chosen one)",
    remains="Padding within a batch of like lengths, and attention over whole squares.",
)
