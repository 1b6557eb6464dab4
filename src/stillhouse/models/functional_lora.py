"""A model with LoRA tensors from outside: differentiable in the tensors, nothing in the model is changed.

A batch of adapters runs in one forward pass: the rows of the input belong to the adapters in equal, consecutive
groups. Hooks add what each adapter adds; `torch.func.functional_call` with changed weights is the plain form of the
same thing, one adapter at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear

from stillhouse.models.lora_tensors import AdapterTensors, check_fits


@contextmanager
def applied(model: nn.Module, adapter: AdapterTensors) -> Iterator[None]:
    """Within the context every forward pass of `model` has the adapter, or the batch of A adapters.

    With a batch the input has A * P rows, and row i belongs to adapter i // P. Where activations are recomputed for the
    backward pass (gradient checkpointing), that has to happen within the context too.
    Raises `UserError` for an adapter that does not fit the model, `ValueError` for rows that A does not divide.
    """
    check_fits(adapter.layout, model, "adapter")
    with ExitStack() as stack:
        for module in adapter.layout.modules:
            hook = _adding(adapter.a[module.name], adapter.layout.scaling * adapter.b[module.name])
            stack.callback(model.get_submodule(module.name).register_forward_hook(hook).remove)
        yield


def functional_forward(model: nn.Module, adapter: AdapterTensors, **inputs: Any) -> Any:
    """The model's output on `inputs` with the weights of a single adapter, through `torch.func.functional_call`."""
    return functional_call(model, changed_weights(model, adapter), kwargs=inputs)


def changed_weights(model: nn.Module, adapter: AdapterTensors) -> dict[str, Tensor]:
    """The weights W + scaling * B A of a single adapter's modules, by parameter name; differentiable in A and B.

    Raises `UserError` for an adapter that does not fit the model, `ValueError` for a batch.
    """
    check_fits(adapter.layout, model, "adapter")
    if adapter.count is not None:
        raise ValueError(f"weights are changed by one adapter at a time, not by a batch of {adapter.count}")
    weights = {module.name: model.get_parameter(f"{module.name}.weight") for module in adapter.layout.modules}
    return {f"{name}.weight": weight + adapter.delta_w(name).to(weight) for name, weight in weights.items()}


def _adding(a: Tensor, b: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """A forward hook that adds x A^T B^T to a linear module's output; each adapter of a batch acts on its own rows."""

    def single(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + linear(linear(arguments[0].to(a.dtype), a), b).to(output.dtype)

    def batched(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        rows = arguments[0]
        if len(rows) % len(a):
            raise ValueError(f"{len(rows)} rows cannot be shared out to {len(a)} adapters")
        groups = rows.to(a.dtype).reshape(len(a), -1, rows.shape[-1])
        added = torch.bmm(torch.bmm(groups, a.mT), b.mT)
        return output + added.reshape(output.shape).to(output.dtype)

    return single if a.ndim == 2 else batched
