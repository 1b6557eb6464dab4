"""The made-up corpus and its artefacts, made once; bit-equality is promised on one thread of the processor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from stillhouse.studies.consistency_lens import activations
from tests.consistency_lens.corpus import extraction_step, make_corpus, tokenise


@dataclass(frozen=True)
class Artefacts:
    """Directories of the tiny model, the divided corpus, its tokens and its activations."""

    model: Path
    data: Path
    tokens: Path
    activations: Path


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("ACCELERATE_USE_CPU", "true")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def artefacts(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    folder = tmp_path_factory.mktemp("lens")
    data = make_corpus(folder / "data")
    tokens = tokenise(tiny_model, data, folder / "tokens")
    extracted = folder / "activations"
    activations.main(extraction_step(tiny_model, tokens, extracted))
    return Artefacts(tiny_model, data, tokens, extracted)
