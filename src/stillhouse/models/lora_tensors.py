"""A LoRA adapter as plain tensors: read from a peft folder, checked, written back.

Every tensor of a file is matched to a module, and every module of the base that the adapter's targets name has its
pair: what does not match is an error that names the file, never skipped. An adapter may carry a leading axis of
several adapters (`stacked`); training and generators make such batches.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillhouse.models.loading import check_safetensors
from stillhouse.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, sort_target_modules
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json

_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<matrix>[AB])\.weight")
# peft's features that change what A and B mean; an adapter that uses one is refused.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layers_to_transform": ([], None),
}


@dataclass(frozen=True)
class ModuleShape:
    """A linear module that an adapter changes, by its name in the base model."""

    name: str
    inputs: int
    outputs: int

    @property
    def target(self) -> str:
        """The last part of the name, such as `q_proj`."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class LoraLayout:
    """What adapters must share to be compared, averaged or generated: modules in the model's order, rank and alpha."""

    modules: tuple[ModuleShape, ...]
    rank: int
    alpha: float

    @property
    def scaling(self) -> float:
        """The factor alpha / rank of B A."""
        return self.alpha / self.rank

    @property
    def targets(self) -> tuple[str, ...]:
        """The kinds of modules, such as `q_proj`, in order of first appearance."""
        return tuple(dict.fromkeys(module.target for module in self.modules))

    @property
    def values(self) -> int:
        """Numbers in one adapter."""
        return self.rank * sum(module.inputs + module.outputs for module in self.modules)


@dataclass(frozen=True)
class AdapterTensors:
    """A and B of each module by name: a [..., rank, inputs], b [..., outputs, rank]; W changes by scaling * b @ a.

    Leading axes, where there are any, count adapters and are the same for all modules.
    """

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    layout: LoraLayout

    @property
    def scaling(self) -> float:
        """The factor alpha / rank of B A."""
        return self.layout.scaling

    @property
    def count(self) -> int | None:
        """The number of adapters of a batch; None for a single adapter."""
        first = self.a[self.layout.modules[0].name]
        return len(first) if first.ndim == 3 else None

    def __getitem__(self, index: int) -> AdapterTensors:
        """One adapter of a batch."""
        raise NotImplementedError

    def to(self, target: torch.device | torch.dtype) -> AdapterTensors:
        """The same adapter on a device or in another type."""
        raise NotImplementedError

    def delta_w(self, module: str) -> Tensor:
        """What the adapter adds to a module's weight, scaling * B A, [..., outputs, inputs]."""
        raise NotImplementedError


def read_adapter(directory: Path | str) -> AdapterTensors:
    """The adapter of a peft folder in fp32, on the CPU.

    Raises `UserError` naming the file: missing or corrupt files, tensors that are no LoRA pair, shapes that disagree
    with the configuration, and features of peft that are more than plain LoRA.
    """
    raise NotImplementedError


def write_adapter(adapter: AdapterTensors, directory: Path | str, base_model: str) -> None:
    """Write a single adapter as a peft folder (`adapter_model.safetensors`, `adapter_config.json`), into `directory`.

    `base_model` is the name that peft records for the base.
    """
    raise NotImplementedError


def model_layout(model: nn.Module, targets: Sequence[str], rank: int, alpha: float) -> LoraLayout:
    """The layout of an adapter on every module of `model` that `targets` name."""
    raise NotImplementedError


def check_fits(layout: LoraLayout, model: nn.Module, source: Path | str) -> None:
    """Raise `UserError`, naming `source`, unless the layout has exactly the model's modules of its targets, shape by shape."""
    raise NotImplementedError


def check_same_layout(layout: LoraLayout, expected: LoraLayout, source: Path | str) -> None:
    """Raise `UserError`, naming `source` and the first difference, for an adapter of another base, rank or alpha."""
    raise NotImplementedError


def stacked(adapters: Sequence[AdapterTensors]) -> AdapterTensors:
    """Several adapters of one layout as a batch, a [A, rank, inputs] and b [A, outputs, rank]."""
    raise NotImplementedError


def mean_adapter(adapters: Sequence[AdapterTensors]) -> AdapterTensors:
    """The mean of A and of B, each by itself."""
    raise NotImplementedError


def adapter_digest(adapter: AdapterTensors) -> str:
    """Sha256 of a single adapter's layout and fp32 values: the key of what is computed from it."""
    raise NotImplementedError


def squared_distance(first: AdapterTensors, second: AdapterTensors) -> Tensor:
    """||dW_1 - dW_2||_F^2 summed over modules, [...]; invariant to the gauge (B M^-1, M A), differentiable."""
    raise NotImplementedError


def squared_norm(adapter: AdapterTensors) -> Tensor:
    """||dW||_F^2 summed over modules, [...]."""
    raise NotImplementedError


def relative_error(adapter: AdapterTensors, reference: AdapterTensors) -> Tensor:
    """||dW - dW_ref||_F / ||dW_ref||_F over all modules, [...]; in fp64."""
    raise NotImplementedError
