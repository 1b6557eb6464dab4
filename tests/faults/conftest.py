"""What the fault suite shares: an undisturbed training to compare with, and a disk that is really small."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults import trainer


@dataclass(frozen=True)
class Undisturbed:
    """The results of a training that nothing disturbed, and how long it took."""

    folder: Path
    seconds: float

    def __eq__(self, folder: object) -> bool:
        """Whether the training in another folder ended with the same weights and losses, bit for bit."""
        return isinstance(folder, Path) and trainer.results(folder) == trainer.results(self.folder)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert trainer.run(tiny_model, folder / "warm") == 0  # starts the server
    started = time.monotonic()
    assert trainer.run(tiny_model, folder / "run") == 0, trainer.messages(folder / "run")
    return Undisturbed(folder / "run", time.monotonic() - started)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory of 256 KiB, half of it taken by `filler`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "stillhouse-test", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
