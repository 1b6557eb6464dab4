"""Step program and sources of the text teacher: what a frozen reader makes of the full text, for kd and state_kd.

The reader is frozen and its text fixed, so its hidden states are constants: one cache per reader serves every channel
that agrees on `CacheSettings`. The reader's own output embeddings turn them into logits. An answer's last token ends
it and is not stored: the cache keeps a row for each stored token and one after the last, which predicts the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from stillhouse.config.base import StrictModel
from stillhouse.data.packing import NO_LABEL
from stillhouse.models.output_head import require_plain_head
from stillhouse.models.precision import resolve_precision
from stillhouse.models.prefix import token_batches
from stillhouse.models.target_cache import CacheFacts, TargetCache, TeacherTargets, compute_shards, publish_cache
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import verify_manifest
from stillhouse.runtime.logs import logger
from stillhouse.runtime.records import RunRecord, fingerprint
from stillhouse.studies.latentwire.data import WireBatch, WireExample, answer_tokens, read_examples
from stillhouse.studies.latentwire.reader import Reader
from stillhouse.studies.latentwire.run_settings import CacheSettings, ReaderSettings

MODULE = "stillhouse.studies.latentwire.text_teacher"
EXAMPLES_PER_SHARD = 128


class TextTeacherStep(StrictModel):
    """The step's command line."""

    model: Path
    data: Path
    output: Path
    work: Path
    name: str
    cache: CacheSettings
    max_text_bytes: int | None = None
    trust_remote_code: bool = False


class TextTeacher(Protocol):
    """Where a reader's view of the full text comes from."""

    def hidden(self, batch: WireBatch) -> Tensor:
        """The states [R, hidden] that predict each of the batch's answer tokens, in the order of `answer_rows`."""
        ...


class OnlineTeacher:
    """The states from a forward pass over the full text, in each step."""

    def __init__(self, reader: Reader, batch_tokens: int) -> None:
        self.reader, self.batch_tokens = reader, batch_tokens

    def hidden(self, batch: WireBatch) -> Tensor:
        """See `TextTeacher`."""
        target = batch.targets[self.reader.name]
        lengths = target.attention_mask.sum(1).tolist()
        answers = [ids[:length] for ids, length in zip(target.input_ids.tolist(), lengths, strict=True)]
        return torch.cat(self.of_texts(batch.texts, answers))

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str], answers: Sequence[Sequence[int]]) -> list[Tensor]:
        """The states [tokens, hidden] of each text's answer."""
        prompts = [self.reader.text_prompt(text) for text in texts]
        sizes = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        states: dict[int, Tensor] = {}
        for indices in token_batches(sizes, self.batch_tokens):
            prompt = self.reader.text_embeddings([prompts[index] for index in indices])
            targets = answer_tokens([answers[index] for index in indices]).to(self.reader.device)
            rows = self.reader.answer_rows(prompt, targets)
            for place, index in enumerate(indices):
                states[index] = rows.hidden[rows.example == place]
        return [states[index] for index in range(len(texts))]


class CachedTeacher:
    """The states from a cache that the step program built; UserError where it is damaged or of other data."""

    def __init__(self, directory: Path, reader: Reader) -> None:
        self.cache, self.reader = TargetCache(directory), reader
        vocabulary = reader.model.config.get_text_config().vocab_size
        if (self.cache.facts.mode, self.cache.facts.vocab_size) != ("hidden", vocabulary):
            raise UserError(
                f"{directory}: is no text teacher of {reader.name}: delete it and run the same command again"
            )

    def hidden(self, batch: WireBatch) -> Tensor:
        """See `TextTeacher`."""
        found = self.cache.targets(batch.ids)
        labels = batch.targets[self.reader.name].labels
        expected = [tuple(token for token in row if token != NO_LABEL)[:-1] for row in labels.tolist()]
        if list(found.answers) != expected:
            raise UserError(f"{self.cache.directory}: holds other answers of these examples: make it again")
        assert found.hidden is not None
        return found.hidden.to(labels.device)


def main(step: TextTeacherStep) -> None:
    """Build the cache, or go on with one that was interrupted."""
    inputs = {"model": step.model, "data": step.data}
    with RunRecord(MODULE, step, inputs) as record:
        for path in inputs.values():
            verify_manifest(path)
        examples = read_examples(step.data / "train.jsonl", step.cache.train_examples, step.max_text_bytes).examples
        own = {name: getattr(step.cache, name) for name in ("anchor", "bos", "text_prompt", "precision")}
        reader = Reader.load(step.name, step.model, ReaderSettings(**own), step.trust_remote_code)
        require_plain_head(reader.model)
        by_id = {example.id: example for example in examples}
        ids = list(by_id)
        plan = [ids[start : start + EXAMPLES_PER_SHARD] for start in range(0, len(ids), EXAMPLES_PER_SHARD)]
        teacher = OnlineTeacher(reader, step.cache.batch_tokens)
        work = step.work / fingerprint(
            MODULE,
            step,
            inputs,
            exclude={*inputs, "output", "work"},
            precision=resolve_precision(step.cache.precision),
        )
        shards = compute_shards(work, plan, lambda wanted: targets(teacher, [by_id[identity] for identity in wanted]))
        vocabulary = reader.model.config.get_text_config().vocab_size
        facts = CacheFacts("hidden", vocabulary, 0, str(reader.model.dtype).removeprefix("torch."))
        publish_cache(step.output, shards, facts, None, record)
        logger.info("text teacher %s: %d examples", step.name, len(ids))


def targets(teacher: OnlineTeacher, examples: Sequence[WireExample]) -> list[TeacherTargets]:
    """What the cache keeps of these examples."""
    answers = [teacher.reader.answer_ids(example.answer) for example in examples]
    states = teacher.of_texts([example.text for example in examples], answers)
    return [TeacherTargets.from_hidden(answer[:-1], rows) for answer, rows in zip(answers, states, strict=True)]


if __name__ == "__main__":
    run_step(TextTeacherStep, main)
