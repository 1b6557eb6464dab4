"""What was weighed for every step of training: each as a benchmark of ours beside the other choice.

The page lists them apart: which was taken, and by how much. They run at the scale of the other benchmarks.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from benchmarks.consistency_lens import floor as lens_floor
from benchmarks.consistency_lens import outcome as lens_outcome
from benchmarks.harness import Benchmark, Floor, Form, Outcome, Work
from benchmarks.packing import answer_loss, sequences
from benchmarks.packing import floor as packing_floor
from benchmarks.scale import Scale, loss_and_gradients, model_directory, student
from stillhouse.data.packing import AnswerBatch, pack
from stillhouse.models.precision import default_device
from stillhouse.studies.consistency_lens.model import Lens
from stillhouse.studies.consistency_lens.run_settings import LensSettings
from stillhouse.training.checkpoints import Progress, save_state
from stillhouse.training.loading import Loader
from stillhouse.training.optimizers import ParameterGroup, build_optimizer

ANSWER_ROWS, CHUNK, UPDATES = 2048, 512, 2


def head_loss(rows_at_once: int, folder: Path, scale: Scale) -> Work:
    """Cross entropy and the squared distance of K logits through frozen output embeddings, so many rows at once.

    A chunk's logits are made again in the backward pass, so that only one chunk's exist, as in a fused head.
    """
    drawing = torch.Generator().manual_seed(0)
    weight = torch.randn(scale.vocabulary, scale.width, generator=drawing).to(default_device()) * scale.width**-0.5
    hidden = nn.Parameter(torch.randn(ANSWER_ROWS, scale.width, generator=drawing).to(default_device()))
    labels = torch.randint(scale.vocabulary, (ANSWER_ROWS,), generator=drawing).to(default_device())
    top = torch.randint(scale.vocabulary, (ANSWER_ROWS, scale.top_k), generator=drawing).to(default_device())

    def of_rows(states: Tensor, labels: Tensor, top: Tensor) -> Tensor:
        logits = functional.linear(states, weight).float()
        cross_entropy = functional.cross_entropy(logits, labels, reduction="sum")
        return cross_entropy + logits.gather(1, top).square().mean(1).sum()

    def work() -> Outcome:
        if rows_at_once >= ANSWER_ROWS:
            loss = of_rows(hidden, labels, top)
        else:
            parts = zip(hidden.split(rows_at_once), labels.split(rows_at_once), top.split(rows_at_once), strict=True)
            losses = [checkpoint(of_rows, *part, use_reentrant=False) for part in parts]
            loss = torch.stack(losses).sum()
        return {"loss": loss.detach(), "gradient": torch.autograd.grad(loss, hidden)[0]}

    return work


def head_floor(folder: Path, scale: Scale) -> Floor:
    """The rows through the lm_head, forward and backward."""
    weight_bytes = 4 * scale.vocabulary * scale.width
    return Floor(scale.operations(0, 0, 2 * ANSWER_ROWS), 2 * weight_bytes, ANSWER_ROWS)


def one_after_another(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW as a loop over tensors, torch's default on a processor."""
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0, foreach=False, fused=False)


def fused(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The loop's own."""
    named = {str(number): parameter for number, parameter in enumerate(parameters)}
    return build_optimizer([ParameterGroup("base", named)], 1e-3, 0.0)


def update(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], folder: Path, scale: Scale) -> Work:
    """The first updates of a LoRA's tensors."""
    model = student(model_directory(folder, scale), scale)
    start = [parameter.detach().float() for parameter in model.parameters() if parameter.requires_grad]

    def work() -> Outcome:
        parameters = [nn.Parameter(value.clone()) for value in start]
        optimizer = make(parameters)
        for _ in range(UPDATES):
            for parameter, value in zip(parameters, start, strict=True):
                parameter.grad = value
            optimizer.step()
        return {str(number): parameter.detach() for number, parameter in enumerate(parameters)}

    return work


def update_floor(folder: Path, scale: Scale) -> Floor:
    """Weights, gradients and moments are read, all but the gradients written; about twelve operations a weight."""
    model = student(model_directory(folder, scale), scale)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Floor(12 * UPDATES * count, 28 * UPDATES * count, UPDATES)


def lens_step(compiled: bool, folder: Path, scale: Scale) -> Work:
    """The lens decoder's step with `lens.compile`, or without; what is compiled is kept in the run's own folder."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")
    settings = LensSettings(layer=1, text_length=scale.text_length, compile=compiled)
    lens = Lens.build(model_directory(folder, scale), settings, scale.precision)
    drawing = torch.Generator().manual_seed(0)
    activations = torch.randn(scale.batch, scale.width, generator=drawing).to(lens.decoder.prompt.device)

    def work() -> Outcome:
        torch.manual_seed(0)
        return lens_outcome(lens, lens.explain(activations).embeddings)

    return work


def in_place(make: Callable[[int, int], Iterator[AnswerBatch]], device: torch.device) -> Iterator[AnswerBatch]:
    """The micro-batches of all updates, each made and moved when it is wanted."""
    for step in range(1, UPDATES + 1):
        for batch in make(step, 10**9):
            yield batch.to(device)


def ahead(make: Callable[[int, int], Iterator[AnswerBatch]], device: torch.device) -> Iterator[AnswerBatch]:
    """The loop's own for a GPU."""
    with closing(Loader(make, UPDATES, device, ahead=True)) as loader:
        for step in range(1, UPDATES + 1):
            for batch, _ in loader.micro_batches(step, 10**9):
                yield batch


