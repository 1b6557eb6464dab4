"""Delta activations: what an adapter does to the model's last state on fixed probe texts (arXiv 2509.04442).

delta = mean over probes of (last layer's state at the last real token, with the adapter - without), [hidden], in fp32.
Teachers and students go through the same function with the same probes: training and evaluation read them from the
record of the cache that the teachers' deltas are in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillhouse.models.functional_lora import applied, functional_forward
from stillhouse.models.lora_tensors import AdapterTensors
from stillhouse.runtime.errors import UserError
from stillhouse.studies.lora_generation.probes import ProbeSettings


@dataclass(frozen=True)
class Probes:
    """The probe texts as the model reads them: ids and mask [probes, tokens], padded on the right."""

    settings: ProbeSettings
    ids: Tensor
    mask: Tensor

    @classmethod
    def tokenise(cls, settings: ProbeSettings, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Self:
        """The probes on the model's device. Raises `UserError` for one over `max_length` or the model's context."""
        limits = {
            "probes.max_length": settings.max_length,
            f"the context of {model.name_or_path}": model.config.get_text_config().max_position_embeddings,
        }
        rows: list[list[int]] = []
        for number, text in enumerate(settings.texts, start=1):
            rows.append(_probe_ids(text, settings, tokenizer))
            for what, limit in limits.items():
                if len(rows[-1]) > limit:
                    raise UserError(
                        f"probes: text {number} of kind {settings.kind} has {len(rows[-1])} tokens, {what} is {limit}: "
                        "nothing is cut; raise it, or take other probes"
                    )
        longest = max(map(len, rows))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return cls(settings, ids.to(model.device), mask.to(model.device))

    @property
    def tokens(self) -> int:
        """Real tokens of all probes."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class Behaviour:
    """The frozen base model in fp32 with the probes and its own activation [hidden]: what deltas are computed with."""

    model: PreTrainedModel
    probes: Probes
    base: Tensor

    def delta(self, adapter: AdapterTensors) -> Tensor:
        """Delta activations of a batch of adapters [A, hidden], or of one [hidden]; differentiable in them."""
        return delta_activation(self.model, adapter, self.probes, self.base)


def base_activation(model: PreTrainedModel, probes: Probes) -> Tensor:
    """Mean over probes of the base model's last state at the last real token, [hidden] fp32."""
    with torch.no_grad(), _in_fp32(model):
        return _last_states(model, probes, 1)[0].mean(0)


def delta_activation(model: PreTrainedModel, adapter: AdapterTensors, probes: Probes, base: Tensor) -> Tensor:
    """Delta activations of a batch of adapters [A, hidden], or of one [hidden]; differentiable in the adapters.

    `base` is the `base_activation` of the same model and probes.
    """
    with _in_fp32(model):
        if probes.settings.engine == "functional_call":
            return _by_functional_call(model, adapter, probes) - base
        with applied(model, adapter):
            states = _last_states(model, probes, adapter.count or 1).mean(1)
    return (states if adapter.count else states[0]) - base


def _last_states(model: PreTrainedModel, probes: Probes, adapters: int) -> Tensor:
    """[adapters, probes, hidden] fp32; the lm_head does not run."""
    ids, mask = (tensor.repeat(adapters, 1) for tensor in (probes.ids, probes.mask))
    states = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return _at_last_token(states, mask).unflatten(0, (adapters, -1))


def _by_functional_call(model: PreTrainedModel, adapter: AdapterTensors, probes: Probes) -> Tensor:
    """The mean states with each adapter, [A, hidden], or [hidden] with one; weights are changed for one at a time."""
    if adapter.count:
        return torch.stack([_by_functional_call(model, adapter[i], probes) for i in range(adapter.count)])
    inputs = {"input_ids": probes.ids, "attention_mask": probes.mask, "use_cache": False}
    output = functional_forward(model, adapter, **inputs, output_hidden_states=True, logits_to_keep=1)
    return _at_last_token(output.hidden_states[-1], probes.mask).mean(0)


def _at_last_token(states: Tensor, mask: Tensor) -> Tensor:
    return states[torch.arange(len(mask), device=mask.device), mask.sum(1) - 1].float()


def _in_fp32(model: PreTrainedModel) -> torch.autocast:
    """No autocast: differences of states are small beside the states."""
    if model.dtype != torch.float32:
        raise ValueError(f"delta activations need a model in fp32, not {model.dtype}")
    return torch.autocast(model.device.type, enabled=False)


def _probe_ids(text: str, settings: ProbeSettings, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if settings.formatting == "plain":
        return list(tokenizer(text).input_ids)
    if not tokenizer.chat_template:
        raise UserError("probes.formatting: is chat, but the model's tokenizer has no chat template: take plain")
    turns = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(prompt, add_special_tokens=False).input_ids)
