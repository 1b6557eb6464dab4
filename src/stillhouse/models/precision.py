"""The number format of computation: `auto` asks the device whether bfloat16 is fast, not only whether it
works.

A processor without bf16 instructions emulates it (measured: five times slower than fp32), so `auto` takes
fp32 there. Master weights and optimiser moments are fp32 under either; see `training.loop`.
"""

from __future__ import annotations

import os
from typing import Literal

import torch

from stillhouse.config.training import Precision
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.logs import logger

ResolvedPrecision = Literal["bf16", "fp32"]
# Names of torch.cpu.get_capabilities: x86 with AVX-512 or AMX, and Arm.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def default_device() -> torch.device:
    """The GPU of this process (launchers number the processes of a node), else the processor."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in BF16_INSTRUCTIONS)


def resolve_precision(precision: Precision, device: torch.device | None = None) -> ResolvedPrecision:
    """The format that `auto` means on the device (default: the one that torch sees); others are taken at
    their word.

    Raises `UserError` where bf16 is asked of a GPU that has none; a slow processor only gets a warning.
    """
    device = device or default_device()
    if precision == "auto":
        return "bf16" if bf16_is_fast(device) else "fp32"
    if precision == "bf16" and not bf16_is_fast(device):
        if device.type == "cuda":
            raise UserError(f"precision: {torch.cuda.get_device_name(device)} has no bf16: use fp32 or auto")
        logger.warning("precision bf16 is emulated on this processor and slow: fp32 or auto is faster")
    return precision


def torch_dtype(precision: ResolvedPrecision) -> torch.dtype:
    """The torch type of a resolved precision."""
    return torch.bfloat16 if precision == "bf16" else torch.float32
