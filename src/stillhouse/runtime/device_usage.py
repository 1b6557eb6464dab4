"""How a run uses its GPUs over time: utilisation, memory, temperature, power and energy, as NVML gives them.

`RunRecord` samples while a run lasts; the record gets a summary and a curve of each device, the trackers get the newest
sample. Where there is no NVIDIA GPU the record says so. Watching never fails a run: whatever NVML refuses is left out.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

SECONDS_BETWEEN_SAMPLES = 5.0
# A long run's curve is thinned to at most so many points, evenly in time.
CURVE_POINTS = 512
UNITS = ("utilisation_percent", "memory_mib", "temperature_celsius", "power_watts")


@dataclass
class DeviceCurve:
    """One GPU: its samples, `seconds` since the start beside a value of each unit that the device reports."""

    uuid: str
    name: str
    samples: list[dict[str, float]] = field(default_factory=list)
    energy_joules: float | None = None

    def summary(self) -> dict[str, Any]:
        """Means, peaks and the curve, as JSON."""
        facts: dict[str, Any] = {"uuid": self.uuid, "name": self.name, "energy_joules": self.energy_joules}
        for unit in UNITS:
            if values := [sample[unit] for sample in self.samples if unit in sample]:
                facts[f"mean_{unit}"] = round(sum(values) / len(values), 1)
                facts[f"peak_{unit}"] = max(values)
        return {**facts, "curve": self.samples}


class DeviceMonitor:
    """Samples the GPUs that this process may use, on a thread of its own, between `start` and `stop`."""

    def __init__(self, seconds_between_samples: float = SECONDS_BETWEEN_SAMPLES) -> None:
        self.absent: str | None = None
        self.curves: list[DeviceCurve] = []
        self._interval = seconds_between_samples
        self._handles: list[Any] = []
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to sample; without NVML or a GPU only the reason is noted."""
        try:
            import pynvml
        except ImportError:
            self.absent = "nvidia-ml-py is not installed"
            return
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            self._handles = [_handle(pynvml, entry) for entry in _visible(pynvml)]
            self.curves = [
                DeviceCurve(pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle))
                for handle in self._handles
            ]
        except (pynvml.NVMLError, ValueError) as error:
            self._handles, self.curves = [], []
            self.absent = f"no NVIDIA GPU that NVML can watch ({error})"
            return
        if not self._handles:
            self.absent = "no GPU was given to the run"
            return
        self._started = time.monotonic()
        self._energy_before = [self._energy(handle) for handle in self._handles]
        self._thread = threading.Thread(target=self._watch, name="device-monitor", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End sampling, and take the energy used since the start."""
        if self._thread is None:
            return
        self._end.set()
        self._thread.join(timeout=10)
        self._thread = None
        self._sample()
        for curve, handle, before in zip(self.curves, self._handles, self._energy_before, strict=True):
            after = self._energy(handle)
            if before is not None and after is not None:
                curve.energy_joules = round(after - before, 1)

    def newest(self) -> dict[str, float]:
        """The last sample of every device, keyed for trackers: `gpu0/memory_mib`."""
        return {
            f"gpu{index}/{unit}": value
            for index, curve in enumerate(self.curves)
            for unit, value in (curve.samples[-1].items() if curve.samples else ())
            if unit in UNITS
        }

    def summary(self) -> dict[str, Any]:
        """What the run record holds: the devices, or why there are none."""
        if self.absent:
            return {"devices": [], "absent": self.absent}
        return {"devices": [curve.summary() for curve in self.curves]}

    def _watch(self) -> None:
        while True:
            self._sample()
            if self._end.wait(self._interval):
                return

    def _sample(self) -> None:
        nvml = self._nvml
        seconds = round(time.monotonic() - self._started, 1)
        for curve, handle in zip(self.curves, self._handles, strict=True):
            reading = {
                "utilisation_percent": partial(self._utilisation, handle),
                "memory_mib": partial(self._memory, handle),
                "temperature_celsius": partial(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
                "power_watts": partial(self._power, handle),
            }
            values = {unit: self._read(read) for unit, read in reading.items()}
            curve.samples.append({"seconds": seconds, **{u: v for u, v in values.items() if v is not None}})
        if len(self.curves[0].samples) > CURVE_POINTS:
            # Every second point goes, and from now on half as many are taken.
            for curve in self.curves:
                del curve.samples[1::2]
            self._interval *= 2

    def _utilisation(self, handle: Any) -> float:
        return float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu)

    def _memory(self, handle: Any) -> float:
        return round(self._nvml.nvmlDeviceGetMemoryInfo(handle).used / 2**20, 1)

    def _power(self, handle: Any) -> float:
        return float(self._nvml.nvmlDeviceGetPowerUsage(handle)) / 1000

    def _energy(self, handle: Any) -> float | None:
        """Joules that the device has used since its driver was loaded."""
        return self._read(lambda: float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000)

    def _read(self, reading: Callable[[], float]) -> float | None:
        """One value, None where the device does not report it (a MIG slice, an old driver, a lost device)."""
        try:
            return reading()
        except self._nvml.NVMLError:
            return None


def _visible(nvml: Any) -> list[str]:
    """The devices given to this process, as `CUDA_VISIBLE_DEVICES` names them; all of the node where it is not set."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [str(index) for index in range(nvml.nvmlDeviceGetCount())]
    return [entry for entry in map(str.strip, given.split(",")) if entry not in {"", "-1", "NoDevFiles"}]


def _handle(nvml: Any, entry: str) -> Any:
    """NVML's handle of a device by number or UUID."""
    return nvml.nvmlDeviceGetHandleByIndex(int(entry)) if entry.isdigit() else nvml.nvmlDeviceGetHandleByUUID(entry)
