"""Packing, gradient accumulation and the number of processes change neither loss nor gradients, only time.

`padded` is what a collator of transformers makes. Two processes share the batch over gloo, as the loop does it; they
are compared and not timed, since both run on the cores of one.
"""

from __future__ import annotations

import os
import socket
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import Benchmark, Floor, Form, Outcome, Work
from benchmarks.instruments import clean_processes
from benchmarks.scale import Scale, loss_and_gradients, model_directory, random_ids, student
from stillhouse.data.packing import AnswerBatch, Sequence, answer_rows_logits, pack, pad
from stillhouse.training.processes import process_state, sum_gradients, sum_statistics


def sequences(scale: Scale) -> list[Sequence]:
    """A batch in which the longest sequence has four times the tokens of the shortest."""
    found = []
    for number in range(scale.batch):
        longest = scale.prompt + 4 * scale.answer
        length = longest // 4 + number * (longest - longest // 4) // max(1, scale.batch - 1)
        found.append(Sequence(random_ids(length, scale, number), max(1, length // 3), str(number)))
    return found


def answer_loss(model: torch.nn.Module, batch: AnswerBatch) -> Tensor:
    """Sum of the cross entropy of the answers' tokens."""
    on_device = batch.to(next(model.parameters()).device)
    return functional.cross_entropy(answer_rows_logits(model, on_device).float(), on_device.labels, reduction="sum")


def in_batches(batches: list[AnswerBatch], folder: Path, scale: Scale) -> Work:
    """Loss and gradients of the whole, accumulated over the batches and divided once."""
    model = student(model_directory(folder, scale), scale)
    count = sum(batch.answer_tokens for batch in batches)

    def work() -> Outcome:
        total: dict[str, Tensor] = {}
        for batch in batches:
            for name, value in loss_and_gradients(model, answer_loss(model, batch) / count).items():
                total[name] = total[name] + value if name in total else value
        return total

    return work


def packed(folder: Path, scale: Scale) -> Work:
    """Ours."""
    return in_batches([pack(sequences(scale))], folder, scale)


def padded(folder: Path, scale: Scale) -> Work:
    """A rectangle."""
    return in_batches([pad(sequences(scale))], folder, scale)


def accumulated(folder: Path, scale: Scale) -> Work:
    """One sequence in each micro-batch."""
    return in_batches([pack([sequence]) for sequence in sequences(scale)], folder, scale)


def two_processes(folder: Path, scale: Scale) -> Work:
    """Each takes its share and sums its gradients with the other's."""

    def work() -> Outcome:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with ProcessPoolExecutor(2, mp_context=clean_processes()) as pool:
            first, _ = pool.map(partial(of_process, port, folder, scale), range(2))
        return {name: torch.from_numpy(value) for name, value in first.items()}

    return work


def of_process(port: int, folder: Path, scale: Scale, rank: int) -> dict[str, object]:
    """Loss and gradients of the whole batch as one of two processes ends up with them."""
    os.environ |= {
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }
    torch.set_num_threads(1)
    state = process_state()
    model = student(model_directory(folder, scale), scale).to("cpu")
    own = sequences(scale)[rank::2]
    total = torch.zeros(())
    for batch in (pack([sequence]) for sequence in own):
        loss = answer_loss(model, batch)
        loss.backward()
        total = total + loss.detach()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    sum_gradients(trained.values())
    count = sum(len(sequence.answer_ids) for sequence in sequences(scale))
    loss_sum = sum_statistics({"loss": total}, torch.device("cpu"))["loss"]
    gradients = {name: (parameter.grad / count).numpy() for name, parameter in trained.items()}
    state.destroy_process_group()
    return {"loss": torch.tensor(loss_sum / count).numpy(), **gradients}


def floor(folder: Path, scale: Scale) -> Floor:
    """Every sequence once, forward and backward, its answer rows through the lm_head."""
    found = sequences(scale)
    tokens, rows = sum(map(len, found)), sum(len(sequence.answer_ids) for sequence in found)
    pairs = sum(len(sequence) * (len(sequence) + 1) / 2 for sequence in found)
    return Floor(2 * scale.operations(tokens, pairs, rows), 2 * scale.weight_bytes, tokens)


INVARIANCE = Benchmark(
    name="packing",
    what="packing, gradient accumulation, world size",
    forms=(
        Form("one sequence at a time, accumulated", "naive", accumulated),
        Form("padded rectangle", "tool", padded),
        Form("two processes", "other", two_processes, timed=False),
        Form("packed", "ours", packed),
    ),
    aims=(),
    floor=floor,
    floor_formula="2 x forward(tokens, attention of each sequence to itself, answer rows)",
    remains="Packed sequences share one mask: attention computes the square of the whole row.",
)
