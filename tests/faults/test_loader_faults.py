"""A fetch that is killed at any moment leaves nothing that is taken for whole, and the next one finishes it."""

from __future__ import annotations

import json
import os
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from support.forked import SERVER

from stillhouse.assets.materialise import DatasetStep, main
from stillhouse.config.assets import DatasetEntry, HubSource
from stillhouse.runtime.files import verify_manifest
from tests.assets.hub_server import REVISION, HubServer
from tests.faults.test_training_faults import random_moments
from tests.support.tiny_models import word_problems

# One worker: a server that has imported torch forks their processes.
pytestmark = pytest.mark.xdist_group("programs")
ROWS = "".join(json.dumps(row) + "\n" for row in word_problems(2500)).encode()
SECONDS_PER_PIECE = 0.05


def load(url: str, folder: Path) -> None:
    """Fetch the hub's data set, with a cache of the folder's own; small pieces of a file are kept."""
    constants.HF_HUB_OFFLINE, constants.ENDPOINT, constants.DOWNLOAD_CHUNK_SIZE = False, url, 1 << 16
    constants.HUGGINGFACE_CO_URL_TEMPLATE = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    constants.HF_HUB_CACHE = str(folder / "hub")
    source = HubSource(repo="people/problems", revision=REVISION)
    entry = DatasetEntry(sources=(source,), reader="gsm8k", splits={"train": "train.jsonl"})
    main(DatasetStep(kind="dataset", name="problems", entry=entry, output=folder / "output"))


def start(hub: HubServer, folder: Path) -> ForkServerProcess:
    """Start a fetch in a process of its own."""
    folder.mkdir(exist_ok=True)
    process = SERVER.Process(target=load, args=(hub.url, folder))
    process.start()
    return process


def finish(process: ForkServerProcess) -> int | None:
    """Wait for its end; the exit status, negative for a signal."""
    process.join(60)
    return process.exitcode


@pytest.mark.fault("kill -9 of a loader at random moments", "nothing taken for whole; fetched again, the same files")
@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.faults)])
def test_a_fetch_killed_at_any_moment_is_finished_by_the_next(tmp_path: Path, count: int, record_property: Any) -> None:
    record_property("fault_cases", count)
    with HubServer("people/problems", {"train.jsonl": ROWS}, kind="datasets") as hub:
        hub.delay = SECONDS_PER_PIECE
        finish(start(hub, tmp_path / "warm"))  # Starts the server.
        started = time.monotonic()
        assert finish(start(hub, tmp_path / "undisturbed")) == 0
        seconds = time.monotonic() - started
        expected = verify_manifest(tmp_path / "undisturbed/output")
        met = 0
        for place, moment in enumerate(random_moments(seconds)):
            folder = tmp_path / str(place)
            process = start(hub, folder)
            process.join(moment)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            killed = finish(process) != 0
            met += killed
            # The kill may also come between the move into place and the process' end.
            assert (folder / "output").exists() or killed
            assert finish(start(hub, folder)) == 0
            assert verify_manifest(folder / "output") == expected
            if met == count:
                return
            assert place < 5 * count, "most of the kills must meet a running process"
