"""What a batch of adapters saves: the delta activations of A adapters in one forward pass, and one by one.

    python benchmarks/delta_activations.py resources/models/smollm2_135m [--adapters 16] [--rank 4] [--repeats 3]

Random adapters on q_proj and v_proj, the five generic probes, fp32. Both forms must give equal deltas and, for a loss
on them, equal gradients; then each is timed, without and with the backward pass. Prints seconds and the ratio.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.models.loading import frozen, load_model, load_tokenizer
from stillhouse.models.lora_tensors import AdapterTensors, model_layout
from stillhouse.studies.lora_generation.deltas import Probes, base_activation, delta_activation
from stillhouse.studies.lora_generation.probes import ProbeSettings


def main() -> None:
    """Compare and time both forms on one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = frozen(load_model(options.model, "fp32"))
    probes = Probes.tokenise(ProbeSettings(kind="generic"), load_tokenizer(options.model), model)
    base = base_activation(model, probes)
    adapters = random_adapters(model, options.adapters, options.rank)
    tensors = [*adapters.a.values(), *adapters.b.values()]

    def together() -> Tensor:
        return delta_activation(model, adapters, probes, base)

    def one_by_one() -> Tensor:
        return torch.stack([delta_activation(model, adapter, probes, base) for adapter in adapters])

    forms: dict[str, Callable[[], Tensor]] = {"together": together, "one by one": one_by_one}
    deltas = {name: form() for name, form in forms.items()}
    torch.testing.assert_close(deltas["together"], deltas["one by one"], atol=1e-3, rtol=1e-3)
    gradients = {name: torch.autograd.grad(delta.square().sum(), tensors) for name, delta in deltas.items()}
    for ours, theirs in zip(*gradients.values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3 * float(theirs.abs().max()), rtol=1e-2)
    difference = float((deltas["together"] - deltas["one by one"]).detach().norm(dim=1).max())
    norm = float(deltas["one by one"].detach().norm(dim=1).mean())
    print(f"{options.adapters} adapters, {probes.tokens} probe tokens each; norm {norm:.3g}, off by {difference:.1e}")
    for backward in (False, True):
        seconds = {name: measured(form, tensors, backward, options.repeats) for name, form in forms.items()}
        ratio = seconds["one by one"] / seconds["together"]
        shown = ", ".join(f"{name} {value:.3f} s" for name, value in seconds.items())
        print(f"{'forward and backward' if backward else 'forward'}: {shown}: {ratio:.2f} times faster together")


def random_adapters(model: PreTrainedModel, count: int, rank: int) -> AdapterTensors:
    """A batch of adapters about as large as trained ones."""
    layout = model_layout(model, ("q_proj", "v_proj"), rank, 2 * rank)
    draw = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return (0.02 * torch.randn(count, *shape, generator=draw)).to(model.device).requires_grad_()

    a = {module.name: values(rank, module.inputs) for module in layout.modules}
    return AdapterTensors(a, {module.name: values(module.outputs, rank) for module in layout.modules}, layout)


def measured(form: Callable[[], Tensor], tensors: list[Tensor], backward: bool, repeats: int) -> float:
    """The fastest of some runs, in seconds."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        with torch.set_grad_enabled(backward):
            total = form().square().sum()
        if backward:
            torch.autograd.grad(total, tensors)
        total.item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    main()
