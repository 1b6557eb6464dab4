"""Seeds: one per run, from which every random source derives its own by name."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derived_seed(seed: int, *names: object) -> int:
    """A seed in [0, 2**63) for one named source of randomness, independent of the other names' seeds."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (every device)."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator(seed: int, *names: object) -> torch.Generator:
    """A torch generator of its own for one named source of randomness."""
    import torch

    return torch.Generator().manual_seed(derived_seed(seed, *names))
