"""A LoRA adapter as plain tensors: read from a peft folder, checked, compared, written back.

Every tensor of a file is matched to a module, and every module of the base that the adapter's targets name has its
pair: what does not match is an error that names the file, never skipped. An adapter may carry a leading axis of
several adapters (`stacked`); generators and batched training make such batches.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillhouse.models.loading import check_safetensors
from stillhouse.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, sort_target_modules
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import read_json

_TENSOR_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Entries of an adapter's configuration that say nothing about what A and B mean; any other must be peft's default.
_FREE_ENTRIES = {
    "r",
    "lora_alpha",
    "target_modules",
    "lora_dropout",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "inference_mode",
    "init_lora_weights",
    "peft_version",
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
    """What adapters share that can be compared, averaged or generated: modules in the model's order, rank and alpha."""

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

    The leading axis of a batch counts adapters, and is the same for all modules.
    """

    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]
    layout: LoraLayout

    @property
    def count(self) -> int | None:
        """The number of adapters of a batch; None for a single adapter."""
        first = self.a[self.layout.modules[0].name]
        return len(first) if first.ndim == 3 else None

    def __getitem__(self, index: int) -> AdapterTensors:
        """One adapter of a batch."""
        if not -(self.count or 0) <= index < (self.count or 0):
            raise IndexError(index)
        return self.map(lambda tensor: tensor[index])

    def to(self, target: torch.device | torch.dtype) -> AdapterTensors:
        """The same adapter on a device, or in another type."""
        return self.map(lambda tensor: tensor.to(target))

    def map(self, change: Callable[[Tensor], Tensor]) -> AdapterTensors:
        """The adapter whose tensors are `change` of these."""
        return AdapterTensors(
            {name: change(tensor) for name, tensor in self.a.items()},
            {name: change(tensor) for name, tensor in self.b.items()},
            self.layout,
        )

    def delta_w(self, module: str) -> Tensor:
        """What the adapter adds to a module's weight, scaling * B A, [..., outputs, inputs]."""
        return self.layout.scaling * self.b[module] @ self.a[module]


def read_adapter(directory: Path | str) -> AdapterTensors:
    """The adapter of a peft folder in fp32, on the CPU.

    Raises `UserError` naming the file: missing or corrupt files, tensors that are no LoRA pair, shapes that disagree
    with the configuration, and features of peft that are more than plain LoRA.
    """
    directory = Path(directory)
    rank, alpha, targets = _read_configuration(directory / ADAPTER_CONFIG)
    file = directory / ADAPTER_WEIGHTS
    check_safetensors(file)
    matrices: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    for name, tensor in load_file(file).items():
        match = _TENSOR_NAME.fullmatch(name)
        if not match or not _is_target(match[1], targets):
            raise UserError(
                f"{file}: '{name}' is no LoRA matrix of {', '.join(targets)}: read plain LoRA adapters only"
            )
        matrices[match[2]][match[1]] = tensor.float()
    a, b = matrices["A"], matrices["B"]
    for module in a.keys() ^ b.keys():
        raise UserError(f"{file}: has only one of the two matrices of '{module}': make the adapter again")
    for target in targets:
        if not any(_is_target(module, (target,)) for module in a):
            raise UserError(f"{file}: has no matrices of '{target}', which {ADAPTER_CONFIG} names: make it again")
    for module in a:
        if a[module].ndim != 2 or b[module].ndim != 2 or a[module].shape[0] != rank or b[module].shape[1] != rank:
            shapes = f"{list(a[module].shape)} and {list(b[module].shape)}"
            raise UserError(f"{file}: A and B of '{module}' are {shapes}, not of rank {rank} as {ADAPTER_CONFIG} says")
    names = sorted(a, key=_natural)
    shapes_of = tuple(ModuleShape(name, a[name].shape[1], b[name].shape[0]) for name in names)
    return AdapterTensors(
        {name: a[name] for name in names}, {name: b[name] for name in names}, LoraLayout(shapes_of, rank, alpha)
    )


def write_adapter(adapter: AdapterTensors, directory: Path | str, base_model: str) -> None:
    """Write a single adapter as a peft folder (`adapter_model.safetensors`, `adapter_config.json`), into `directory`.

    `base_model` is the name that peft records for the base.
    """
    directory, layout = Path(directory), adapter.layout
    directory.mkdir(parents=True, exist_ok=True)
    pairs = (("A", adapter.a), ("B", adapter.b))
    tensors = {
        f"base_model.model.{name}.lora_{matrix}.weight": tensor.detach().float().cpu().contiguous()
        for matrix, named in pairs
        for name, tensor in named.items()
    }
    save_file(tensors, directory / ADAPTER_WEIGHTS)
    LoraConfig(
        task_type="CAUSAL_LM",
        r=layout.rank,
        lora_alpha=int(layout.alpha) if layout.alpha == int(layout.alpha) else layout.alpha,
        target_modules=list(layout.targets),
        base_model_name_or_path=base_model,
        inference_mode=True,
    ).save_pretrained(str(directory))
    sort_target_modules(directory / ADAPTER_CONFIG)


def model_layout(model: nn.Module, targets: Sequence[str], rank: int, alpha: float) -> LoraLayout:
    """The layout of an adapter on every linear module of `model` that `targets` name."""
    modules = [
        ModuleShape(name, int(module.in_features), int(module.out_features))
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and _is_target(name, targets)
    ]
    return LoraLayout(tuple(sorted(modules, key=lambda module: _natural(module.name))), rank, alpha)


