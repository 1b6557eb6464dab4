"""The hub's files arrive at the pinned revision, through a stand-in of the hub on localhost."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants, file_download

from stillhouse.assets.fetch import fetch
from stillhouse.assets.models import wanted_files
from stillhouse.config.assets import DatasetEntry, HubSource, ModelEntry
from stillhouse.runtime.errors import UserError
from tests.assets.hub_server import REVISION, HubServer
from tests.support.tiny_models import word_problems

WEIGHTS = bytes(range(256)) * 2000
PATIENCE = 1.0
FILES = {
    "config.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"pickle",
    "modeling_mine.py": b"code",
    "onnx/model.safetensors": b"another format",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The stand-in as the client's endpoint, with a cache of the test's own and no waiting between attempts."""
    with HubServer("people/model", FILES) as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        # The client keeps whole pieces of an interrupted answer: small ones here, 10 MB as it comes.
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)
        monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
        yield server


def entry(revision: str | None = REVISION, repo: str = "people/model", **fields: str) -> ModelEntry:
    return ModelEntry(sources=(HubSource(repo=repo, revision=revision),), **fields)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_only_data_files_of_the_top_folder_are_downloaded(hub: HubServer, tmp_path: Path) -> None:
    folder = fetch("mine", entry(), wanted_files(False), tmp_path / "scratch")
    assert names(folder) == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_code_is_downloaded_only_where_the_entry_trusts_it(hub: HubServer, tmp_path: Path) -> None:
    folder = fetch("mine", entry(), wanted_files(True), tmp_path / "scratch")
    assert "modeling_mine.py" in names(folder)
    assert "pytorch_model.bin" not in names(folder)


