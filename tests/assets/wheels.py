"""Tiny wheels in a local folder that stands in for the package index."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

from stillhouse.config.assets import Package
from stillhouse.runtime.files import sha256_file


def make_wheel(folder: Path, name: str, files: dict[str, bytes], file: str | None = None) -> Package:
    """Write `<name>-1.0` with `files` to `folder`; returns the catalogue's description of it, naming `file`."""
    folder.mkdir(parents=True, exist_ok=True)
    information = f"{name}-1.0.dist-info"
    members = {
        **files,
        f"{information}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
        f"{information}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},sha256={_record_hash(data)},{len(data)}\n" for path, data in members.items())
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in {**members, f"{information}/RECORD": record.encode()}.items():
            archive.writestr(path, data)
    return Package(name=name, version="1.0", sha256=sha256_file(wheel), bytes=wheel.stat().st_size, file=file)


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
