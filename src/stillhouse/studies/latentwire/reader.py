"""A reader: one language model that gets a prefix of vectors, or a text, and answers after an anchor.

Everything that training and evaluation must agree on has one place here: the beginning-of-sequence token, the
anchor, where the answer's first token is predicted (t = 0), how answers end, padding. The model itself is frozen; it
reads embeddings (`inputs_embeds`), which is all that a prefix is.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.data.prompts import PromptRenderer, prompt_renderer
from stillhouse.models.loading import frozen, load_model, load_tokenizer
from stillhouse.models.lora import adapter_disabled, add_lora
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.seeds import generator
from stillhouse.studies.latentwire.config import AnswerGenerationSettings
from stillhouse.studies.latentwire.data import AnswerTokens
from stillhouse.studies.latentwire.decoding import decode_answers
from stillhouse.studies.latentwire.prompt import AnswerRows, KeysValues, LayerShape, Prefix, Prompt, ReadPrompt
from stillhouse.studies.latentwire.run_settings import PromptStyle, ReaderSettings

__all__ = ["AnswerRows", "Prefix", "Prompt", "Reader"]
_EMBEDDING_ROWS = 8192


class Reader(nn.Module):
    """One model and its tokenizer, for one set of reader settings; `adapt` gives it others.

    own_layers: prefix tuning's keys and values, [1, positions, numbers of a position]; None without it.
    """

    own_layers: nn.Parameter | None

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: ReaderSettings,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.name, self.tokenizer = name, tokenizer
        self.model: PreTrainedModel | PeftModel = frozen(model)
        self.recomputes = False
        self.adapt(settings, seed)

    @classmethod
    def load(cls, name: str, path: Path, settings: ReaderSettings, trust_remote_code: bool = False) -> Self:
        """Load model and tokenizer from a directory; UserError where either is missing or damaged."""
        model = load_model(path, settings.precision, trust_remote_code=trust_remote_code)
        return cls(name, model, load_tokenizer(path, trust_remote_code), settings)

    def adapt(self, settings: ReaderSettings, seed: int) -> None:
        """Take these settings; new trained parts (LoRA, prefix tuning) by `seed` replace those of another channel."""
        model = self.release()
        self.settings = settings
        if settings.lora is not None:
            self.model = add_lora(model, settings.lora, seed)
        if settings.prefix_tuning:
            shape = (1, settings.prefix_tuning, self.layer_shape.numbers)
            values = torch.randn(shape, generator=generator(seed, "prefix tuning", self.name)) * 0.02
            self.own_layers = nn.Parameter(values.to(self.device))
        if not self.anchor_ids:
            raise UserError(f"reader.anchor: {settings.anchor!r} has no tokens for {self.name}: name one with text")

    def release(self) -> PreTrainedModel:
        """The frozen model alone: trained parts are taken out and forgotten."""
        if isinstance(self.model, PeftModel):
            self.model = frozen(self.model.unload())
        self.own_layers = None
        return self.model

    # What is read: ids of the prompt's parts.

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def bos_ids(self) -> list[int]:
        """The beginning-of-sequence token as a list, empty where the policy has none."""
        token: int | None = self.tokenizer.bos_token_id
        own = self.tokenizer("").input_ids[:1]
        if self.settings.bos == "always" and token is None:
            raise UserError(f"{self.name}: reader.bos is always, but its tokenizer has no BOS token: use auto or never")
        wanted = self.settings.bos == "always" or (self.settings.bos == "auto" and own == [token])
        return [token] if wanted and token is not None else []

    @property
    def anchor_ids(self) -> list[int]:
        """The anchor without the white space at its end, which begins the answer."""
        return self.text_ids(self.settings.anchor.rstrip())

    @cached_property
    def renderer(self) -> PromptRenderer:
        """Chat prompts, and the token that ends an answer."""
        return prompt_renderer(self.tokenizer)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        ends = (self.renderer.turn_end, self.tokenizer.eos_token_id)
        return tuple(dict.fromkeys(token for token in ends if token is not None))

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text alone: no BOS, no anchor."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def text_prompt(self, text: str, style: PromptStyle | None = None) -> list[int]:
        """Token ids of the full-text arm, anchor included; style None: as the settings say.

        content_only: BOS, text, anchor. chat_full: the chat template with the text as the user's turn, anchor.
        Raises UserError where chat_full is asked of a tokenizer without a template.
        """
        style = style or self.settings.text_prompt
        if style == "chat_full" and not self.renderer.chat:
            raise UserError(f"{self.name}: chat_full, but its tokenizer has no chat template: use auto or content_only")
        if style != "content_only" and self.renderer.chat:
            return [*self.renderer.prompt_ids(text), *self.anchor_ids]
        return [*self.bos_ids, *self.text_ids(text), *self.anchor_ids]

    def answer_ids(self, answer: str) -> list[int]:
        """The answer's tokens after the anchor, and the token that ends it.

        Raises UserError where the tokenizer joins anchor and answer: the token at t = 0 would not be the one that
        the model writes after the anchor.
        """
        anchor = self.settings.anchor
        following = self.text_ids(anchor[len(anchor.rstrip()) :] + answer.strip())
        if [*self.anchor_ids, *following] != self.text_ids(anchor + answer.strip()):
            raise UserError(
                f"{self.name}: the tokenizer joins the anchor {anchor!r} and the answer {answer!r}: choose an anchor "
                "that ends in a space or a line break"
            )
        return [*following, self.renderer.turn_end]

    # Prompts as embeddings.

    def embed(self, token_ids: Sequence[int]) -> Tensor:
        """Input embeddings [tokens, hidden], as the model scales them."""
        ids = torch.tensor(list(token_ids), dtype=torch.long, device=self.device)
        embeddings: Tensor = self.model.get_input_embeddings()(ids)
        return embeddings

    @property
    def hidden_size(self) -> int:
        """Width of the input embeddings."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def context_length(self) -> int | None:
        """Positions that the model takes; None where its configuration names no limit."""
        limit: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit

    @property
    def layer_shape(self) -> LayerShape:
        """The size of the model's keys and values."""
        config = self.model.config.get_text_config()
        heads: int = config.num_attention_heads
        dimension = getattr(config, "head_dim", None) or config.hidden_size // heads
        return LayerShape(config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, dimension)

    @cached_property
    def vocabulary_rms(self) -> float:
        """Root mean square of the embeddings of the whole vocabulary."""
        return self.embedding_rms(range(self.model.get_input_embeddings().weight.shape[0]))

    @torch.no_grad()
    def embedding_rms(self, token_ids: Sequence[int]) -> float:
        """Root mean square of the embeddings of these tokens, repeats counted."""
        if not len(token_ids):
            raise ValueError(f"{self.name}: no tokens to measure embeddings of")
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in range(0, len(token_ids), _EMBEDDING_ROWS):
            total += self.embed(token_ids[start : start + _EMBEDDING_ROWS]).float().square().sum(dtype=torch.float64)
        return float((total / (len(token_ids) * self.hidden_size)).sqrt())

    def prompt_embeddings(self, prefix: Prefix | Tensor, texts: Sequence[Sequence[int]] = ()) -> Prompt:
        """BOS, the prefix (a tensor [batch, M, hidden] or a `Prefix`) and the anchor.

        texts: token ids that stand between BOS and prefix, one list per row, for the warm-up of training.
        """
        prefix = prefix if isinstance(prefix, Prefix) else Prefix(prefix)
        embeddings = prefix.embeddings.to(self.model.get_input_embeddings().weight.dtype)
        mask = torch.ones(embeddings.shape[:2], device=self.device) if prefix.mask is None else prefix.mask
        before = [self.embed([*self.bos_ids, *ids]) for ids in texts or [()] * len(embeddings)]
        anchor = self.embed(self.anchor_ids)
        ones = [torch.ones(len(part), device=self.device) for part in before]
        rows = [torch.cat([start, own, anchor]) for start, own in zip(before, embeddings, strict=True)]
        masks = [torch.cat([one, own, one.new_ones(len(anchor))]) for one, own in zip(ones, mask, strict=True)]
        layers, layer_mask = self._layers_before(prefix, len(rows))
        return replace(self._padded(rows, masks, layers, trained=True), layer_mask=layer_mask)

    def text_embeddings(self, prompts: Sequence[Sequence[int]]) -> Prompt:
        """A batch of token prompts (`text_prompt`), padded on the side that the settings name."""
        rows = [self.embed(prompt) for prompt in prompts]
        return self._padded(rows, [torch.ones(len(row), device=self.device) for row in rows], (), trained=False)

    # What the model makes of them.

    def answer_rows(self, prompt: Prompt, answers: AnswerTokens) -> AnswerRows:
        """Teacher forcing: the outputs that predict each answer token, with gradients."""
        answer_mask = answers.attention_mask.bool()
        embedded = self.model.get_input_embeddings()(answers.input_ids).to(prompt.inputs_embeds.dtype)
        # Padding between a prompt's layers and its first column would be such a hole as `padded` closes.
        side = "right" if prompt.layers else self.settings.padding
        whole = replace(
            prompt,
            inputs_embeds=torch.cat([prompt.inputs_embeds, embedded], dim=1),
            attention_mask=torch.cat([prompt.attention_mask, answers.attention_mask], dim=1),
        ).padded(side)
        example, position = answer_mask.nonzero(as_tuple=True)
        # Token t of an answer is predicted one column earlier; for t = 0 that is the prompt's last column.
        before = (whole.attention_mask == 0).sum(1) if side == "left" else 0
        columns = (prompt.attention_mask.sum(1) + before)[example] + position - 1
        logits, hidden = self._forward(whole, example, columns)
        return AnswerRows(logits, hidden, answers.labels[answer_mask], example, position)

    def answer_logits(self, prompt: Prompt, answers: AnswerTokens) -> Tensor:
        """The logits of `answer_rows`: [R, vocabulary]."""
        return self.answer_rows(prompt, answers).logits

    def first_logits(self, prompt: Prompt, cache: DynamicCache | None = None) -> Tensor:
        """Logits of the answer's first token, [batch, vocabulary], as generation computes them; fills `cache`."""
        return self._last_logits(prompt.padded("left"), cache)

    @torch.no_grad()
    def read(self, prompt: Prompt) -> ReadPrompt:
        """Read a prompt once: for the gold answer's likelihood and for the answer that the model writes itself."""
        prompt = prompt.padded("left")
        cache = self.new_cache(prompt)
        return ReadPrompt(prompt, cache, self._last_logits(prompt, cache))

    @torch.no_grad()
    def logits_after(self, read: ReadPrompt, answers: AnswerTokens) -> tuple[Tensor, Tensor, Tensor]:
        """What `answer_rows` gives for a prompt that was read: logits [R, vocabulary], labels [R], example [R]."""
        answer_mask = answers.attention_mask.bool()
        example, position = answer_mask.nonzero(as_tuple=True)
        later = position > 0
        logits = read.first_logits[example]
        if later.any():
            embedded = self.model.get_input_embeddings()(answers.input_ids[:, :-1])
            mask = torch.cat([read.prompt.attention_mask, answers.attention_mask[:, :-1]], dim=1)
            behind = replace(read.prompt, inputs_embeds=embedded, attention_mask=mask)
            cache = copy.deepcopy(read.cache)
            logits[later], _ = self._forward(behind, example[later], position[later] - 1, cache)
        return logits, answers.labels[answer_mask], example

    def next_logits(self, token_ids: Tensor, attention_mask: Tensor, prompt: Prompt, cache: DynamicCache) -> Tensor:
        """Logits [batch, vocabulary] after one more token each; attention_mask covers prompt and all tokens so far."""
        embedded = self.model.get_input_embeddings()(token_ids[:, None])
        return self._last_logits(replace(prompt, inputs_embeds=embedded, attention_mask=attention_mask), cache)

    def new_cache(self, prompt: Prompt) -> DynamicCache:
        """An empty cache, or one that holds the prompt's layers, which gradients flow into."""
        cache = DynamicCache(config=self.model.config)
        for layer, (keys, values) in enumerate(prompt.layers):
            cache.update(keys, values, layer)
        return cache

    @torch.no_grad()
    def check_first_step(self, prompt: Prompt, answers: AnswerTokens) -> None:
        """Assert that training predicts the answer's first token (t = 0) exactly where generation writes it.

        Raises UserError where the two differ by more than rounding, as with a template or padding that only one sees.
        """
        rows = self.answer_rows(prompt, answers)
        trained, generated = rows.logits[rows.position == 0].float(), self.first_logits(prompt).float()
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 5e-2
        if not (trained - generated).abs().max() <= tolerance * generated.abs().max():
            raise UserError(f"{self.name}: training and generation do not agree on the answer's first token (t = 0)")

    def generate(self, prompt: Prompt | ReadPrompt, settings: AnswerGenerationSettings) -> list[str]:
        """One answer per row, up to its end token or the end of its first line, stripped; uses up what was read."""
        return decode_answers(self, prompt if isinstance(prompt, ReadPrompt) else self.read(prompt), settings)

    # Training.

    def train(self, mode: bool = True) -> Self:
        """As for any module, but that a frozen model stays in evaluation mode unless it recomputes activations."""
        super().train(mode)
        if not (self.settings.lora is not None or self.recomputes):
            self.model.eval()
        return self

    def recompute_activations(self) -> None:
        """Gradient checkpointing; UserError for a model whose dropout would wake up with it."""
        config = self.model.config.get_text_config()
        if getattr(config, "attention_dropout", 0.0):
            raise UserError(f"{self.name}: gradient_checkpointing needs training mode, and the model has dropout")
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.recomputes = True

    def _last_logits(self, prompt: Prompt, cache: DynamicCache | None) -> Tensor:
        rows = torch.arange(len(prompt), device=self.device)
        logits, _ = self._forward(prompt, rows, torch.full_like(rows, prompt.inputs_embeds.shape[1] - 1), cache)
        return logits

    def _forward(
        self, prompt: Prompt, rows: Tensor, columns: Tensor, cache: DynamicCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [R, vocabulary] and hidden states [R, hidden] at these R places; no other reaches the lm_head.

        The prompt's mask may be longer than its embeddings: it begins with what the cache already holds.
        """
        if cache is None and prompt.layers:
            cache = self.new_cache(prompt)
        layer_positions = prompt.layers[0][0].shape[2] if prompt.layers else 0
        layer_mask = prompt.layer_mask
        if layer_mask is None:
            layer_mask = prompt.attention_mask.new_ones(len(prompt), layer_positions)
        positions = (prompt.attention_mask.cumsum(1) - 1).clamp(min=0) + layer_mask.sum(1, keepdim=True)
        limit = self.context_length
        # The shape first: it bounds the positions, and reading these would wait for the device.
        if limit is not None and positions.shape[1] + layer_positions > limit and positions.max() >= limit:
            raise UserError(
                f"{self.name}: a prompt with its answer has {int(positions.max()) + 1} tokens, the model takes "
                f"{limit}: nothing is cut; leave long texts out with task.max_text_bytes"
            )
        captured: list[Tensor] = []

        def keep_places(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
            captured.append(arguments[0][rows, columns])
            return (captured[0],)

        handle = self.model.get_output_embeddings().register_forward_pre_hook(keep_places)
        try:
            with self._parts_of(prompt):
                output = self.model(
                    inputs_embeds=prompt.inputs_embeds,
                    attention_mask=torch.cat([layer_mask, prompt.attention_mask], dim=1),
                    position_ids=positions[:, -prompt.inputs_embeds.shape[1] :],
                    past_key_values=cache,
                    use_cache=cache is not None,
                )
        finally:
            handle.remove()
        return output.logits, captured[0]

    def _layers_before(self, prefix: Prefix, batch: int) -> tuple[KeysValues, Tensor | None]:
        """Prefix tuning's keys and values, then the prefix's own, in the model's type; `Prompt.layer_mask` of them."""
        given = [] if self.own_layers is None else [self.layer_shape.split(self.own_layers.expand(batch, -1, -1))]
        given += [prefix.layers] if prefix.layers else []
        layers = tuple(
            (torch.cat(keys, dim=2).to(self.model.dtype), torch.cat(values, dim=2).to(self.model.dtype))
            for keys, values in (zip(*parts, strict=True) for parts in zip(*given, strict=True))
        )
        if prefix.mask is None or not prefix.layers:
            return layers, None
        own = layers[0][0].shape[2] - prefix.mask.shape[1]
        mask = functional.pad(prefix.mask.long(), (own, 0), value=1)
        # What is dropped goes to the far end, where it is no distance between the prompt and what is left.
        order = mask.argsort(dim=1, stable=True)
        moved = tuple((_at_positions(keys, order), _at_positions(values, order)) for keys, values in layers)
        return moved, mask.gather(1, order)

    def _padded(self, rows: list[Tensor], masks: list[Tensor], layers: KeysValues, *, trained: bool) -> Prompt:
        side = self.settings.padding
        embeddings = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
        mask = nn.utils.rnn.pad_sequence(masks, batch_first=True, padding_side=side)
        return Prompt(embeddings, mask.long(), layers, trained)

    @contextmanager
    def _parts_of(self, prompt: Prompt) -> Iterator[None]:
        if isinstance(self.model, PeftModel) and not prompt.trained:
            with adapter_disabled(self.model):
                yield
        else:
            yield


def _at_positions(states: Tensor, order: Tensor) -> Tensor:
    """Keys or values [batch, heads, positions, dimension] with each row's positions in the order [batch, positions]."""
    return states.gather(2, order[:, None, :, None].expand_as(states))