def loaded_steps(
    load: Callable[[Callable[[int, int], Iterator[AnswerBatch]], torch.device], Iterator[AnswerBatch]],
    folder: Path,
    scale: Scale,
) -> Work:
    """Forward and backward passes of some updates with a micro-batch each."""
    model, found = student(model_directory(folder, scale), scale), sequences(scale)

    def work() -> Outcome:
        for batch in load(lambda step, budget: iter([pack(found)]), model.device):
            outcome = loss_and_gradients(model, answer_loss(model, batch) / batch.answer_tokens)
        return outcome

    return work


def loading_floor(folder: Path, scale: Scale) -> Floor:
    """The passes."""
    one = packing_floor(folder, scale)
    return Floor(UPDATES * one.operations, UPDATES * one.bytes, UPDATES * one.tokens)


def saved_step(saves: bool, folder: Path, scale: Scale) -> Work:
    """A forward and backward pass, and an update; then its resumable state, flushed to disk."""
    model, batch = student(model_directory(folder, scale), scale), pack(sequences(scale))
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = build_optimizer([ParameterGroup("base", parameters)], 0.0, 0.0)
    place = Path(tempfile.mkdtemp(dir=folder))

    def work() -> Outcome:
        found = loss_and_gradients(model, answer_loss(model, batch.to(model.device)) / batch.answer_tokens)
        for name, parameter in parameters.items():
            parameter.grad = found[name]
        optimizer.step()
        if saves:
            save_state(place, Progress(step=1), parameters, optimizer, keep=1)
        return found

    return work


HEAD = Benchmark(
    name="head_in_chunks",
    what=f"loss of {ANSWER_ROWS} answer rows",
    forms=(
        Form(f"in chunks of {CHUNK}, made again in the backward pass", "other", partial(head_loss, CHUNK)),
        Form("all at once", "ours", partial(head_loss, ANSWER_ROWS)),
    ),
    aims=(),
    floor=head_floor,
    floor_formula="2 x answer rows through the lm_head",
    remains="Left out: a fused head makes every chunk's logits twice. It saves memory alone, and `micro_batch_tokens`, "
    "which bounds the rows of a pass, saves that without a second product.",
)
UPDATE = Benchmark(
    name="adamw_update",
    what=f"AdamW, {UPDATES} updates of a LoRA's tensors",
    forms=(
        Form("one tensor after another", "other", partial(update, one_after_another)),
        Form("fused", "ours", partial(update, fused)),
    ),
    aims=(),
    floor=update_floor,
    floor_formula="28 bytes a weight",
    remains="Taken, on processors too.",
)
COMPILE = Benchmark(
    name="compiled_lens",
    what="torch.compile, lens decoder of T = 10",
    forms=(
        Form("compiled blocks", "other", partial(lens_step, True), counted=False),
        Form("plain blocks", "ours", partial(lens_step, False)),
    ),
    aims=(),
    floor=lens_floor,
    floor_formula="as of the lens decoder",
    remains="`lens.compile` is off by default. On a processor it does not pay: its first step takes as long as "
    "hundreds of later ones, and those are hardly faster, if at all. Open on GPUs. Other studies, whose rows change in "
    "length and number, have no such switch.",
    change=lambda scale: replace(scale, text_length=min(10, scale.text_length), rounds=min(3, scale.rounds)),
)
LOADING = Benchmark(
    name="loading",
    what=f"micro-batches of {UPDATES} steps",
    forms=(
        Form("made ahead in a thread", "other", partial(loaded_steps, ahead)),
        Form("made in the step", "ours", partial(loaded_steps, in_place)),
    ),
    aims=(),
    floor=loading_floor,
    floor_formula="steps x 2 x forward(tokens, attention of each sequence to itself, answer rows)",
    remains="The thread is left out on processors, where its parallel products compete with the step's. Open on GPUs: "
    "it is taken there, so that a step need wait neither for files nor for the copy to the device, and nothing is "
    "pinned, since the thread that starts the device's work does not copy; neither is measured yet.",
)
STATES = Benchmark(
    name="state_writes",
    what="a step, its resumable state on disk included",
    forms=(
        Form("with its state", "other", partial(saved_step, True)),
        Form("without", "ours", partial(saved_step, False)),
    ),
    aims=(),
    floor=packing_floor,
    floor_formula="2 x forward(tokens, attention of each sequence to itself, answer rows)",
    remains="Writing in the background is left out: it could save what exceeds 1 here, once in `training.resume_every` "
    "(50) steps, and a run killed meanwhile would find its newest state unfinished.",
)
WEIGHED: dict[str, Benchmark] = {one.name: one for one in (HEAD, UPDATE, COMPILE, LOADING, STATES)}
# What no form here can measure.
NOT_MEASURED = {
    "varlen (flash) attention": "its kernels run on GPUs alone. Rows of 512 tokens keep the square of a packed row "
    "small; what attention to other sequences still costs is part of the packing row's *FLOPs over floor*, which "
    "bounds the gain",
}
