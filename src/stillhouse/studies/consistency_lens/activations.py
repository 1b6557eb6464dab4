"""Step program: extract the activation of one token of each document, into shards, once for all runs that agree.

Cheap by construction: a document is read up to its chosen token only, the forward pass ends at the layer, and
documents of like length share a batch. Each shard is computed from its own documents alone, so that a killed
extraction goes on where it was, and several processes write what one would.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.config.base import StrictModel
from stillhouse.models.activations import residual_stream
from stillhouse.models.loading import frozen, load_model
from stillhouse.models.precision import default_device, resolve_precision
from stillhouse.models.prefix import token_batches
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import verify_manifest
from stillhouse.runtime.logs import configure_logging, logger
from stillhouse.runtime.records import RunRecord, fingerprint
from stillhouse.studies.consistency_lens.data import Example, TokenExamples, origin, pad_contexts
from stillhouse.studies.consistency_lens.run_settings import ActivationSettings
from stillhouse.studies.consistency_lens.shards import (
    ShardContent,
    ShardPlan,
    build_shards,
    plan_shards,
    publish_shards,
)
from stillhouse.studies.consistency_lens.tokens import SPLITS

MODULE = "stillhouse.studies.consistency_lens.activations"


class ActivationsStep(StrictModel):
    """The step's command line. `processes` changes speed, not results: it is no part of the fingerprint."""

    model: Path
    tokens: Path
    output: Path
    work: Path
    activations: ActivationSettings
    batch_tokens: Annotated[int, Field(ge=1)]
    shard_documents: Annotated[int, Field(ge=1)]
    processes: Annotated[int, Field(ge=1)] = 1
    trust_remote_code: bool = False


def main(step: ActivationsStep) -> None:
    """Extract every split, or go on with what an interrupted attempt left."""
    inputs = {"model": step.model, "tokens": step.tokens}
    with RunRecord(MODULE, step, inputs) as record:
        verify_manifest(step.model)
        examples = open_splits(step)
        plans = plan_shards({split: len(own) for split, own in examples.items()}, step.shard_documents)
        work = step.work / fingerprint(
            MODULE,
            step,
            inputs,
            exclude={*inputs, "output", "work", "processes"},
            precision=resolve_precision(step.activations.precision),
        )
        processes = min(step.processes, len(plans))
        if processes == 1:
            extract_shards(step, work, 0, 1)
        else:
            extract_in_parallel(step, work, processes)
        facts = origin(step.model) | step.activations.model_dump(mode="json")
        counts = {split: len(own) for split, own in examples.items()}
        record.add(documents=counts, too_short={s: len(own.shards) - len(own) for s, own in examples.items()})
        publish_shards(step.output, work, plans, facts, record)
        logger.info("extracted %s activations", " + ".join(f"{count} {split}" for split, count in counts.items()))


def open_splits(step: ActivationsStep) -> dict[str, TokenExamples]:
    """The examples of every split, without activations."""
    return {split: TokenExamples(step.tokens, split, step.activations, step.model) for split in SPLITS}


def extract_in_parallel(step: ActivationsStep, work: Path, processes: int) -> None:
    """Share the shards out to processes of their own. Raises `UserError` where one of them fails."""
    context = get_context("spawn")
    arguments = [(step, work, rank, processes, os.getpid()) for rank in range(processes)]
    workers = [
        context.Process(target=extract_shards, args=each, name=f"extraction process {rank}")
        for rank, each in enumerate(arguments)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed := [worker for worker in workers if worker.exitcode]:
        statuses = ", ".join(f"{worker.name} with status {worker.exitcode}" for worker in failed)
        raise UserError(f"extraction ended early: {statuses}: the same command goes on from the finished shards")


def extract_shards(step: ActivationsStep, work: Path, rank: int, processes: int, parent: int | None = None) -> None:
    """Write the shards of one process, on a device of its own where there are several; end where `parent` has ended.

    A process of its own is told its parent, which may be killed while this one is still importing.
    """
    parent = parent or os.getppid()
    if processes > 1:
        configure_logging()
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    examples = open_splits(step)
    settings = step.activations
    model = frozen(
        load_model(step.model, settings.precision, worker_device(rank), trust_remote_code=step.trust_remote_code)
    )

    def extract(plan: ShardPlan) -> ShardContent:
        if os.getppid() != parent:
            raise SystemExit("the main process is gone")  # killed: whoever runs next must not meet this one
        chosen = [examples[plan.split][row] for row in plan.rows]
        rows = {
            "positions": torch.tensor([example.position for example in chosen], dtype=torch.int32),
            "activations": extract_activations(model, settings.layer, chosen, step.batch_tokens).to(
                getattr(torch, settings.dtype)
            ),
        }
        return ShardContent([e.document_id for e in chosen], [e.token_ids for e in chosen], rows)

    plans = plan_shards({split: len(own) for split, own in examples.items()}, step.shard_documents)
    build_shards(work, plans, extract, rank, processes)


def worker_device(rank: int) -> torch.device:
    """The processes' devices in turn; the processor where there is no GPU."""
    device = default_device()
    return torch.device("cuda", rank % torch.cuda.device_count()) if device.type == "cuda" else device


@torch.no_grad()
def extract_activations(model: PreTrainedModel, layer: int, examples: Sequence[Example], batch_tokens: int) -> Tensor:
    """The residual stream after `layer` at each example's chosen token, [examples, hidden] fp32 on the CPU.

    Raises `UserError` for a layer that the model does not have.
    """
    activations: dict[int, Tensor] = {}
    for batch in token_batches([example.position + 1 for example in examples], batch_tokens):
        input_ids, _, positions = pad_contexts([examples[place] for place in batch])
        # No mask: attention is causal, and no real token sees the padding on its right.
        stream = residual_stream(model, layer, input_ids=input_ids.to(model.device), use_cache=False)
        activations |= zip(batch, stream[torch.arange(len(batch)), positions].float().cpu(), strict=True)
    return torch.stack([activations[place] for place in range(len(examples))])


if __name__ == "__main__":
    run_step(ActivationsStep, main)
