"""The tool's side of `ms_swift`: its GKD trainer in a process of the environment that it needs; no stillhouse here.

    python -P ms_swift_worker.py SETTINGS.json

Settings are RLHFArguments and, under `sft_alphas`, the conditions. Model, adapter and data are loaded once, then it
says `{"ready": true}`. Each line `{"outcome": PATH}` that it reads makes it train every condition from the adapter's
first weights, leave losses and gradients in that safetensors file, and answer `{"done": PATH}`. It ends with its input.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from swift.arguments import RLHFArguments
from swift.pipelines.train.rlhf import SwiftRLHF
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Prepared(SwiftRLHF):
    """Everything that the tool's command does up to the first step; `trainer` is kept for later."""

    def train(self, trainer: Any) -> dict[str, Any]:
        """Keep the trainer instead of starting it."""
        self.trainer = trainer
        return {}


def main(settings: dict[str, Any]) -> None:
    """Serve on the standard output as it was; what the tool prints goes to the standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    alphas = settings.pop("sft_alphas")
    pipeline = Prepared(RLHFArguments(**settings))
    pipeline.run()
    trainer = pipeline.trainer
    trained = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    start = {name: value.detach().clone() for name, value in trained.items()}
    # Each training collects garbage first: what was imported is not to be looked through five times a round.
    gc.freeze()
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        path = json.loads(line)["outcome"]
        save_file(trained_outcome(trainer, trained, start, alphas), path)
        print(json.dumps({"done": path}), file=answers)


def trained_outcome(
    trainer: Any, trained: dict[str, torch.nn.Parameter], start: dict[str, torch.Tensor], alphas: list[float]
) -> dict[str, torch.Tensor]:
    """Train each condition; the loss of every step, and the gradients of the last condition's first step."""
    losses, gradients = [], {}
    compute_loss = type(trainer).compute_loss

    def noted(*arguments: Any, **named: Any) -> Any:
        loss = compute_loss(trainer, *arguments, **named)
        losses.append(loss.detach())
        return loss

    def note_gradients(*_: Any) -> None:
        if not gradients:
            gradients.update({name: value.grad.clone() for name, value in trained.items()})

    trainer.compute_loss = noted
    hook = register_optimizer_step_pre_hook(note_gradients)
    for alpha in alphas:
        gradients.clear()
        trainer.args.sft_alpha, trainer.optimizer = alpha, None
        with torch.no_grad():
            for name, value in trained.items():
                value.copy_(start[name])
        trainer.train()
    hook.remove()
    return {"loss": torch.stack(losses).float().cpu(), **{name: value.cpu() for name, value in gradients.items()}}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
