"""Step program and sources of a teacher's targets: computed once into a cache, or online with the adapter off.

The teacher is frozen and its prompt is deterministic, so its targets are constants: one cache serves every
condition, sweep point and seed that agrees on `CacheSettings`. Both sources run the same forward passes; shots that
several examples share are read once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as Items
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.config.base import StrictModel
from stillhouse.data.packing import Sequence
from stillhouse.data.prompts import prompt_renderer
from stillhouse.data.records import read_problems
from stillhouse.models.loading import frozen, load_model, load_tokenizer
from stillhouse.models.lora import adapter_disabled, checkpoint_kind, load_checkpoint
from stillhouse.models.output_head import OutputHead, output_head, require_plain_head
from stillhouse.models.precision import resolve_precision
from stillhouse.models.prefix import (
    encode_prefix,
    shared_prefix_length,
    suffix_hidden_states,
    suffix_logits,
    token_batches,
)
from stillhouse.models.target_cache import (
    CacheFacts,
    CacheMode,
    TargetCache,
    TeacherTargets,
    compute_shards,
    publish_cache,
)
from stillhouse.runtime.commands import run_step
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json, verify_manifest
from stillhouse.runtime.logs import logger
from stillhouse.runtime.records import RunRecord, fingerprint
from stillhouse.studies.context_distillation.data import TeacherExamples, teacher_examples
from stillhouse.studies.context_distillation.run_settings import CacheSettings

MODULE = "stillhouse.studies.context_distillation.teacher"
EXAMPLES_PER_SHARD = 128


class TeacherStep(StrictModel):
    """The step's command line. teacher: the teaching model; adapter: its LoRA, or the run that trained it."""

    data: Path
    student: Path
    teacher: Path
    adapter: Path | None = None
    output: Path
    work: Path
    cache: CacheSettings
    trust_remote_code: bool = False


class TargetSource(Protocol):
    """Where targets come from; `head` turns hidden states into logits and is None in mode top_k."""

    @property
    def head(self) -> OutputHead | None:
        """The teacher's frozen output embeddings."""
        ...

    def targets(self, example_ids: Items[str]) -> TeacherTargets:
        """The targets of these examples, in order. Raises UserError for an example that has none."""
        ...


class TeacherForward:
    """The teacher's forward passes over its examples, answer rows only.

    Sequences of one group share the longest prefix of tokens that all of them have in common (found on tokens, so
    that merges across the shots' end cannot matter); `kept_prefixes` bounds how many stay in memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        examples: TeacherExamples,
        mode: CacheMode,
        top_k: int,
        batch_tokens: int,
        kept_prefixes: int = 1,
    ) -> None:
        vocab_size = model.config.get_text_config().vocab_size
        if mode == "top_k" and top_k > vocab_size:
            raise UserError(f"teacher.cache_top_k ({top_k}) is above the model's vocabulary ({vocab_size}): lower it")
        self.model, self.mode, self.top_k, self.batch_tokens = model, mode, top_k, batch_tokens
        self._sequences = {sequence.example_id: sequence for sequence in examples.sequences}
        self._group = dict(zip(self._sequences, examples.groups, strict=True))
        self._prefixes: dict[int | None, list[int]] = {None: []}
        for group, members in _grouped(examples.sequences, examples.groups).items():
            if group is not None:
                shared = shared_prefix_length([s.input_ids for s in members], [s.answer_start for s in members])
                self._prefixes[group] = members[0].input_ids[:shared]
        self._prefix_state = lru_cache(kept_prefixes)(lambda group: encode_prefix(model, self._prefixes[group]))

    @torch.no_grad()
    def __call__(self, example_ids: Items[str]) -> list[TeacherTargets]:
        """The targets of these examples, in order; they depend on which examples are asked for by rounding alone."""
        try:
            wanted = {identity: self._sequences[identity] for identity in example_ids}
        except KeyError as error:
            raise UserError(
                f"the teacher has no sequence for example {error.args[0]}: both sides need the same data"
            ) from None
        results: dict[str, TeacherTargets] = {}
        for group, members in _grouped(wanted.values(), [self._group[identity] for identity in wanted]).items():
            shared, state = len(self._prefixes[group]), self._prefix_state(group)
            suffixes = [sequence.input_ids[shared:] for sequence in members]
            for batch in token_batches([len(suffix) for suffix in suffixes], self.batch_tokens):
                rows = (suffix_logits if self.mode == "top_k" else suffix_hidden_states)(
                    self.model,
                    [suffixes[place] for place in batch],
                    [members[place].answer_start - 1 - shared for place in batch],
                    state,
                )
                for place, own in zip(batch, rows, strict=True):
                    sequence = members[place]
                    results[sequence.example_id] = (
                        TeacherTargets.from_logits(sequence.answer_ids, own, self.top_k)
                        if self.mode == "top_k"
                        else TeacherTargets.from_hidden(sequence.answer_ids, own)
                    )
        return [results[identity] for identity in example_ids]


class OnlineTeacher:
    """Targets computed inside the step by the student's own base, its adapter switched off: no second copy.

    The keys and values of shared shots stay in memory, one set per group. Raises UserError for a student without
    an adapter, whose base changes as it learns.
    """

    def __init__(
        self, student: PreTrainedModel, examples: TeacherExamples, mode: CacheMode, top_k: int, batch_tokens: int
    ) -> None:
        if not hasattr(student, "disable_adapter"):
            raise UserError(
                "teacher.targets is online but the student is fully fine-tuned, so its base does not stay the "
                "teacher: set teacher.targets to cached, or training.method to lora"
            )
        self.student = student
        if mode == "hidden":
            with adapter_disabled(student):
                require_plain_head(student)
        self.head = output_head(student) if mode == "hidden" else None
        groups = len(set(examples.groups))
        self._forward = TeacherForward(student, examples, mode, top_k, batch_tokens, kept_prefixes=groups)

    def targets(self, example_ids: Items[str]) -> TeacherTargets:
        """The targets of these examples, in order, on the student's device."""
        with adapter_disabled(self.student):
            return TeacherTargets.join(self._forward(example_ids))


