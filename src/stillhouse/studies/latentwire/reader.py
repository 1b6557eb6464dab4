"""A reader: one language model that gets a prefix of vectors, or a text, and answers after an anchor.

Everything that training and evaluation must agree on has one place here: the beginning-of-sequence token, the
anchor, where the answer's first token is predicted, how answers end, padding. The model itself is frozen; it reads
embeddings (`inputs_embeds`), which is all that a prefix is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from stillhouse.studies.latentwire.config import AnswerGenerationSettings, PromptStyle
from stillhouse.studies.latentwire.data import AnswerTokens

KeysValues = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Prefix:
    """What an adapter gives a reader in a text's place.

    embeddings: [batch, M, hidden]. mask: [batch, M], 0 for a vector that is dropped; None: all are there.
    layers: keys and values per layer, each [batch, heads, M, head_dim], of a deep prefix; else empty.
    """

    embeddings: Tensor
    mask: Tensor | None = None
    layers: KeysValues = ()


@dataclass(frozen=True)
class Prompt:
    """Everything that stands before the answer, ready for the model.

    inputs_embeds: [batch, time, hidden]. attention_mask: [batch, time], 0 where padded.
    layers: keys and values before the first column; trained: whether the reader's own trained parts (LoRA, prefix
    tuning) take part, as they do after a prefix and not after a text.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    layers: KeysValues = ()
    trained: bool = True


@dataclass(frozen=True)
class AnswerRows:
    """The model's outputs at the R = sum of answer tokens positions that predict them, answer by answer.

    logits: [R, vocabulary]. hidden: [R, hidden], what the output embeddings read. labels: [R].
    example: [R], the answer's index in the batch. position: [R], the token's place in its answer, from 0.
    """

    logits: Tensor
    hidden: Tensor
    labels: Tensor
    example: Tensor
    position: Tensor


class Reader(nn.Module):
    """One frozen model and its tokenizer. `Reader.load(name, path, settings)` makes it."""

    name: str
    bos_ids: list[int]
    anchor_ids: list[int]

    def text_prompt(self, text: str, style: PromptStyle | None = None) -> list[int]:
        """Token ids of the full-text arm, anchor included; style None: as the settings say.

        content_only: BOS, text, anchor. chat_full: the chat template with the text as the user's turn, anchor.
        """
        raise NotImplementedError

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text alone: no BOS, no anchor."""
        raise NotImplementedError

    def answer_ids(self, answer: str) -> list[int]:
        """The answer's tokens after the anchor, and the token that ends it.

        Raises UserError where the tokenizer would join the answer's first characters to the anchor (t = 0).
        """
        raise NotImplementedError

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """Input embeddings [tokens, hidden], as the model scales them."""
        raise NotImplementedError

    def prompt_embeddings(self, prefix: Prefix | Tensor) -> Prompt:
        """BOS, the prefix (a tensor [batch, M, hidden] or a `Prefix`) and the anchor."""
        raise NotImplementedError

    def text_embeddings(self, prompts: Sequence[Sequence[int]]) -> Prompt:
        """A batch of token prompts (`text_prompt`), padded on the side that the settings name."""
        raise NotImplementedError

    def answer_rows(self, prompt: Prompt, answers: AnswerTokens) -> AnswerRows:
        """Teacher forcing: the outputs that predict each answer token, with gradients."""
        raise NotImplementedError

    def answer_logits(self, prompt: Prompt, answers: AnswerTokens) -> Tensor:
        """The logits of `answer_rows`: [R, vocabulary]."""
        raise NotImplementedError

    def generate(self, prompt: Prompt, settings: AnswerGenerationSettings) -> list[str]:
        """One answer per row, up to its end token or the end of its first line, stripped."""
        raise NotImplementedError
