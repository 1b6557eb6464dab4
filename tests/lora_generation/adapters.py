"""Random adapters of a small layout, for tests of what works on adapters alone."""

from __future__ import annotations

import torch

from stillhouse.models.lora_tensors import AdapterTensors, LoraLayout, ModuleShape


def small_layout(rank: int = 3, alpha: float = 6, layers: int = 2) -> LoraLayout:
    """Two targets of unlike shapes in each layer."""
    modules = [
        ModuleShape(f"model.layers.{layer}.{name}", inputs, outputs)
        for layer in range(layers)
        for name, inputs, outputs in (("mlp.down_proj", 20, 12), ("self_attn.v_proj", 12, 5))
    ]
    return LoraLayout(tuple(modules), rank, alpha)


def random_adapter(layout: LoraLayout, seed: int, size: float = 1.0) -> AdapterTensors:
    """Normal values, of another size in each layer."""
    draw = torch.Generator().manual_seed(seed)

    def values(rows: int, columns: int, module: ModuleShape) -> torch.Tensor:
        return size * (1 + int(module.name.split(".")[2])) * torch.randn(rows, columns, generator=draw)

    return AdapterTensors(
        {module.name: values(layout.rank, module.inputs, module) for module in layout.modules},
        {module.name: values(module.outputs, layout.rank, module) for module in layout.modules},
        layout,
    )


def largest_difference(first: AdapterTensors, second: AdapterTensors) -> float:
    """The largest difference of any two values."""
    pairs = [(first.a[name], second.a[name]) for name in first.a] + [
        (first.b[name], second.b[name]) for name in first.b
    ]
    return max(float((one - other).abs().max()) for one, other in pairs)
