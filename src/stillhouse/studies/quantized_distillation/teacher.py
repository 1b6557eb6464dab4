"""Step program: the teacher's final hidden states on the data set's answers, computed once.

The teacher is frozen and these answers never change, so their targets are constants: every condition, sweep point and
seed that agrees on `CacheSettings` reads one cache, whatever its weight format, divergence or learning rate.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from stillhouse.config.base import StrictModel
from stillhouse.data.packing import Sequence
from stillhouse.data.prompts import prompt_renderer
from stillhouse.models.loading import frozen, load_model, load_tokenizer
from stillhouse.models.output_head import output_head, require_plain_head
from stillhouse.models.precision import resolve_precision
from stillhouse.models.prefix import suffix_hidden_states, token_batches
from stillhouse.models.target_cache import CacheFacts, TeacherTargets, compute_shards, publish_cache
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.files import verify_manifest
from stillhouse.runtime.logs import logger
from stillhouse.runtime.records import RunRecord, fingerprint
from stillhouse.studies.quantized_distillation.data import read_instructions
from stillhouse.studies.quantized_distillation.run_settings import CacheSettings

MODULE = "stillhouse.studies.quantized_distillation.teacher"
EXAMPLES_PER_SHARD = 128


class TeacherStep(StrictModel):
    """The step's command line."""

    model: Path
    data: Path
    output: Path
    work: Path
    cache: CacheSettings
    trust_remote_code: bool = False


def main(step: TeacherStep) -> None:
    """Build the cache, or go on with one that was interrupted."""
    settings, inputs = step.cache, {"model": step.model, "data": step.data}
    with RunRecord(MODULE, step, inputs) as record:
        for path in inputs.values():
            verify_manifest(path)
        tokenizer = load_tokenizer(step.model, step.trust_remote_code)
        renderer = prompt_renderer(tokenizer, settings.prompt_format)
        sequences = read_instructions(
            step.data / "train.jsonl", renderer, settings.max_length, settings.response_room, settings.train_examples
        ).sequences
        model = frozen(load_model(step.model, settings.precision, trust_remote_code=step.trust_remote_code))
        require_plain_head(model)
        by_id = {sequence.example_id: sequence for sequence in sequences}
        ids = list(by_id)
        plan = [ids[start : start + EXAMPLES_PER_SHARD] for start in range(0, len(ids), EXAMPLES_PER_SHARD)]
        work = step.work / fingerprint(
            MODULE,
            step,
            inputs,
            exclude={*inputs, "output", "work"},
            precision=resolve_precision(settings.precision),
        )
        shards = compute_shards(
            work, plan, lambda wanted: targets(model, [by_id[name] for name in wanted], settings.batch_tokens)
        )
        vocabulary = model.config.get_text_config().vocab_size
        facts = CacheFacts("hidden", vocabulary, 0, str(model.dtype).removeprefix("torch."))
        publish_cache(step.output, shards, facts, output_head(model), record)
        logger.info("teacher cache: %d examples", len(ids))


@torch.no_grad()
def targets(model: PreTrainedModel, sequences: list[Sequence], batch_tokens: int) -> list[TeacherTargets]:
    """The states [answer tokens + 1, hidden] of each sequence, from the one that predicts its answer's first token."""
    found: dict[int, TeacherTargets] = {}
    for batch in token_batches(list(map(len, sequences)), batch_tokens):
        chosen = [sequences[place] for place in batch]
        ids, starts = [item.input_ids for item in chosen], [item.answer_start - 1 for item in chosen]
        for place, item, rows in zip(batch, chosen, suffix_hidden_states(model, ids, starts), strict=True):
            found[place] = TeacherTargets.from_hidden(item.answer_ids, rows)
    return [found[place] for place in range(len(sequences))]


if __name__ == "__main__":
    run_step(TeacherStep, main)
