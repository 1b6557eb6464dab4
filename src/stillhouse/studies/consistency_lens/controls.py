"""The controls that decide whether an explanation means anything: texts and predictions that ignore the activation.

Each gives what takes the place of the lens's explanation (token ids, for the lens's own encoder) or of its
reconstruction. A lens that does not beat them has not put the activation into words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.runtime.seeds import generator
from stillhouse.studies.consistency_lens.data import Example

# Ridge strengths, relative to the mean square of the features; the best on validation is taken.
RIDGE_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)


def original_tokens(examples: Sequence[Example], length: int, filler: int) -> Tensor:
    """The last `length` tokens of each document up to the chosen one, [examples, length]; `filler` before its start."""
    texts = []
    for example in examples:
        tokens = example.token_ids[max(0, example.position + 1 - length) : example.position + 1]
        texts.append(torch.cat([tokens.new_full((length - len(tokens),), filler), tokens]))
    return torch.stack(texts)


def shuffled(token_ids: Tensor, seed: int) -> Tensor:
    """Each text [items, length] with its tokens in an order that the seed draws."""
    order = torch.rand(token_ids.shape, generator=generator(seed, "shuffled")).argsort(dim=1)
    return token_ids.gather(1, order)


def hard_coded(tokenizer: PreTrainedTokenizerBase, text: str, length: int, count: int) -> Tensor:
    """The same text for all, [count, length]: its tokens, over and over until it is as long as an explanation."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    repeated = (tokens * length)[:length]
    return torch.tensor(repeated).expand(count, -1)


@torch.no_grad()
def text_continuation(model: PreTrainedModel, examples: Sequence[Example], length: int, batch_size: int) -> Tensor:
    """What the original writes greedily after each document's chosen token, [examples, length]."""
    return torch.cat([continuations(model, batch, length) for batch in _batches(examples, batch_size)])


@torch.no_grad()
def continuations(model: PreTrainedModel, examples: Sequence[Example], length: int, cached: bool = True) -> Tensor:
    """Greedy tokens [examples, length] after each document's chosen token, which stands in the last column.

    Without a cache every pass reads the whole text, so that a hook on the chosen token acts in each.
    """
    longest = max(example.position for example in examples) + 1
    input_ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, example in enumerate(examples):
        start = longest - example.position - 1
        input_ids[row, start:], mask[row, start:] = example.token_ids[: example.position + 1], 1
    written = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=length,
        min_new_tokens=length,
        pad_token_id=0,
        use_cache=cached,
    )
    tokens: Tensor = written[:, longest:].cpu()
    return tokens


class TextRegression:
    """Ridge regression of activations on the document's token embeddings: the input text without the activation.

    Features: the chosen token's embedding, and the mean over the document up to it. Closed form in the Gram matrix of
    the training documents; the strength is the one with the smallest squared error on validation.
    """

    def __init__(self, embeddings: Tensor, train: Sequence[Example], validation: Sequence[Example]) -> None:
        self.embeddings = embeddings.detach().float().cpu()
        features, targets = self._features(train).double(), _activations(train).double()
        self.feature_mean, self.target_mean = features.mean(0), targets.mean(0)
        centred = features - self.feature_mean
        values, vectors = torch.linalg.eigh(centred @ centred.T)
        rotated = vectors.T @ (targets - self.target_mean)
        strengths = [strength * values.mean() for strength in RIDGE_STRENGTHS]
        candidates = [centred.T @ (vectors @ (rotated / (values.clamp(min=0) + s)[:, None])) for s in strengths]
        held_out, expected = self._features(validation).double(), _activations(validation).double()
        self.weights = min(candidates, key=lambda weights: (self._apply(held_out, weights) - expected).square().sum())

    def predict(self, examples: Sequence[Example]) -> Tensor:
        """Predicted activations [examples, hidden], fp32."""
        return self._apply(self._features(examples).double(), self.weights).float()

    def _apply(self, features: Tensor, weights: Tensor) -> Tensor:
        return (features - self.feature_mean) @ weights + self.target_mean

    def _features(self, examples: Sequence[Example]) -> Tensor:
        rows = []
        for example in examples:
            read = self.embeddings[example.token_ids[: example.position + 1]]
            rows.append(torch.cat([read[-1], read.mean(0)]))
        return torch.stack(rows)


def _activations(examples: Sequence[Example]) -> Tensor:
    return torch.stack([example.activation for example in examples if example.activation is not None])


def _batches(examples: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]
