"""One tiny model directory for all training tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.tiny_models import make_tiny_llama


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def few_threads() -> None:
    """The tensors are tiny: threads only get in each other's way."""
    torch.set_num_threads(1)
