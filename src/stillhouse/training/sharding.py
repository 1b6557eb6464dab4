"""Weights, gradients and optimiser moments spread over processes, for models that one device cannot hold (FSDP2).

Each process keeps a part of every tensor; a layer's weights are gathered when it runs. States and checkpoints are
gathered whole before they are written, so they do not tell how many processes made them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from stillhouse.training.processes import process_state


def shard(model: nn.Module, device: torch.device, keep_weights_gathered: bool) -> None:
    """Spread the parameters of `model`, in place; they are other objects afterwards.

    `keep_weights_gathered` holds a layer's whole weights from its forward to its backward pass: more memory, one
    gathering less, which is what ZeRO stage 2 saves and costs (arXiv 1910.02054).
    """
    mesh = init_device_mesh(device.type, (process_state().num_processes,))
    layer_types = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in layer_types]
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=not keep_weights_gathered)


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors, on the main process; spread ones come to the host's memory, one after another.

    Every process must call this. Tied tensors stay one tensor.
    """
    main = process_state().is_main_process
    whole: dict[str, Tensor] = {}
    of_local: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            part = tensor.to_local()
            local = part.data_ptr()
            if local not in of_local or part.numel() == 0:  # Empty parts have no address to be told apart by.
                full = tensor.full_tensor().detach()
                of_local[local] = full.cpu() if main else full.new_empty(0)
            whole[name] = of_local[local]
        else:
            whole[name] = tensor
    return whole if main else {}


def spread_like(tensor: Tensor, template: Tensor) -> Tensor:
    """The part of a whole `tensor` that this process keeps of `template`; all of it where that is not spread."""
    if not isinstance(template, DTensor) or tensor.shape != template.shape:
        return tensor
    return distribute_tensor(tensor.to(template.device), template.device_mesh, template.placements)


def scalar(value: Tensor) -> float:
    """A number that may be spread over processes."""
    whole: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.item()
