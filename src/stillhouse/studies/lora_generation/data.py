"""A task's items: read from its splits, cut into shards, and rendered as what an adapter learns.

An item is a multiple-choice item or a problem with a worked answer; either becomes a `SolvedPrompt`, and that a
token sequence. So what an adapter learns, what a generator reads and what stands in the context are the same texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.data.exemplars import Shot
from stillhouse.data.packing import Sequence as TokenSequence
from stillhouse.data.prompts import PromptRenderer, prompt_renderer, within_limit
from stillhouse.data.records import MathProblem, read_choice_questions, read_records
from stillhouse.evaluation.multiple_choice import BETWEEN_EXAMPLES, ChoiceItem, choice_item, encoded
from stillhouse.runtime.errors import UserError
from stillhouse.studies.lora_generation.prompts import SolvedPrompt
from stillhouse.studies.lora_generation.teacher_settings import Style

Item = ChoiceItem | MathProblem


def read_items(path: Path, style: Style, limit: int | None = None) -> list[Item]:
    """The first items of a split; see `data.records` for the errors."""
    if style == "worked":
        return list[Item](read_records(path, MathProblem))[:limit]
    return [choice_item(question, style) for question in read_choice_questions(path)[:limit]]


def shard_of(path: Path, style: Style, shard: int, examples: int) -> list[Item]:
    """The examples of one shard of a train split, whose order the split's seed has drawn.

    Raises `UserError` for a split that is too small.
    """
    items = read_items(path, style)
    if len(items) < (shard + 1) * examples:
        raise UserError(
            f"{path}: has {len(items)} examples, shard {shard} ends at {(shard + 1) * examples}: lower "
            "teachers.shards or teachers.shard_examples, or raise the train split's size"
        )
    return items[shard * examples : (shard + 1) * examples]


def solved(item: Item) -> SolvedPrompt:
    """The item with its right answer."""
    if isinstance(item, MathProblem):
        return SolvedPrompt(item.id, item.question, item.answer)
    return SolvedPrompt(item.id, item.prompt, item.answer)


@dataclass(frozen=True)
class Wording:
    """How solved prompts become token sequences for one model: as they are scored."""

    tokenizer: PreTrainedTokenizerBase
    renderer: PromptRenderer | None
    limit: int

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, style: Style) -> Wording:
        """The wording of a style; only worked answers use the model's chat template and its end of turn."""
        limit = model.config.get_text_config().max_position_embeddings
        return cls(tokenizer, prompt_renderer(tokenizer) if style == "worked" else None, limit)

    def sequence(self, one: SolvedPrompt, shots: Sequence[SolvedPrompt] = ()) -> TokenSequence:
        """Prompt and answer."""
        if self.renderer:
            worked = [Shot(shot.prompt, shot.answer) for shot in shots]
            return self.renderer.sequence(MathProblem(one.id, one.prompt, one.answer), worked)
        before = "".join(f"{shot.prompt}{shot.answer}{BETWEEN_EXAMPLES}" for shot in shots)
        ids, start = encoded(self.tokenizer, before + one.prompt, one.answer)
        return TokenSequence(ids, start, one.id)

    def learnt(self, examples: Sequence[SolvedPrompt], loss_tokens: str) -> list[TokenSequence]:
        """What an adapter learns: the answers, or (`all`) every token after the first; see `fitting`."""
        sequences = [self.sequence(one) for one in examples]
        if loss_tokens == "all":
            sequences = [TokenSequence(one.input_ids, 1, one.example_id) for one in sequences]
        return self.fitting(sequences)

    def fitting(self, sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
        """The sequences themselves; `UserError` for one that is longer than the model's context."""
        return within_limit(sequences, self.limit, "error", "the model's context")[0]
