"""Fixtures of the whole suite: no hub, two threads, and a tiny model with a tokenizer that is made once."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from support.fault_table import leave_out_long_faults, pytest_addoption, pytest_terminal_summary  # noqa: F401 (hooks)
from support.order import groups_first

# Before any library reads them: tests never reach a hub, and tiny matrices are slower on more threads than one.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    leave_out_long_faults(config, items)
    groups_first(items)


def pytest_collection_finish() -> None:
    gc.freeze()  # The garbage collector need not search what was imported, again and again.


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with its own tokenizer, as a materialised model directory."""
    from support.tiny_models import make_tiny_llama

    directory = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny_llama(directory)
    return directory
