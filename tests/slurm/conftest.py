"""A one-node Slurm for the tests of this folder; where none can run they are skipped, and say why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm import one_node


@pytest.fixture(scope="session")
def slurm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running Slurm with four simulated GPUs, on request with books; its directory holds the daemons' logs."""
    pytest.importorskip("snakemake_executor_plugin_slurm")
    directory = tmp_path_factory.mktemp("slurm") / "node"
    try:
        one_node.up(directory, books=getattr(request, "param", None) == "books")
    except one_node.SlurmUnavailableError as reason:
        one_node.down(directory)
        pytest.skip(f"no Slurm here: {reason}")
    yield directory
    one_node.down(directory)
