"""The output embeddings (lm_head) as a function of their own: hidden states to logits.

A teacher's full-vocabulary logits are kept as hidden states, hundreds of times smaller, and the teacher's head turns
them into logits again. That is exact only where nothing follows the head, which `require_plain_head` checks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from stillhouse.runtime.errors import UserError


@dataclass
class OutputHead:
    """A linear head that is never trained. weight: [vocab, hidden]; bias: [vocab] or None."""

    weight: Tensor
    bias: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Raw logits [rows, vocab] of hidden states [rows, hidden]; the head follows them to their device once."""
        if self.weight.device != hidden.device:
            self.weight = self.weight.to(hidden.device)
            self.bias = None if self.bias is None else self.bias.to(hidden.device)
        bias = None if self.bias is None else self.bias.detach()
        return functional.linear(hidden, self.weight.detach(), bias)

    def equals(self, other: OutputHead) -> bool:
        """Whether both heads hold the same numbers."""
        return _equal(self.weight, other.weight) and _equal(self.bias, other.bias)


def output_head(model: PreTrainedModel) -> OutputHead:
    """The model's own head, without copying; under a LoRA on the head, the frozen layer below it."""
    layer = model.get_output_embeddings()
    layer = getattr(layer, "base_layer", layer)
    return OutputHead(layer.weight, getattr(layer, "bias", None))


@torch.no_grad()
def require_plain_head(model: PreTrainedModel) -> None:
    """Raise UserError where logits are not the head's output itself (Gemma 2's soft capping, logit scales).

    Checked on the numbers of one short pass, so that it holds for architectures that nobody listed.
    """
    captured: list[Tensor] = []
    layer = model.get_output_embeddings()
    handle = layer.register_forward_pre_hook(lambda module, arguments: captured.append(arguments[0]))
    try:
        device = next(model.parameters()).device
        logits = model(input_ids=torch.tensor([[0, 1, 2]], device=device), use_cache=False).logits
    finally:
        handle.remove()
    expected = layer(captured[0])
    if not torch.allclose(logits.float(), expected.float(), rtol=1e-4, atol=1e-4):
        capping = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        reason = f"caps its logits (final_logit_softcapping {capping})" if capping else "changes its logits"
        raise UserError(
            f"{type(model).__name__} {reason} after the output embeddings, so hidden states do not give its "
            "logits: use distillation.loss mse_top_k with this model"
        )


def _equal(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    return one.dtype == two.dtype and torch.equal(one.cpu(), two.cpu())
