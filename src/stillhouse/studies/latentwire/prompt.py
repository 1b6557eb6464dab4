"""What a reader is given before the answer, and what it makes of the answer: plain tensors with their shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor
from transformers import DynamicCache

KeysValues = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Prefix:
    """What an adapter gives a reader in a text's place.

    embeddings: [batch, M, hidden]. mask: [batch, M], 0 for a vector that is dropped, with its keys and values; None:
    all are there. layers: keys and values per layer, each [batch, heads, M, head_dim], of a deep prefix; else empty.
    """

    embeddings: Tensor
    mask: Tensor | None = None
    layers: KeysValues = ()


@dataclass(frozen=True)
class Prompt:
    """Everything that stands before the answer, ready for the model.

    inputs_embeds: [batch, time, hidden]. attention_mask: [batch, time], 0 where padded.
    layers: keys and values before the first column. trained: whether the reader's own trained parts (LoRA, prefix
    tuning) take part, as they do after a prefix and not after a text. layer_mask: [batch, positions of the layers], 0
    for those of dropped vectors, which come first; None: all are there.
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    layers: KeysValues = ()
    trained: bool = True
    layer_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs_embeds)

    def padded(self, side: Literal["left", "right"]) -> Prompt:
        """The same prompt with everything that is masked moved to one side of each row.

        A hole between columns would count as distance in sliding-window attention.
        """
        order = self.attention_mask.argsort(dim=1, descending=side == "right", stable=True)
        embeddings = self.inputs_embeds.gather(1, order[..., None].expand_as(self.inputs_embeds))
        return replace(self, inputs_embeds=embeddings, attention_mask=self.attention_mask.gather(1, order))


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt that the model has read once, for several uses.

    prompt: padded on the left. cache: its keys and values; who writes behind it works on a copy.
    first_logits: [batch, vocabulary], of the answer's first token.
    """

    prompt: Prompt
    cache: DynamicCache
    first_logits: Tensor


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


@dataclass(frozen=True)
class LayerShape:
    """The size of one position's keys and values: layers, key-value heads, dimension of a head."""

    layers: int
    heads: int
    head_dimension: int

    @property
    def numbers(self) -> int:
        """Keys and values of one position in all layers."""
        return self.layers * 2 * self.heads * self.head_dimension

    def split(self, values: Tensor) -> KeysValues:
        """[batch, positions, numbers] as keys and values per layer, each [batch, heads, positions, dimension]."""
        batch, positions, _ = values.shape
        shaped = values.view(batch, positions, self.layers, 2, self.heads, self.head_dimension)
        ordered = shaped.permute(2, 3, 0, 4, 1, 5)
        return tuple((keys, states) for keys, states in ordered)
