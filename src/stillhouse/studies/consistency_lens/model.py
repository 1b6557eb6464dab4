"""The lens: one language model in three roles, joined by text.

    document -> original -> activation A -> decoder -> T tokens -> encoder -> reconstruction of A -> original

The original is frozen. Decoder and encoder have modules of their own but share every frozen weight with it in memory;
a part that is trained gets its own copy, at once or where its schedule unfreezes it. Both projections start as the
identity, prompts as the embeddings of their texts. A forward pass with a swapped activation runs the last token alone,
on the keys and values of the document before it, which no swap changes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.config.training import Precision
from stillhouse.models.activations import blocks, captured, check_layer, residual_stream, swapped
from stillhouse.models.loading import check_safetensors, frozen, load_model, load_tokenizer
from stillhouse.runtime.errors import UserError
from stillhouse.studies.consistency_lens.decoding import KeyValues, extend, until
from stillhouse.studies.consistency_lens.parts import (
    Decoder,
    Encoder,
    Explanation,
    embedding_matrix,
    own_parameters,
    part_of,
    role_of,
)
from stillhouse.studies.consistency_lens.run_settings import EMBED, TEXT, LensSettings

Output = TypeVar("Output")
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Reading:
    """Documents that the original has read up to the token before the chosen one.

    past: keys and values of what came before. last: input_ids [batch, 1], attention_mask [batch, columns] and
    position_ids [batch, 1] of the chosen token, aligned to the right.
    """

    past: KeyValues
    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor


class Lens(nn.Module):
    """The three roles. Built by `build`, restored by `load`."""

    def __init__(
        self,
        original: PreTrainedModel,
        trainable: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: LensSettings,
    ) -> None:
        """Take weights that learn from `trainable`, which is `original` unless that one is quantised."""
        super().__init__()
        check_layer(original, settings.layer, "lens.layer")
        last = len(blocks(original))
        output_layer = last if settings.encoder.output_layer == -1 else settings.encoder.output_layer
        check_layer(original, output_layer, "lens.encoder.output_layer")
        self.settings = settings
        self.original = frozen(original)
        decoder = role_of(trainable if settings.decoder.base.trained else original)
        encoder = role_of(trainable if settings.encoder.base.trained else original)
        self.decoder = Decoder(decoder, tokenizer, settings.decoder.prompt_text, EMBED)
        self.encoder = Encoder(encoder, tokenizer, settings.encoder.prompt_text, TEXT, output_layer)
        self.requires_grad_(False)
        for name, part in settings.trained.items():
            role, _, own = name.partition(".")
            own_parameters(self.get_submodule(role), own, lent=part.begins_frozen)
        if settings.compile:
            compile_blocks(self.original, decoder, encoder)

    @classmethod
    def build(
        cls,
        model_dir: Path,
        settings: LensSettings,
        precision: Precision,
        device: torch.device | str | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """A new lens of the model in `model_dir`; nothing in it is drawn at random.

        Raises `UserError` for a layer that the model does not have, and for what needs a package that is missing.
        """
        for key, asked, package, without in (
            ("frozen_8bit", settings.frozen_8bit, "bitsandbytes", "false"),
            ("attention", settings.attention == "flash_attention_2", "flash_attn", "sdpa"),
        ):
            if asked and importlib.util.find_spec(package) is None:
                raise UserError(
                    f"lens.{key}: {package} is not installed: pip install {package}, or set it to {without}"
                )
        torch.backends.cuda.matmul.allow_tf32 = settings.tf32
        torch.backends.cudnn.allow_tf32 = settings.tf32

        def load(in_8bit: bool) -> PreTrainedModel:
            return load_model(model_dir, precision, device, settings.attention, trust_remote_code, in_8bit=in_8bit)

        original = load(settings.frozen_8bit)
        whole = settings.frozen_8bit and any(name.endswith(".base") for name in settings.trained)
        return cls(original, load(False) if whole else original, load_tokenizer(model_dir, trust_remote_code), settings)

    @classmethod
    def load(
        cls,
        model_dir: Path,
        checkpoint_dir: Path,
        settings: LensSettings,
        precision: Precision,
        device: torch.device | str | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """The lens of a checkpoint of the training loop, in evaluation mode, nothing trained.

        A part that was still frozen is not in the checkpoint: it stays the original's.

        Raises `UserError` for a damaged checkpoint, or one of other settings.
        """
        lens = cls.build(model_dir, settings, precision, device, trust_remote_code)
        check_safetensors(checkpoint_dir / WEIGHTS)
        saved = load_file(checkpoint_dir / WEIGHTS)
        learnt: dict[str, nn.Parameter] = {}
        for name, parameters in lens.part_parameters().items():
            if not (settings.trained[name].begins_frozen and saved.keys().isdisjoint(parameters)):
                learnt |= parameters
        shapes = {name: tensor.shape for name, tensor in saved.items()}
        if shapes != {name: parameter.shape for name, parameter in learnt.items()}:
            raise UserError(f"{checkpoint_dir}: is of a lens that trains other parts, or of another model")
        for name, parameter in learnt.items():
            parameter.data = saved[name].to(parameter, copy=True)  # not in place: the memory may be the original's
        return frozen(lens)

    def part_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """The trained parameters by part (`decoder.projection`), then by name; parts without any are left out."""
        parts = {
            name: {f"{role}.{path}": parameter for path, parameter in part_of(self.get_submodule(role), part).items()}
            for name in self.settings.trained
            for role, _, part in [name.partition(".")]
        }
        return {name: parameters for name, parameters in parts.items() if parameters}

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of all trained parts."""
        for parameters in self.part_parameters().values():
            yield from parameters.items()

    def explain(
        self, activations: Tensor, *, temperature: float = 1.0, gumbel_noise: float = 1.0, length: int | None = None
    ) -> Explanation:
        """Put activations [batch, hidden] into words.

        gumbel_noise: factor of the noise, which comes from torch's global generator. With 1 tokens are samples of the
        decoder's distributions, below 1 of sharper ones; with 0 every token is the most probable one.
        """
        matrix = embedding_matrix(self.encoder.base)
        explanation: Explanation = self.decoder(
            activations, length or self.settings.text_length, temperature, gumbel_noise, matrix
        )
        return explanation

    def reconstruct(self, embeddings: Tensor) -> Tensor:
        """Activations [batch, hidden] in fp32 from the embeddings [batch, T, hidden] of a text."""
        activations: Tensor = self.encoder(embeddings)
        return activations

    def reconstruct_tokens(self, token_ids: Tensor) -> Tensor:
        """Activations [batch, hidden] in fp32 from a text of token ids [batch, T]."""
        return self.reconstruct(functional.embedding(token_ids, embedding_matrix(self.encoder.base)))

    @torch.no_grad()
    def activations_of(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        """The original's activations [batch, hidden], in fp32, at `positions` [batch] of [batch, tokens]."""
        ids, mask, places = until(input_ids, attention_mask, positions)
        hidden = residual_stream(
            self.original,
            self.settings.layer,
            input_ids=ids,
            attention_mask=mask,
            position_ids=places,
            use_cache=False,
        )
        return hidden[:, -1].float()

    @torch.no_grad()
    def read(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Reading:
        """Let the original read documents [batch, tokens] up to the token before `positions` [batch]."""
        ids, mask, places = until(input_ids, attention_mask, positions)
        past: KeyValues = ()
        if ids.shape[1] > 1:
            _, past = extend(self.original, (), mask[:, :-1], places[:, :-1], input_ids=ids[:, :-1])
        return Reading(past, ids[:, -1:], mask, places[:, -1:])

    def next_token_logits(self, reading: Reading, activations: Tensor | None = None) -> Tensor:
        """The original's logits [batch, vocabulary] after the chosen tokens.

        With `activations` [batch, hidden] these replace the residual stream of the layer there; gradients flow into
        them.
        """
        inputs = (self.original, reading.past, reading.attention_mask, reading.position_ids)
        if activations is None:
            with torch.no_grad():
                return extend(*inputs, input_ids=reading.input_ids)[0].float()
        columns = torch.zeros(len(activations), dtype=torch.long)
        with swapped(self.original, self.settings.layer, columns, activations):
            return extend(*inputs, input_ids=reading.input_ids)[0].float()

    @torch.no_grad()
    def chosen_activations(self, reading: Reading) -> Tensor:
        """The activations [batch, hidden], in fp32, of the chosen tokens: those that a swap would replace."""
        with captured(self.original, self.settings.layer) as found:
            extend(
                self.original, reading.past, reading.attention_mask, reading.position_ids, input_ids=reading.input_ids
            )
        return found[0][:, -1].float()

    @torch.no_grad()
    def text_logits(self, token_ids: Tensor) -> Tensor:
        """The original's logits [batch, T, vocabulary], in fp32, after each token of a text of ids [batch, T]."""
        logits: Tensor = self.original(input_ids=token_ids, use_cache=False).logits
        return logits.float()

    def original_logits(
        self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, activations: Tensor | None = None
    ) -> Tensor:
        """`read` and `next_token_logits` in one."""
        return self.next_token_logits(self.read(input_ids, attention_mask, positions), activations)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; frozen bases stay in evaluation mode, dropout in them would only blur the targets."""
        super().train(mode)
        self.original.eval()
        for role, settings in ((self.decoder, self.settings.decoder), (self.encoder, self.settings.encoder)):
            role.base.train(mode and settings.base.trained)
        return self

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Recompute each pass of decoder and encoder in the backward pass, one decoding step at a time."""
        self.decoder.checkpointing = self.encoder.checkpointing = True

    def enable_input_require_grads(self) -> None:
        """Nothing to do: recomputation that is not re-entrant needs no gradient of its inputs."""


def compile_blocks(*models: PreTrainedModel) -> None:
    """Compile the blocks of all models; hooks on a block run outside of what is compiled, so they can come and go.

    Blocks share their code but not its compiled forms: a form holds the block's number and the layers of the cache.
    torch stops compiling after 8 forms of one piece of code: each block has 8 of its own, lest all but the first
    few blocks run as they are.
    """
    compiled = [block for model in models for block in blocks(model)]
    limits = torch._dynamo.config
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, limits.recompile_limit * len(compiled))
    for block in compiled:
        block.compile(dynamic=True, isolate_recompiles=True)
