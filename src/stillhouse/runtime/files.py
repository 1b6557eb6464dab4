"""Files that are either whole or absent: atomic writes, staged directories and their manifests.

A directory that a step leaves behind carries a `manifest.json` with the size and sha256 of each of its files.
Readers call `verify_manifest`, so that a damaged or half-copied directory is named instead of being used. A JSON file
that stands alone is sealed: it carries the digest of its own content, and `read_sealed_json` checks it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from stillhouse.runtime.errors import UserError
from stillhouse.runtime.logs import logger

MANIFEST = "manifest.json"
SEAL = "digest"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or read-only disk into one clear line that names the path."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(existing_parent(path)).free
            raise UserError(
                f"{path}: the disk is full ({free / 2**20:.0f} MiB free): free some space and run the same command "
                "again; what was finished is kept"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES):
            raise UserError(f"{path}: cannot be written ({error.strerror}): check the permissions") from error
        raise


@contextmanager
def reading_errors(path: Path, to_delete: Path | str = "it") -> Iterator[None]:
    """Turn a file that cannot be read, for want of permission or by a failing disk, into one clear line."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or error}): check its permissions and the disk; where the "
            f"file is lost, delete {to_delete} and run the same command again"
        ) from error


def existing_parent(path: Path) -> Path:
    """The nearest folder at or above `path` that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` so that readers see the old file or the new one, never a part of it."""
    atomic_write_chunks(path, (data,))


def atomic_write_chunks(path: Path, chunks: Iterable[bytes]) -> int:
    """`atomic_write_bytes` of content that comes in pieces, one in memory at a time; returns how many they were."""
    written = 0
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                for chunk in chunks:
                    stream.write(chunk)
                    written += 1
                stream.flush()
                os.fsync(stream.fileno())
            # mkstemp makes private files; a result is as readable as any other file of the user.
            Path(name).chmod(0o666 & ~_umask())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    return written


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    atomic_write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, whole or not at all."""
    atomic_write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_json(path: Path, to_delete: Path | str = "it") -> Any:
    """Read JSON; a missing file, or a damaged one and what to delete for it, is named by a `UserError`."""
    try:
        with reading_errors(path, to_delete):
            return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist: run the rule that makes it") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path}: is not valid JSON ({error}): delete {to_delete} and run the same command again"
        ) from None


def write_sealed_json(path: Path, value: Mapping[str, Any]) -> None:
    """`write_json`, with the digest of the content as one more key."""
    content = json.loads(json.dumps(value))
    write_json(path, {**content, SEAL: _seal(content)})


def read_sealed_json(path: Path) -> dict[str, Any]:
    """What `write_sealed_json` was given; content that is not what its digest says is a `UserError`."""
    content = read_json(path)
    if not isinstance(content, dict) or content.pop(SEAL, None) != _seal(content):
        raise UserError(
            f"{path}: is corrupt (its '{SEAL}' is not that of its content): delete it and run the same command again"
        )
    return content


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy of it where the disk does not allow that."""
    with disk_errors(target):
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)


@contextmanager
def staged_directory(final: Path) -> Iterator[Path]:
    """Yield a scratch sibling of `final` that takes its place, whole, when the block ends without an error.

    Leftovers of a run that was killed are removed first; on an error the scratch folder is removed. A second process
    that makes the same directory waits: a job may outlive the workflow that was killed and is started again.
    """
    staging = final.parent / f".{final.name}.staging"
    with disk_errors(final), _only_writer(staging):
        try:
            yield staging
            shutil.rmtree(final, ignore_errors=True)
            staging.rename(final)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


@contextmanager
def _only_writer(staging: Path) -> Iterator[None]:
    """Make the folder, empty, and hold a kernel lock on it: no lock file is left behind, be it by kill -9."""
    while True:
        staging.mkdir(parents=True, exist_ok=True)
        folder = os.open(staging, os.O_RDONLY)
        _wait_for_lock(folder, staging)
        with suppress(FileNotFoundError):
            if os.fstat(folder).st_ino == staging.stat().st_ino:
                break
        os.close(folder)  # The one before us moved it into place or removed it.
    try:
        for entry in staging.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        yield
    finally:
        os.close(folder)


def _wait_for_lock(folder: int, staging: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.warning("%s: another process is making it: waiting until it has ended", staging)
        fcntl.flock(folder, fcntl.LOCK_EX)
    except OSError:
        pass  # Some network file systems cannot lock a folder; Snakemake's own lock is what remains there.


def sha256_file(path: Path) -> str:
    """The sha256 of a file, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(directory: Path, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write `manifest.json` over every file below `directory`; `extra` is stored beside the list."""
    files = {
        str(path.relative_to(directory)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, ".snakemake_timestamp")
    }
    manifest = {**(extra or {}), "files": files}
    write_json(directory / MANIFEST, manifest)
    return manifest


def recorded_digests(folder: Path) -> dict[str, str]:
    """The sha256 of each file of a `folder` (a checkpoint) by the manifest of the directory that it stands in."""
    files = read_json(folder.parent / MANIFEST)["files"]
    return {name: file["sha256"] for name, file in files.items() if name.startswith(f"{folder.name}/")}


def verify_manifest(directory: Path, pattern: str = "*") -> dict[str, Any]:
    """Check the files of `directory` whose names match `pattern` against its manifest and return it.

    Raises `UserError` naming the first file that is missing, short or altered.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: is not a directory: run the rule that makes it")
    manifest: dict[str, Any] = read_json(directory / MANIFEST, to_delete=directory)
    remedy = f"delete {directory} and run the same command again"
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise UserError(f"{directory / MANIFEST}: lists no files: {remedy}")
    for name, expected in manifest["files"].items():
        if not fnmatch(name, pattern):
            continue
        path = directory / name
        if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
            raise UserError(f"{directory / MANIFEST}: says too little of {name}: {remedy}")
        with reading_errors(path, to_delete=directory):
            if not path.is_file():
                raise UserError(f"{path}: is missing: {remedy}")
            if path.stat().st_size != expected["bytes"]:
                raise UserError(f"{path}: has {path.stat().st_size} bytes, not {expected['bytes']}: {remedy}")
            if sha256_file(path) != expected["sha256"]:
                raise UserError(f"{path}: is corrupt (its sha256 differs from the manifest's): {remedy}")
    return manifest


def _seal(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
