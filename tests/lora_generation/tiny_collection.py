"""A collection of adapters of the tiny model, as the teachers' rules leave it, without any training.

Adapters of one task share a direction: there is something to learn from their prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from stillhouse.evaluation.results_files import Interval
from stillhouse.models.loading import load_model
from stillhouse.models.lora_tensors import AdapterTensors, LoraLayout, adapter_digest, model_layout, write_adapter
from stillhouse.runtime.files import write_manifest
from stillhouse.studies.lora_generation.manifest import AdapterRow
from stillhouse.studies.lora_generation.prompts import PROMPTS_FILE, SolvedPrompt, write_prompts
from stillhouse.studies.lora_generation.teacher_settings import Teacher

TASKS = ("apples", "rivers", "numbers")
PROMPTS = 5
_SCORE = Interval(n=10, value=0.5, low=0.3, high=0.7)
_TEXTS = {
    "apples": "Are apple trees of kind {} hardy?",
    "rivers": "Where does river {} end?",
    "numbers": "What is {} plus {}?",
}


def make_collection(
    directory: Path,
    model: Path,
    tasks: Sequence[str] = TASKS,
    shards: int = 4,
    flagged: Sequence[str] = (),
    rank: int = 2,
) -> Path:
    """Write one adapter for each task and shard; those named in `flagged` are no better than the base."""
    layout = model_layout(load_model(model, "fp32", "cpu"), ("q_proj", "v_proj"), rank, 2 * rank)
    rows = []
    for number, task in enumerate(tasks):
        for shard in range(shards):
            name = Teacher(task, shard, 42, 10).name
            adapter = _adapter(layout, 100 * number, shard)
            write_adapter(adapter, directory / name, "tiny")
            prompts = [_TEXTS[task].format(10 * shard + place, place) for place in range(PROMPTS)]
            solved = [SolvedPrompt(f"{task}-{shard}-{place}", text, " yes") for place, text in enumerate(prompts)]
            write_prompts(directory / name / PROMPTS_FILE, solved)
            row = AdapterRow(
                name=name,
                task=task,
                shard=shard,
                seed=42,
                step=10,
                examples=PROMPTS,
                base_digest="tiny",
                accuracy_before=_SCORE,
                accuracy_after=_SCORE,
                gold_nll_before=_SCORE,
                gold_nll_after=_SCORE,
                better_by="accuracy",
                better=name not in flagged,
                seconds=1.0,
                digest=adapter_digest(adapter),
                rank=rank,
                alpha=2 * rank,
                targets=layout.targets,
                tensors=2 * len(layout.modules),
            )
            rows.append(row.model_dump(mode="json"))
    write_manifest(directory, {"adapters": rows})
    return directory


def _adapter(layout: LoraLayout, task: int, shard: int) -> AdapterTensors:
    """A start that all share, what the task adds, and a little of the shard's own."""
    parts = [(1, 0.2), (task + 2, 0.2), (task + shard + 3, 0.05)]
    drawn = [(torch.Generator().manual_seed(seed), size) for seed, size in parts]

    def values(*shape: int) -> torch.Tensor:
        return sum((size * torch.randn(*shape, generator=draw) for draw, size in drawn), torch.zeros(*shape))

    a = {module.name: values(layout.rank, module.inputs) for module in layout.modules}
    return AdapterTensors(a, {module.name: values(module.outputs, layout.rank) for module in layout.modules}, layout)


def checkpoint_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a generator's checkpoint."""
    return load_file(checkpoint / "model.safetensors")
