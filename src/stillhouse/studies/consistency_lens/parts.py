"""The parts that a lens is made of: the original model in the roles of decoder and encoder, and what of it is trained.

A role has modules, modes and hooks of its own over the original's weights; `own_parameters` gives a trained part
parameters of its own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.models.activations import residual_stream
from stillhouse.studies.consistency_lens.decoding import KeyValues, extend, for_batch
from stillhouse.studies.consistency_lens.sampling import gumbel_noise, straight_through


@dataclass(frozen=True)
class Explanation:
    """Text for a batch of activations.

    token_ids: [batch, T]. embeddings: [batch, T, hidden], what the encoder reads, with straight-through gradients.
    logits: [batch, T, vocabulary], the decoder's distributions over each token, without noise or temperature.
    """

    token_ids: Tensor
    embeddings: Tensor
    logits: Tensor


class Prompted(nn.Module):
    """What decoder and encoder have in common: a base, prompt embeddings around one place, a projection.

    prompt: the embeddings [tokens, hidden] of the text before and after the place, in fp32 as trained parts are.
    """

    def __init__(self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_text: str, place: str) -> None:
        super().__init__()
        before, after = prompt_text.split(place)
        before_ids: list[int] = tokenizer(before).input_ids
        after_ids: list[int] = tokenizer(after, add_special_tokens=False).input_ids
        self.base, self.place = base, len(before_ids)
        with torch.no_grad():
            ids = torch.tensor(before_ids + after_ids, dtype=torch.long, device=embedding_matrix(base).device)
            self.prompt = nn.Parameter(functional.embedding(ids, embedding_matrix(base)).float())
        self.projection = identity_projection(base.config.get_text_config().hidden_size).to(self.prompt.device)
        self.checkpointing = False

    @property
    def before(self) -> Tensor:
        """The prompt before the place, [tokens, hidden], in the base's type."""
        return self.prompt[: self.place].to(self.base.dtype)

    @property
    def after(self) -> Tensor:
        """The prompt after the place, [tokens, hidden], in the base's type."""
        return self.prompt[self.place :].to(self.base.dtype)

    def project(self, activations: Tensor) -> Tensor:
        """The projection, in fp32 also under autocast: bf16 would keep no identity."""
        with torch.autocast(activations.device.type, enabled=False):
            projected: Tensor = self.projection(activations.float())
        return projected

    def recomputed(self, function: Any, *arguments: Any) -> Any:
        """Call `function`; under gradient checkpointing keep its arguments alone for the backward pass."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False)
        return function(*arguments)


class Decoder(Prompted):
    """Activation to text."""

    def forward(
        self, activations: Tensor, length: int, temperature: float, noise_factor: float, encoder_matrix: Tensor
    ) -> Explanation:
        """Explain [batch, hidden] in `length` tokens, each fed back on the keys and values of those before.

        encoder_matrix: the encoder's embedding matrix [vocabulary, hidden], which the text is read through.
        """
        batch, matrix = len(activations), embedding_matrix(self.base)
        embedded = self.project(activations).to(self.base.dtype)
        past: KeyValues = ()
        if self.place:  # the same for every activation: read once
            _, *read = self.recomputed(self._extend, self.before[None])
            past = for_batch(tuple(read), batch)
        read_next = torch.cat([embedded[:, None], self.after.expand(batch, -1, -1)], dim=1)
        ids, embeddings, logits = [], [], []
        for _ in range(length):
            step_logits, *grown = self.recomputed(self._extend, read_next, *past)
            past = tuple(grown)
            noise = noise_factor * gumbel_noise(step_logits) if noise_factor else None
            token, fed = straight_through(step_logits, temperature, matrix, noise)
            read = fed
            if encoder_matrix is not matrix:
                _, read = straight_through(step_logits, temperature, encoder_matrix, noise)
            read_next = fed[:, None]
            ids.append(token)
            embeddings.append(read)
            logits.append(step_logits)
        return Explanation(torch.stack(ids, 1), torch.stack(embeddings, 1), torch.stack(logits, 1))

    def _extend(self, embeddings: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        logits, grown = extend(self.base, past, inputs_embeds=embeddings)
        return logits, *grown


class Encoder(Prompted):
    """Text to activation: the hidden state of `layer` at the last token, projected."""

    def __init__(
        self, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_text: str, place: str, layer: int
    ) -> None:
        super().__init__(base, tokenizer, prompt_text, place)
        self.layer = layer

    def forward(self, embeddings: Tensor) -> Tensor:
        """The reconstruction [batch, hidden], in fp32, of text embeddings [batch, T, hidden]."""
        return self.project(self.recomputed(self._last_hidden, embeddings))

    def _last_hidden(self, embeddings: Tensor) -> Tensor:
        batch = len(embeddings)
        read = [self.before.expand(batch, -1, -1), embeddings, self.after.expand(batch, -1, -1)]
        return residual_stream(self.base, self.layer, inputs_embeds=torch.cat(read, dim=1), use_cache=False)[:, -1]


def identity_projection(hidden: int) -> nn.Linear:
    """A linear map [hidden] -> [hidden] in fp32 that starts as the identity."""
    projection = nn.Linear(hidden, hidden)
    with torch.no_grad():
        nn.init.eye_(projection.weight)
        nn.init.zeros_(projection.bias)
    return projection


def embedding_matrix(model: PreTrainedModel) -> Tensor:
    """The rows that the model reads for its tokens, [vocabulary, hidden]; scaled where the model scales them."""
    layer: Any = model.get_input_embeddings()
    scale = getattr(layer, "embed_scale", None)
    return layer.weight if scale is None else layer.weight * scale.to(layer.weight.dtype)


def role_of(model: PreTrainedModel) -> PreTrainedModel:
    """The same model as modules of their own, with modes and hooks of their own, over the same weights in memory."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def own_parameters(role: nn.Module, part: str, lent: bool = False) -> None:
    """Give a part of a role parameters of its own: copies of its weights, apart from the frozen ones that others use.

    `lent` ones are frozen, and over the memory of what they stand for: the training loop copies before it updates.
    """
    for path, parameter in part_of(role, part).items():
        owner, _, name = path.rpartition(".")
        weights = parameter.detach() if lent else parameter.detach().clone()
        setattr(role.get_submodule(owner), name, nn.Parameter(weights, requires_grad=not lent))


def part_of(role: nn.Module, part: str) -> dict[str, nn.Parameter]:
    """The parameters of a part of a role by their path in it; empty where the part has none (an empty prompt)."""
    assert isinstance(role, Prompted)
    if part == "prompt":
        return {"prompt": role.prompt} if role.prompt.numel() else {}
    if part == "projection":
        return {f"projection.{name}": parameter for name, parameter in role.projection.named_parameters()}
    layers: dict[str, Any] = {
        "embeddings": role.base.get_input_embeddings(),
        "output_head": role.base.get_output_embeddings(),
    }
    if part in layers:
        prefix = next(path for path, module in role.named_modules() if module is layers[part])
        return {f"{prefix}.{name}": parameter for name, parameter in layers[part].named_parameters()}
    elsewhere = {parameter for layer in layers.values() for parameter in layer.parameters()}
    return {f"base.{name}": parameter for name, parameter in role.base.named_parameters() if parameter not in elsewhere}