def check_fits(layout: LoraLayout, model: nn.Module, source: Path | str) -> None:
    """Raise `UserError`, naming `source`, unless the layout has just the model's modules of its targets."""
    own = model_layout(model, layout.targets, layout.rank, layout.alpha)
    check_same_layout(layout, own, source, f"this {type(model).__name__}")


def check_same_layout(
    layout: LoraLayout, expected: LoraLayout, source: Path | str, what: str = "the other adapters"
) -> None:
    """Raise `UserError`, naming `source` and the first difference, for an adapter of another base, rank or alpha."""
    if layout == expected:
        return
    remedy = "use adapters of one base model, rank and targets"
    for name in ("rank", "alpha"):
        if (own := getattr(layout, name)) != (other := getattr(expected, name)):
            raise UserError(f"{source}: has {name} {own:g}, {what} {other:g}: {remedy}")
    ours, theirs = ({module.name: module for module in given.modules} for given in (layout, expected))
    name = min(
        (name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)), key=_natural, default=""
    )
    described = [
        f"{found.inputs} to {found.outputs}" if found else "missing" for found in (ours.get(name), theirs.get(name))
    ]
    raise UserError(
        f"{source}: is of another base model: '{name}' is {described[0]} ({len(ours)} modules), in {what} it is "
        f"{described[1]} ({len(theirs)} modules): {remedy}"
    )


def stacked(adapters: Sequence[AdapterTensors]) -> AdapterTensors:
    """Several adapters of one layout as a batch, a [A, rank, inputs] and b [A, outputs, rank]."""
    layout = adapters[0].layout
    if any(adapter.layout != layout for adapter in adapters):
        raise ValueError("adapters of different layouts cannot be stacked")
    names = [module.name for module in layout.modules]
    return AdapterTensors(
        {name: torch.stack([adapter.a[name] for adapter in adapters]) for name in names},
        {name: torch.stack([adapter.b[name] for adapter in adapters]) for name in names},
        layout,
    )


def mean_adapter(adapters: Sequence[AdapterTensors]) -> AdapterTensors:
    """The mean of A and the mean of B. Each by itself: it is a sensible adapter only where all began at the same A."""
    return stacked(adapters).map(lambda tensor: tensor.mean(0))


def adapter_digest(adapter: AdapterTensors) -> str:
    """Sha256 of a single adapter's layout and fp32 values: the key of what is computed from it."""
    layout = asdict(adapter.layout) | {"alpha": float(adapter.layout.alpha)}
    hasher = hashlib.sha256(json.dumps(layout, sort_keys=True).encode())
    for module in adapter.layout.modules:
        for tensor in (adapter.a[module.name], adapter.b[module.name]):
            hasher.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def squared_norm(adapter: AdapterTensors) -> Tensor:
    """||scaling B A||_F^2 summed over modules, [...]."""
    return _squared_norm(
        (adapter.layout.scaling * adapter.b[module.name], adapter.a[module.name]) for module in adapter.layout.modules
    )


def squared_distance(first: AdapterTensors, second: AdapterTensors) -> Tensor:
    """||dW_1 - dW_2||_F^2 summed over modules, [...]; differentiable.

    It does not change where an adapter is written with other factors, B M and M^-1 A.
    """
    own, other = first.layout.scaling, second.layout.scaling

    def difference(module: str) -> tuple[Tensor, Tensor]:
        b = torch.cat([own * first.b[module], -other * second.b[module]], dim=-1)
        return b, torch.cat([first.a[module], second.a[module]], dim=-2)

    return _squared_norm(difference(module.name) for module in first.layout.modules)


def relative_error(adapter: AdapterTensors, reference: AdapterTensors) -> Tensor:
    """||dW - dW_reference||_F / ||dW_reference||_F over all modules, [...]."""
    return (squared_distance(adapter, reference).clamp(min=0) / squared_norm(reference)).sqrt()


def _squared_norm(factors: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of ||b a||_F^2 = tr((b^T b)(a a^T)), without a product of a weight's size.

    In fp64: the terms of a distance between equal adapters cancel.
    """
    total: Tensor | float = 0.0
    for b, a in factors:
        b, a = b.double(), a.double()
        total = total + ((b.mT @ b) * (a @ a.mT)).sum((-2, -1))
    assert isinstance(total, Tensor)
    return total


def _read_configuration(path: Path) -> tuple[int, float, tuple[str, ...]]:
    """Rank, alpha and target modules of an adapter's configuration; `UserError` for what is not plain LoRA."""
    configuration = read_json(path)
    if not isinstance(configuration, dict):
        raise UserError(f"{path}: is not an adapter's configuration: make the adapter again")
    defaults = LoraConfig().to_dict()
    for name, value in configuration.items():
        if name not in _FREE_ENTRIES and value and value != defaults.get(name):
            raise UserError(f"{path}: '{name}' is {value}: only plain LoRA adapters are read")
    rank, alpha, targets = (configuration.get(name) for name in ("r", "lora_alpha", "target_modules"))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)) or alpha <= 0:
        raise UserError(f"{path}: r ({rank}) and lora_alpha ({alpha}) must be numbers above 0: make the adapter again")
    if not isinstance(targets, list) or not targets:
        raise UserError(f"{path}: target_modules must be a list of module names (given: {targets}): make it again")
    return rank, float(alpha), tuple(sorted(targets))


def _is_target(module: str, targets: Sequence[str]) -> bool:
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
