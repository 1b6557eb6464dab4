"""GPUs are watched while a run lasts: what NVML says is recorded, what it refuses is left out, no run fails of it."""

# ruff: noqa: N802 (NVML's own names)

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

from stillhouse.runtime import device_usage
from stillhouse.runtime.device_usage import DeviceMonitor
from stillhouse.runtime.files import read_json
from stillhouse.runtime.records import RunRecord


class NvmlError(Exception):
    """What NVML raises."""


class NoSettings(BaseModel):
    """The settings of a step that has none."""


class FakeNvml:
    """Two GPUs of 250 W, of which the second counts no energy and hides its temperature."""

    NVMLError = NvmlError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self) -> None:
        self.energy = 1000.0

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid not in {"GPU-0", "GPU-1"}:
            raise NvmlError("not found")
        return int(uuid[-1])

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetName(self, handle: int) -> str:
        return "NVIDIA H200"

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(gpu=50 + handle)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(used=2**30 * (handle + 1))

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        if handle == 1:
            raise NvmlError("not supported")
        return 60

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 250_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> float:
        if handle == 1:
            raise NvmlError("not supported")
        self.energy += 500_000
        return self.energy


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)  # type: ignore[arg-type]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def watched(seconds: float = 0.05) -> DeviceMonitor:
    """A monitor that has watched for a moment."""
    monitor = DeviceMonitor(seconds_between_samples=0.005)
    monitor.start()
    time.sleep(seconds)
    monitor.stop()
    return monitor


def test_each_device_has_its_peaks_its_energy_and_a_curve_over_time(nvml: FakeNvml) -> None:
    first, second = watched().summary()["devices"]
    assert (first["uuid"], first["name"], first["energy_joules"]) == ("GPU-0", "NVIDIA H200", 500.0)
    assert (first["mean_utilisation_percent"], first["peak_memory_mib"]) == (50.0, 1024.0)
    assert (first["peak_temperature_celsius"], first["peak_power_watts"]) == (60, 250.0)
    assert len(first["curve"]) > 1
    assert [sample["seconds"] for sample in first["curve"]] == sorted(sample["seconds"] for sample in first["curve"])
    assert second["energy_joules"] is None
    assert "peak_temperature_celsius" not in second
    assert second["peak_memory_mib"] == 2048.0


@pytest.mark.parametrize(("visible", "watches"), [("1", ["GPU-1"]), ("GPU-0", ["GPU-0"]), ("", []), ("-1", [])])
def test_only_the_devices_of_the_job_are_watched(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str, watches: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [device["uuid"] for device in watched(0).summary()["devices"]] == watches


def test_a_long_run_keeps_a_curve_of_bounded_length(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_usage, "CURVE_POINTS", 4)
    curve = watched(0.3).summary()["devices"][0]["curve"]
    assert 2 < len(curve) <= 5


def test_trackers_get_the_newest_sample_of_every_device(nvml: FakeNvml) -> None:
    newest = watched().newest()
    assert newest["gpu0/utilisation_percent"] == 50
    assert newest["gpu1/memory_mib"] == 2048.0
    assert "gpu1/temperature_celsius" not in newest
    assert not any(name.endswith("seconds") for name in newest)


def test_a_device_that_nvml_does_not_know_is_named_and_fails_nothing(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-7")
    assert watched(0).summary() == {"devices": [], "absent": "no NVIDIA GPU that NVML can watch (not found)"}


def test_a_machine_without_nvml_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monitor = watched(0)
    assert monitor.summary() == {"devices": [], "absent": "nvidia-ml-py is not installed"}
    assert monitor.newest() == {}


def test_the_run_record_holds_devices_and_the_slurm_job(
    nvml: FakeNvml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SLURM_JOB_ID": "17", "SLURMD_NODENAME": "node3", "CUDA_VISIBLE_DEVICES": "0"}.items():
        monkeypatch.setenv(name, value)
    record: dict[str, Any] = written(tmp_path)
    assert record["device_usage"]["devices"][0]["energy_joules"] == 500.0
    assert record["visible_devices"] == "0"
    assert (record["scheduler"]["slurm_job_id"], record["scheduler"]["node"]) == ("17", "node3")


def test_the_run_record_of_a_machine_without_a_gpu_says_why_there_is_no_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    record = written(tmp_path)
    assert record["device_usage"] == {"devices": [], "absent": "nvidia-ml-py is not installed"}
    assert record["scheduler"] is None


def written(directory: Path) -> dict[str, Any]:
    """The record of a run that does nothing."""
    with RunRecord("stillhouse.data.split", NoSettings(), {}) as record:
        record.write(directory / "run.json")
    return read_json(directory / "run.json")


@pytest.mark.gpu
def test_a_real_gpu_is_watched() -> None:
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as reason:
        pytest.skip(f"no GPU: {reason}")
    device = watched().summary()["devices"][0]
    assert device["peak_memory_mib"] > 0
    assert 0 < device["peak_temperature_celsius"] < 120
