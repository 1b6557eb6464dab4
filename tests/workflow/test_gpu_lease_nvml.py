"""What the GPU lease learns from NVML: the node's devices, which are occupied or lost, and why it can learn nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.workflow import REPOSITORY

FAKE_NVML = """
from types import SimpleNamespace as Process
class NVMLError(Exception): pass
class NVMLError_DriverNotLoaded(NVMLError): pass
class NVMLError_LibraryNotFound(NVMLError): pass
def nvmlInit(): {start}
def nvmlDeviceGetCount(): return 4
def nvmlDeviceGetHandleByIndex(index): return f"GPU-{{index}}"
def nvmlDeviceGetHandleByUUID(uuid): return uuid
def nvmlDeviceGetUUID(handle): return handle
def nvmlDeviceGetComputeRunningProcesses(handle):
    if handle == "GPU-0": return [Process(pid=77, usedGpuMemory=900 << 20)]
    if handle == "GPU-1": return [Process(pid=78, usedGpuMemory=None)]
    if handle == "GPU-2": raise NVMLError("GPU is lost")
    return [Process(pid=79, usedGpuMemory=1 << 20)]
"""
LEASE = REPOSITORY / "workflow_scripts/gpu_lease.py"


@pytest.fixture
def nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lease_module) -> Iterator[None]:
    """A pynvml of four devices: occupied, occupied by an unknown amount, lost, and as good as free."""
    monkeypatch.delenv("STILLHOUSE_FAKE_GPUS", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pynvml", raising=False)
    yield
    sys.modules.pop("pynvml", None)


@pytest.mark.fault("GPU that fell off the bus, before a job starts", "passed over; other devices are leased")
def test_a_job_is_given_a_device_that_is_neither_occupied_nor_lost(tmp_path: Path, nvml):
    (tmp_path / "pynvml.py").write_text(FAKE_NVML.format(start="pass"))
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {"PYTHONPATH": str(tmp_path), "STILLHOUSE_LOCK_DIR": str(tmp_path / "leases")}

    def lease(gpus: str) -> subprocess.CompletedProcess[str]:
        job = ["--timeout", "0", "--", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES"]
        return subprocess.run(
            [sys.executable, LEASE, gpus, *job], env=environment, capture_output=True, text=True, timeout=60
        )

    assert lease("1").stdout.strip() == "GPU-3"
    two = lease("2")
    assert two.returncode == 1 and "GPU-2 in use, without a lease" in two.stderr


def test_nvml_tells_the_devices_and_which_are_occupied_or_lost(tmp_path: Path, nvml, lease_module):
    (tmp_path / "pynvml.py").write_text(FAKE_NVML.format(start="pass"))
    node = lease_module.find_node()
    assert node.devices == ["GPU-0", "GPU-1", "GPU-2", "GPU-3"]
    busy = [device for device in node.devices if any(mib >= 64 for mib in node.occupants(device).values())]
    assert busy == ["GPU-0", "GPU-1", "GPU-2"]


def test_a_machine_whose_driver_is_not_loaded_has_no_gpu(tmp_path: Path, nvml, lease_module):
    (tmp_path / "pynvml.py").write_text(FAKE_NVML.format(start="raise NVMLError_DriverNotLoaded"))
    assert lease_module.find_node().devices == []


def test_any_other_failure_of_nvml_is_told(tmp_path: Path, nvml, lease_module):
    (tmp_path / "pynvml.py").write_text(FAKE_NVML.format(start='raise NVMLError("version mismatch")'))
    with pytest.raises(lease_module.LeaseError, match="version mismatch"):
        lease_module.find_node()
