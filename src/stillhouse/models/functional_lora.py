"""A model with LoRA tensors from outside: differentiable in the tensors, nothing in the model is changed.

A batch of adapters runs in one forward pass: the rows of the input belong to the adapters in equal, consecutive
groups. Hooks add what each adapter adds; `torch.func.functional_call` with changed weights is the plain form of the
same thing, for a single adapter at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stillhouse.models.lora_tensors import AdapterTensors


@contextmanager
def applied(model: nn.Module, adapter: AdapterTensors) -> Iterator[None]:
    """Within the context every forward pass of `model` has the adapter, or the batch of A adapters.

    With a batch, the input has A * P rows, and row i belongs to adapter i // P: adapters x probes, adapter-major.
    Raises `UserError` for an adapter that does not fit the model, `ValueError` for rows that A does not divide.
    """
    raise NotImplementedError
    yield


def functional_forward(model: nn.Module, adapter: AdapterTensors, **inputs: Any) -> Any:
    """The model's output on `inputs` with weights W + scaling * B A, through `torch.func.functional_call`."""
    raise NotImplementedError


def changed_weights(model: nn.Module, adapter: AdapterTensors) -> dict[str, Tensor]:
    """The weights W + scaling * B A of the adapter's modules, by parameter name; differentiable in A and B."""
    raise NotImplementedError
