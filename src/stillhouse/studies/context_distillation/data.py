"""What teacher and student read: the same answers after a few-shot prompt and after the question alone.

Both sides are rendered from the same problems. `ContextDistillationData` feeds the student's sequences to the
training loop; the teacher's go to `teacher`, which turns them into targets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Literal

from stillhouse.data.exemplars import ShotSampler
from stillhouse.data.packing import AnswerBatch, Rows, Sequence, micro_batches, pack, pad
from stillhouse.data.prompts import PromptRenderer, SkippedReport, within_limit
from stillhouse.data.records import Problem
from stillhouse.runtime.errors import UserError
from stillhouse.studies.context_distillation.run_settings import ContextSettings


@dataclass(frozen=True)
class TeacherExamples:
    """The teacher's sequences; `groups[i]` names those that share their shots, None where each has its own.

    skipped: over the limit. reserved: ids of the fixed shots, which are shown and therefore not taught.
    """

    sequences: tuple[Sequence, ...]
    groups: tuple[int | None, ...]
    skipped: SkippedReport
    reserved: tuple[str, ...]


class ContextDistillationData:
    """The student's sequences as the training loop takes them: packed or padded micro-batches of answer rows."""

    def __init__(
        self, sequences: Items[Sequence], skipped: SkippedReport, *, packing: bool = True, rows: Rows = "predicting"
    ) -> None:
        self.sequences, self.skipped = sequences, skipped
        self.packing, self.rows = packing, rows

    def __len__(self) -> int:
        return len(self.sequences)

    def micro_batches(self, indices: Items[int], token_budget: int) -> Iterator[AnswerBatch]:
        """The examples of `indices`, in order, at most `token_budget` tokens (padding counted) at a time."""
        chosen = [self.sequences[index] for index in indices]
        for group in micro_batches(chosen, token_budget, padded=not self.packing):
            yield pack(group, self.rows) if self.packing else pad(group, self.rows)


def shot_sampler(problems: Items[Problem], context: ContextSettings) -> ShotSampler:
    """The sampler that a context's settings describe. Raises UserError where there are too few examples."""
    return ShotSampler(problems, context.shots, context.sampling, context.groups, context.exemplars, context.seed)


def teacher_examples(
    problems: Items[Problem],
    renderer: PromptRenderer,
    context: ContextSettings,
    max_length: int,
    overlong: Literal["error", "skip"] = "error",
) -> TeacherExamples:
    """Render shots, question and gold answer of every example that is taught."""
    sampler = shot_sampler(problems, context)
    reserved = sampler.reserved_examples()
    taught = [index for index in range(len(problems)) if index not in reserved]
    sequences = (renderer.sequence(problems[index], sampler.draw(index)) for index in taught)
    kept, skipped = within_limit(sequences, max_length, overlong, "teacher.max_length")
    groups = {problems[index].id: sampler.group(index) for index in taught}
    return TeacherExamples(
        tuple(kept),
        tuple(groups[sequence.example_id] for sequence in kept),
        skipped,
        tuple(problems[index].id for index in sorted(reserved)),
    )


def student_data(
    problems: Items[Problem],
    renderer: PromptRenderer,
    context: ContextSettings,
    max_length: int,
    overlong: Literal["error", "skip"] = "error",
    *,
    untaught: Collection[str] = (),
    packing: bool = True,
    positions: Literal["predicting", "one_late"] = "predicting",
) -> ContextDistillationData:
    """Render question and gold answer of every example that is taught.

    The fixed shots of `context` are left out whatever the loss, so that a baseline learns from the same examples;
    `untaught` are the ids that the teacher skipped.
    """
    reserved = shot_sampler(problems, context).reserved_examples()
    taught = [problem for index, problem in enumerate(problems) if index not in reserved and problem.id not in untaught]
    kept, skipped = within_limit(map(renderer.sequence, taught), max_length, overlong, "max_length")
    rows: Rows = "with_last" if positions == "one_late" else "predicting"
    return ContextDistillationData(kept, skipped, packing=packing, rows=rows)


def check_alignment(sequences: Items[Sequence], teacher_answers: Items[Items[int]]) -> None:
    """Raise UserError, naming example and place, unless both sides end with the same answer tokens."""
    for sequence, theirs in zip(sequences, teacher_answers, strict=True):
        ours = sequence.answer_ids
        if ours == list(theirs):
            continue
        place = next(
            (place for place, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
            min(len(ours), len(theirs)),
        )
        raise UserError(
            f"{sequence.example_id}: the student's answer has {len(ours)} tokens, the teacher's {len(theirs)}, and "
            f"they differ from answer token {place}: both need the same tokenizer, prompt format and data"
        )
