"""One tiny collection, its delta activations and a sentence encoder, made once for the room's tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from stillhouse.studies.lora_generation.delta_cache import DeltasStep
from stillhouse.studies.lora_generation.delta_cache import main as compute_deltas
from stillhouse.studies.lora_generation.probes import ProbeSettings
from tests.lora_generation.tiny_collection import make_collection
from tests.support.tiny_models import make_tiny_sentence_encoder


@dataclass(frozen=True)
class TinyStudy:
    """Directories that the steps of the room read."""

    model: Path
    encoder: Path
    adapters: Path
    deltas: Path


@pytest.fixture(scope="session")
def tiny_study(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TinyStudy:
    """Three tasks of four shards each."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("lora_generation")
    adapters = make_collection(folder / "adapters", tiny_model)
    probes = ProbeSettings(kind="generic", at_once=5)
    step = DeltasStep(
        model=tiny_model, adapters=adapters, output=folder / "deltas", work=folder / "work", probes=probes
    )
    compute_deltas(step)
    return TinyStudy(tiny_model, make_tiny_sentence_encoder(folder / "encoder"), adapters, step.output)