def test_a_second_fetch_downloads_nothing(hub: HubServer, tmp_path: Path) -> None:
    fetch("mine", entry(), wanted_files(False), tmp_path / "scratch")
    before = len(hub.downloads)
    fetch("mine", entry(), wanted_files(False), tmp_path / "scratch")
    assert len(hub.downloads) == before


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A client that waits for each answer, and each piece of one, PATIENCE seconds instead of ten."""
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(constants, name, PATIENCE)
    monkeypatch.setattr(file_download, "_ETAG_RETRY_TIMEOUT", PATIENCE)
    yield
    close_session()


@pytest.mark.fault("hub that answers slowly", "waited for; the files are whole")
def test_a_hub_that_needs_longer_than_the_client_s_patience_for_a_file_is_waited_for(
    hub: HubServer, impatient: None, tmp_path: Path
) -> None:
    hub.delay = 0.4 * PATIENCE
    started = time.monotonic()
    folder = fetch("mine", entry(), wanted_files(False), tmp_path / "scratch")
    assert time.monotonic() - started > 2 * PATIENCE
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.fault("hub that takes a request and stays silent", "a line that names the source and the ways out")
@pytest.mark.parametrize("request_for", ["/tree/", "/resolve/"])
def test_a_silent_hub_is_given_up_and_named(hub: HubServer, impatient: None, tmp_path: Path, request_for: str) -> None:
    hub.silent = request_for
    with pytest.raises(UserError, match=r"people/model .*no network: .*set HF_ENDPOINT to a mirror, or .*kind path"):
        fetch("mine", entry(), ("*.json",), tmp_path / "scratch")
    hub.silent = None
    assert names(fetch("mine", entry(), ("*.json",), tmp_path / "scratch")) == ["config.json"]


@pytest.mark.fault("hub that breaks off in a file", "continued at the byte where it stopped")
def test_an_answer_that_breaks_off_is_continued_where_it_stopped(hub: HubServer, tmp_path: Path) -> None:
    hub.break_after, hub.breaks = 100_000, 2
    folder = fetch("mine", entry(), ("model.safetensors",), tmp_path / "scratch")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert [part for _, _, part in hub.requests if part] == ["bytes=65536-", "bytes=131072-"]


@pytest.mark.fault(
    "hub that keeps breaking off",
    "a line that says what to do; nothing taken for whole; a later run finishes",
)
def test_a_hub_that_keeps_breaking_off_is_told_and_nothing_is_taken_for_whole(hub: HubServer, tmp_path: Path) -> None:
    hub.break_after, hub.breaks = 0, 1000
    with pytest.raises(UserError, match=r"hub repository people/model .*no network: .*run the same command again"):
        fetch("mine", entry(), ("model.safetensors",), tmp_path / "scratch")
    hub.breaks = 0
    folder = fetch("mine", entry(), ("model.safetensors",), tmp_path / "scratch")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_revision_that_is_not_there_is_named(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"people/model \(revision {'f' * 40}\): has no such revision"):
        fetch("mine", entry("f" * 40), ("*.json",), tmp_path / "scratch")


def test_a_repository_that_is_not_there_is_named(hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"people/other .*does not exist or is private: correct 'repo'"):
        fetch("mine", entry(repo="people/other"), ("*.json",), tmp_path / "scratch")


def test_a_gated_repository_asks_for_the_licence_and_a_token(hub: HubServer, tmp_path: Path) -> None:
    hub.error = (403, "GatedRepo")
    with pytest.raises(UserError, match="is gated: accept its licence on the hub and set HF_TOKEN"):
        fetch("mine", entry(), ("*.json",), tmp_path / "scratch")


@pytest.mark.fault("hub that does not answer", "a line that names the source and the ways out")
def test_without_network_the_message_names_the_source_and_the_way_out(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"people/model .*no network: .*set HF_ENDPOINT to a mirror, or .*kind path"):
        fetch("mine", entry(), ("*.json",), tmp_path / "scratch")


def test_a_null_revision_is_required_from_the_user_by_its_key(tmp_path: Path) -> None:
    message = r"models\.mine\.sources\.0\.revision is null: set it to the commit of hub repository people/model"
    with pytest.raises(UserError, match=message):
        fetch("mine", entry(revision=None), ("*.json",), tmp_path / "scratch")
    assert "sources.0.revision is not set" in str(entry(revision=None).objection())


def test_a_file_that_is_pinned_by_its_sha256_needs_no_revision(hub: HubServer, tmp_path: Path) -> None:
    hub.files = {"m.gguf": WEIGHTS}
    source = HubSource(repo="people/model", file="m.gguf", revision=REVISION)
    pinned = ModelEntry(format="gguf", sources=(source,), sha256=hashlib.sha256(WEIGHTS).hexdigest())
    assert fetch("mine", pinned, (), tmp_path / "scratch").read_bytes() == WEIGHTS
    assert pinned.pins_content(source.model_copy(update={"revision": None}))
    assert not ModelEntry(format="gguf", sources=(source,)).pins_content(source.model_copy(update={"revision": None}))


def test_a_file_that_is_not_in_the_repository_is_named(hub: HubServer, tmp_path: Path) -> None:
    source = HubSource(repo="people/model", file="absent.gguf", revision=REVISION)
    with pytest.raises(UserError, match=r"has no file absent\.gguf: correct 'file'"):
        fetch("mine", ModelEntry(format="gguf", sources=(source,)), (), tmp_path / "scratch")


def test_the_step_honours_the_endpoint_of_the_environment(tmp_path: Path) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in word_problems(3)).encode()
    with HubServer("people/problems", {"main/train-0.jsonl": rows}, kind="datasets") as server:
        source = f"{{kind: hub, repo: people/problems, revision: '{REVISION}'}}"
        environment = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
        }
        arguments = ["kind=dataset", "name=mine", f"output={tmp_path / 'mine'}", f"entry.sources=[{source}]"]
        arguments += ["entry.reader=gsm8k", "entry.splits.train=main/train-*.jsonl"]
        command = [sys.executable, "-m", "stillhouse.assets.materialise", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "mine/train.jsonl").read_text().splitlines()) == 3


def test_data_sets_of_the_hub_are_refused_unpinned_too(tmp_path: Path) -> None:
    unpinned = DatasetEntry(sources=(HubSource(repo="people/problems"),), reader="gsm8k", splits={"train": "*"})
    with pytest.raises(UserError, match=r"^datasets\.mine: datasets\.mine\.sources\.0\.revision is null"):
        fetch("mine", unpinned, ("*",), tmp_path / "scratch")
