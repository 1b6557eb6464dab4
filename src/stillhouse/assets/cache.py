"""The download cache: finished downloads, shared by all checkouts of a user, each under the key that pins it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree

from filelock import FileLock, Timeout

from stillhouse.runtime.files import disk_errors
from stillhouse.runtime.logs import logger


def cache_directory() -> Path:
    """`$STILLHOUSE_CACHE`, else `$XDG_CACHE_HOME/stillhouse`, else `~/.cache/stillhouse`."""
    if own := os.environ.get("STILLHOUSE_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "stillhouse"


def cached(key: str, download: Callable[[Path], Path], is_whole: Callable[[Path], bool]) -> Path:
    """The cached file of `key`; `download` makes it inside a scratch folder where it is absent or damaged.

    A file enters the cache by a rename, so that a killed download leaves nothing that looks finished. Two processes
    never download the same key at once: the second waits, then finds the file.
    """
    final = cache_directory() / key
    with disk_errors(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        with _waiting_lock(final):
            for file in final.iterdir() if final.is_dir() else ():
                if is_whole(file):
                    return file
                logger.warning("%s is damaged: downloading it again", file)
            scratch = final.with_name(f".{final.name}.part")
            rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            try:
                file = download(scratch)
                rmtree(final, ignore_errors=True)
                holder = scratch / "finished"
                holder.mkdir()
                file.rename(holder / file.name)
                holder.rename(final)
            finally:
                rmtree(scratch, ignore_errors=True)
            return final / file.name


def _waiting_lock(final: Path) -> FileLock:
    """A lock on one key, told in the log when another process holds it."""
    lock = FileLock(final.with_name(f".{final.name}.lock"))
    try:
        lock.acquire(timeout=0)
        lock.release()
    except Timeout:
        logger.info("another process is downloading %s: waiting for it", final.name)
    return lock
