"""What a student is measured by in training: agreement with its teacher on held-out answers, and perplexity of a text.

The student is fake-quantised where its training placed the LoRA, so that the curve shows what training does; the
exported model is measured by `evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items

import torch
from peft import PeftModel
from torch import nn

from stillhouse.data.packing import Sequence
from stillhouse.evaluation.perplexity import answer_nll
from stillhouse.evaluation.teacher_agreement import teacher_states, token_scores
from stillhouse.models.loading import evaluation_mode
from stillhouse.models.output_head import output_head, require_plain_head
from stillhouse.models.quantized_lora import as_teacher, quantized_once


class Validation:
    """The measures by name; the teacher's side is computed once, when this is made.

    answers: held-out prompts and answers. windows: a text in sliding windows.
    """

    def __init__(self, model: PeftModel, answers: Items[Sequence], windows: Items[Sequence], batch_tokens: int) -> None:
        self.answers, self.windows, self.batch_tokens = answers, windows, batch_tokens
        self.head = output_head(model)
        with as_teacher(model):
            require_plain_head(model)
            self.states = teacher_states(model, answers, batch_tokens)
            self.teacher_perplexity = self._perplexity(model)

    def __call__(self, model: nn.Module, step: int) -> Mapping[str, float]:
        """validation_kl (nats a token), validation_agreement (share of tokens) and perplexity."""
        with evaluation_mode(model), quantized_once(model):
            scores = token_scores(model, self.answers, self.states, self.head, self.batch_tokens)
            return {
                "validation_kl": torch.cat([score.kl for score in scores]).mean().item(),
                "validation_agreement": torch.cat([score.agrees for score in scores]).mean().item(),
                "perplexity": self._perplexity(model),
            }

    def _perplexity(self, model: nn.Module) -> float:
        scores = answer_nll(model, self.windows, self.batch_tokens)
        nats, tokens = sum(score.sum_nats for score in scores), sum(score.tokens for score in scores)
        return float(torch.tensor(nats / tokens).exp())