class CachedTeacher:
    """Targets from a cache that the step program built.

    In mode hidden the student's own output embeddings serve as the teacher's head where they are frozen and equal;
    a head that is trained, or another model's, is held as a frozen copy. Raises UserError for a corrupt cache, or
    one that lacks what `mode` and `top_k` need.
    """

    def __init__(self, directory: Path, student: PreTrainedModel, mode: CacheMode, top_k: int) -> None:
        self.cache = TargetCache(directory)
        facts = self.cache.facts
        if facts.mode != mode or (mode == "top_k" and facts.top_k < top_k):
            raise UserError(
                f"{directory}: holds mode {facts.mode} (K_max {facts.top_k}), but the loss needs {mode} with K {top_k}"
            )
        _check_vocabulary(student.config.get_text_config().vocab_size, facts.vocab_size)
        self.head = self.cache.head
        if self.head is not None:
            own = output_head(student)
            if not own.weight.requires_grad and own.equals(self.head):
                self.head = own

    def targets(self, example_ids: Items[str]) -> TeacherTargets:
        """The targets of these examples, in order, on the CPU."""
        return self.cache.targets(example_ids)


def main(step: TeacherStep) -> None:
    """Build the cache, or go on with one that was interrupted."""
    settings = step.cache
    inputs = {"data": step.data, "student": step.student, "teacher": step.teacher}
    if step.adapter:
        verify_manifest(step.adapter)
        inputs["adapter"] = step.adapter
    with RunRecord(MODULE, step, inputs) as record:
        verify_manifest(step.data)
        problems = read_problems(step.data / "train.jsonl")[: settings.train_examples]
        tokenizer = load_tokenizer(step.teacher, step.trust_remote_code)
        check_same_vocabulary(step.student, step.teacher, tokenizer, step.trust_remote_code)
        renderer = prompt_renderer(tokenizer, settings.prompt_format)
        examples = teacher_examples(problems, renderer, settings.context, settings.max_length, settings.overlong)
        if not examples.sequences:
            raise UserError(f"{step.data}: no training example is within teacher.max_length ({settings.max_length})")
        model = load_model(step.teacher, settings.precision, trust_remote_code=step.trust_remote_code)
        model = frozen(load_checkpoint(model, adapter_directory(step.adapter)) if step.adapter else model)
        if settings.mode == "hidden":
            require_plain_head(model)
        # In the order of their groups, so that a group's shared shots are read once and not once per shard.
        order = sorted(range(len(examples.sequences)), key=lambda place: (examples.groups[place] or 0, place))
        ids = [examples.sequences[place].example_id for place in order]
        plan = [ids[start : start + EXAMPLES_PER_SHARD] for start in range(0, len(ids), EXAMPLES_PER_SHARD)]
        forward = TeacherForward(model, examples, settings.mode, settings.top_k, settings.batch_tokens)
        work = step.work / fingerprint(
            MODULE,
            step,
            inputs,
            exclude={*inputs, "adapter", "output", "work"},
            precision=resolve_precision(settings.precision),
        )
        shards = compute_shards(work, plan, forward)
        facts = CacheFacts(
            settings.mode,
            model.config.get_text_config().vocab_size,
            settings.top_k,
            str(model.dtype).removeprefix("torch."),
            tuple(identity for identity, _ in examples.skipped.examples),
            examples.reserved,
        )
        head = output_head(model) if settings.mode == "hidden" else None
        publish_cache(step.output, shards, facts, head, record)
        logger.info("teacher cache: %d examples, %d skipped", len(ids), len(examples.skipped))


def check_same_vocabulary(
    student: Path, teacher: Path, teacher_tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False
) -> None:
    """Raise UserError unless both models have the same vocabulary size and the same tokens under the same ids."""
    if student == teacher:
        return
    _check_vocabulary(_vocabulary_size(student), _vocabulary_size(teacher))
    ours, theirs = load_tokenizer(student, trust_remote_code).get_vocab(), teacher_tokenizer.get_vocab()
    if ours != theirs:
        different = len(dict(ours.items() ^ theirs.items()))
        raise UserError(
            f"{teacher}: its tokenizer differs from {student}'s in {different} tokens: a teacher needs the student's"
        )


def adapter_directory(path: Path) -> Path:
    """The adapter itself, or the last checkpoint of the run that trained it."""
    checkpoints = sorted(path.glob("checkpoint-*"), key=lambda entry: int(entry.name.rpartition("-")[2]))
    chosen = checkpoints[-1] if checkpoints else path
    if checkpoint_kind(chosen) != "lora":
        raise UserError(f"{chosen}: holds a full model, not an adapter: give it as teacher.model instead")
    return chosen


def _check_vocabulary(student: int, teacher: int) -> None:
    if student != teacher:
        raise UserError(
            f"the student's vocabulary has {student} entries, the teacher's {teacher}: "
            "choose a teacher with the student's vocabulary"
        )


def _vocabulary_size(path: Path) -> int:
    config = read_json(path / "config.json")
    return int(config.get("vocab_size") or config["text_config"]["vocab_size"])


def _grouped(sequences: Iterable[Sequence], groups: Iterable[int | None]) -> dict[int | None, list[Sequence]]:
    members: dict[int | None, list[Sequence]] = defaultdict(list)
    for sequence, group in zip(sequences, groups, strict=True):
        members[group].append(sequence)
    return members


if __name__ == "__main__":
    run_step(TeacherStep, main)
