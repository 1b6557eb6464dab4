"""Files are whole or absent, and a damaged directory is named."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import (
    atomic_write_text,
    disk_errors,
    read_json,
    read_sealed_json,
    staged_directory,
    verify_manifest,
    write_manifest,
    write_sealed_json,
)


@pytest.mark.fault("disk full while a file is replaced", "the old file is whole; one line that names the path")
def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value.txt"
    atomic_write_text(path, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"value\.txt: the disk is full .* what was finished is kept"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["value.txt"]


def test_a_directory_without_permission_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"), disk_errors(tmp_path / "x"):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_staged_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "output"
    with pytest.raises(RuntimeError), staged_directory(final) as staging:
        (staging / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with staged_directory(final) as staging:
        (staging / "whole").write_text("x")
        assert not final.exists()
    assert [path.name for path in final.iterdir()] == ["whole"]


@pytest.mark.fault("damaged file in an output", "refused; the line names the file and what to delete")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "is missing"),
        (lambda file: file.write_bytes(b"ab"), "has 2 bytes, not 3"),
        (lambda file: file.write_bytes(b"abX"), "is corrupt"),
    ],
)
def test_a_damaged_directory_names_the_file_and_the_remedy(tmp_path: Path, damage, message: str) -> None:
    (tmp_path / "shard.bin").write_bytes(b"abc")
    write_manifest(tmp_path)
    verify_manifest(tmp_path)
    damage(tmp_path / "shard.bin")
    with pytest.raises(UserError, match=rf"shard\.bin: {message}.*: delete .* and run the same command again"):
        verify_manifest(tmp_path)


@pytest.mark.fault("damaged manifest of an output", "refused; the line names the file and what to delete")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "is not valid JSON"),
        (lambda data: data.replace(b'"files"', b'"fileS"'), "lists no files"),
        (lambda data: data.replace(b'"bytes"', b'"bytez"'), r"says too little of shard\.bin"),
        (lambda data: b"[]", "lists no files"),
    ],
    ids=["truncated", "flipped in a key", "flipped in an entry", "another file"],
)
def test_a_damaged_manifest_is_named_with_the_remedy(tmp_path: Path, damage, message: str) -> None:
    (tmp_path / "shard.bin").write_bytes(b"abc")
    write_manifest(tmp_path)
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(damage(manifest.read_bytes()))
    with pytest.raises(
        UserError, match=rf"manifest\.json: {message}.*: delete {tmp_path} and run the same command again"
    ):
        verify_manifest(tmp_path)


@pytest.mark.fault(
    "file of an output that cannot be read (permission, failing disk)", "a line that names the file and what to do"
)
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_file_that_cannot_be_read_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "shard.bin").write_bytes(b"abc")
    write_manifest(tmp_path)
    opened = Path.open

    def failing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "shard.bin":
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", failing)
    message = rf"shard\.bin: cannot be read \({os.strerror(number)}\): check its permissions .* delete {tmp_path} and"
    with pytest.raises(UserError, match=message):
        verify_manifest(tmp_path)


def test_a_sealed_file_gives_what_was_written_and_names_any_other_content(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    content = {"value": 0.25, "name": "ä", "missing": None, "2": [1, {"a": True}], "10": "x"}
    write_sealed_json(path, content)
    assert read_sealed_json(path) == content
    whole = path.read_bytes()
    for damaged in (whole.replace(b"0.25", b"0.35"), whole.replace(b'"digest"', b'"digesu"'), b"[]"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"results\.json: is corrupt .*: delete it and run the same command again"):
            read_sealed_json(path)


def test_damaged_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text("{")
    with pytest.raises(UserError, match=r"run\.json: is not valid JSON"):
        read_json(path)
    with pytest.raises(UserError, match=r"absent\.json: does not exist"):
        read_json(tmp_path / "absent.json")
