"""Lease N whole GPUs of this node to one job: `python gpu_lease.py N [options] -- COMMAND ...`.

Snakemake counts GPUs but does not hand them out. The lease takes a kernel lock (flock) per device, keyed by
UUID, in a directory that all users of the node share, all N or none; names the devices in
`CUDA_VISIBLE_DEVICES`; and becomes COMMAND by exec. The job inherits the locks, so the lease ends exactly
when the job has ended, and those of its children that kept the descriptors, be it by kill -9. A compute
process that NVML still sees on a device whose lock was free is therefore someone else's, and the device is
passed over.

- No GPU on the node, or all hidden (`CUDA_VISIBLE_DEVICES=`): COMMAND runs on the CPU, as it is.
- `CUDA_VISIBLE_DEVICES` names exactly N devices: a scheduler chose them; they are left alone and not locked.
- It names more: they are the pool to lease from (numbers count in PCI bus order, as in nvidia-smi).
- Fewer than N devices: refused with both numbers; with `--at-most` the job takes all there are.

`STILLHOUSE_LOCK_DIR` replaces the lock directory. In tests and dry trials `STILLHOUSE_FAKE_GPUS=GPU-a,GPU-b`
are the devices of the node (empty: none); `STILLHOUSE_FAKE_OCCUPIED=GPU-a=4000` puts a foreign process of
4000 MiB on one.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import random
import shlex
import socket
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Not $TMPDIR: Snakemake and schedulers set it per job, and then jobs would not see each other's locks.
SHARED_LOCK_DIRECTORY = "/dev/shm/stillhouse-gpu-leases"
REMEDY = "set STILLHOUSE_LOCK_DIR to a node-local directory (mode 1777) that all users of this node share"
# Shells use low descriptors for themselves (`exec 3>log`) and would close a lock that lies there.
LOWEST_LOCK_DESCRIPTOR = 100
REPORT_SECONDS, FIRST_POLL_SECONDS, LAST_POLL_SECONDS = 60.0, 0.05, 1.0
UNKNOWN_MIB = sys.maxsize


class LeaseError(Exception):
    """The lease cannot be given; the message is one line that says why and what to do."""


@dataclass(frozen=True)
class Node:
    """A machine's GPUs by UUID, in PCI bus order, and `{pid: MiB}` of the compute processes on one."""

    devices: list[str]
    occupants: Callable[[str], dict[int, int]]


def entries(variable: str) -> list[str] | None:
    """Return the entries of a comma-separated environment variable, None where it is not set."""
    value = os.environ.get(variable)
    return None if value is None else list(dict.fromkeys(filter(None, map(str.strip, value.split(",")))))


def find_node() -> Node:
    """Ask NVML (or the fake variables) for the devices; a machine without the NVIDIA driver has none."""
    fake = entries("STILLHOUSE_FAKE_GPUS")
    if fake is not None:
        occupied = dict(entry.split("=") for entry in entries("STILLHOUSE_FAKE_OCCUPIED") or [])
        return Node(fake, lambda device: {1: int(occupied[device])} if device in occupied else {})
    try:
        import pynvml as nvml
    except ImportError:
        if Path("/dev/nvidiactl").exists():
            raise LeaseError("this node has GPUs, but pynvml is missing: pip install nvidia-ml-py") from None
        return Node([], lambda _: {})

    def occupants(device: str) -> dict[int, int]:
        try:
            processes = nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByUUID(device))
        except nvml.NVMLError:
            return {0: UNKNOWN_MIB}  # A device that fell off the bus is of no use to anyone: taken.
        memory = {process.pid: process.usedGpuMemory for process in processes}
        return {pid: UNKNOWN_MIB if used is None else used >> 20 for pid, used in memory.items()}

    try:
        nvml.nvmlInit()
        handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        return Node([nvml.nvmlDeviceGetUUID(handle) for handle in handles], occupants)
    except (nvml.NVMLError_DriverNotLoaded, nvml.NVMLError_LibraryNotFound):
        return Node([], occupants)
    except nvml.NVMLError as error:
        raise LeaseError(f"NVML cannot list the GPUs of this node ({error}): does nvidia-smi work?") from None


def pool_of(given: list[str] | None, devices: list[str]) -> list[str]:
    """Translate what CUDA_VISIBLE_DEVICES gives (numbers, beginnings of UUIDs) into UUIDs; None: all."""
    pool = list(devices) if given is None else []
    for entry in given or []:
        by_name = [entry] if entry in devices else [device for device in devices if device.startswith(entry)]
        named = devices[int(entry) :][:1] if entry.isdigit() else by_name
        if len(named) != 1:
            raise LeaseError(f"CUDA_VISIBLE_DEVICES names {entry!r}, the node has {', '.join(devices)}")
        pool += named
    return pool


def open_lock_directory() -> int:
    """Open the lock directory, made sticky and writable for all if missing, never through a symbolic link."""
    path = os.environ.get("STILLHOUSE_LOCK_DIR") or SHARED_LOCK_DIRECTORY
    try:
        with contextlib.suppress(FileExistsError):
            Path(path).mkdir(0o1777)
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise LeaseError(f"lock directory {path}: {error.strerror}; {REMEDY}") from None


def lock(directory: int, device: str) -> int | str:
    """Return the descriptor that holds the device's lock, or the pid of its holder as text."""
    name, flags = f"{device}.lock", os.O_RDWR | os.O_NOFOLLOW
    try:
        # Two steps: in a sticky directory Linux refuses O_CREAT on an existing file of another user.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=directory))
        descriptor = os.open(name, flags, dir_fd=directory)
    except OSError as error:
        raise LeaseError(f"lock file {name}: {error.strerror}; {REMEDY}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise LeaseError(f"lock file {name} is not a plain file of its own: remove it, or {REMEDY}")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink == 0:
            raise BlockingIOError  # Removed since it was opened: it locks nothing that others can see.
    except BlockingIOError:
        holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip()
        os.close(descriptor)
        return holder or "unknown"
    with contextlib.suppress(OSError):  # A full disk spoils only the message to those who wait.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def try_lease(pool: list[str], count: int, node: Node, foreign_mib: int) -> tuple[list[str], list[str]]:
    """Lease `count` devices of the pool or none: return the devices, and the obstacles met."""
    directory, held, obstacles = open_lock_directory(), dict[str, int](), list[str]()
    for device in pool:
        if len(held) == count or len(pool) - len(obstacles) < count:
            break
        taken = lock(directory, device)
        if isinstance(taken, str):
            obstacles.append(f"{device} held by pid {taken}")
        elif foreign := [pid for pid, mib in node.occupants(device).items() if mib >= foreign_mib]:
            os.close(taken)
            obstacles.append(f"{device} in use, without a lease, by pid {' '.join(map(str, foreign))}")
        else:
            held[device] = taken
    success = len(held) == count
    if success:
        # A shared lock on the directory itself tells cleaners of old files (systemd-tmpfiles) to pass it by.
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(directory, fcntl.LOCK_SH | fcntl.LOCK_NB)
    for descriptor in [*held.values(), directory]:
        if success:
            fcntl.fcntl(descriptor, fcntl.F_DUPFD, LOWEST_LOCK_DESCRIPTOR)  # Inheritable.
        os.close(descriptor)
    return list(held) if success else [], obstacles


def wait_for_lease(pool: list[str], count: int, node: Node, foreign_mib: int, timeout: float) -> list[str]:
    """Poll, with jitter to part rivals, until `count` devices are leased; say who holds them."""
    start = next_report = time.monotonic()
    poll_seconds = FIRST_POLL_SECONDS
    while True:
        devices, obstacles = try_lease(pool, count, node, foreign_mib)
        if devices:
            say(f"leased {', '.join(devices)}")
            return devices
        now, waiting = time.monotonic(), f"waiting for {gpus(count)}: {'; '.join(obstacles)}"
        if now >= start + timeout:
            raise LeaseError(f"gave up after {timeout:g} s {waiting}")
        if now >= next_report:
            say(waiting)
            next_report = now + REPORT_SECONDS
        time.sleep(min(random.uniform(0.5, 1.5) * poll_seconds, start + timeout - now))
        poll_seconds = min(1.5 * poll_seconds, LAST_POLL_SECONDS)


def grant(options: argparse.Namespace) -> int:
    """Obtain the devices and name them in the environment; return how many the job has (0: CPU)."""
    if options.count == 0:  # A job without a lease must not touch what others have leased.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return 0
    node, given = find_node(), entries("CUDA_VISIBLE_DEVICES")
    if not node.devices or given in ([], ["-1"], ["NoDevFiles"]):
        return 0
    available = len(node.devices if given is None else given)
    count: int = min(options.count, available) if options.at_most else options.count
    if available < count:
        remedy = "lower the rule's gpu resource or use a larger node"
        raise LeaseError(f"the job needs {gpus(count)}, but this node offers it {gpus(available)}: {remedy}")
    if given is None or available > count:
        pool = pool_of(given, node.devices)
        devices = wait_for_lease(pool, count, node, options.foreign_mib, options.timeout)
        os.environ |= {"CUDA_VISIBLE_DEVICES": ",".join(devices), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return count


def reserve_port() -> int:
    """Return a free port that nobody else gets while this process lives.

    A socket that is bound and never listens keeps it, through exec too; the launcher, which like this socket asks for
    SO_REUSEADDR, may still listen there. A port that was only looked for might go to a second job before it is used.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", 0))
    port: int = holder.getsockname()[1]
    os.set_inheritable(holder.detach(), True)
    return port


def distributed(command: list[str], processes: int) -> list[str]:
    """Turn `python -m module ...` into `accelerate launch` of as many processes, meeting at a port of its own.

    Every choice is spelled out, so that an `accelerate config` in the user's home cannot change a result.
    """
    if len(command) < 3 or command[1] != "-m":
        raise LeaseError(f"--distributed needs a `python -m module ...`, not `{shlex.join(command)}`")
    port = reserve_port()
    options = (
        f"--multi_gpu --num_processes {processes} --gpu_ids all --num_machines 1 --machine_rank 0 "
        f"--mixed_precision no --dynamo_backend no --main_process_port {port}"
    )
    return [command[0], "-m", "accelerate.commands.accelerate_cli", "launch", *options.split(), *command[1:]]


def gpus(count: int) -> str:
    """Return "1 GPU", "2 GPUs"."""
    return f"{count} GPU{'s' * (count != 1)}"


def say(message: str) -> None:
    """Write one line to stderr: stdout belongs to the job."""
    print(f"gpu_lease: {message}", file=sys.stderr, flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read `N [options] -- COMMAND ...`."""
    parser = argparse.ArgumentParser(prog="gpu_lease.py", usage="%(prog)s N [options] -- COMMAND ...")
    add = parser.add_argument
    add("count", metavar="N", type=int, help="number of GPUs; 0 hides all of them from COMMAND")
    add("--at-most", action="store_true", help="take all of a smaller node; the result is the same")
    add("--distributed", action="store_true", help="with several GPUs, start by accelerate launch")
    add("--timeout", metavar="SECONDS", type=float, default=float("inf"), help="give up (default: never)")
    foreign = "pass over a GPU where a process without lease holds so much (default: %(default)s)"
    add("--foreign-mib", metavar="MIB", type=int, default=64, help=foreign)
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    options.command = arguments[split + 1 :]
    if options.count < 0 or not options.command:
        parser.error("N must be 0 or more, and the command follows --")
    return options


def main(arguments: list[str]) -> int:
    """Lease, then become the command; return 1 after a one-line message where that is impossible."""
    options = parse(arguments)
    umask = os.umask(0)  # Lock files get exactly their mode: one user's umask must not shut out another.
    try:
        count = grant(options)
        spread = options.distributed and count > 1
        command = distributed(options.command, count) if spread else options.command
        os.umask(umask)
        os.execvp(command[0], command)
    except LeaseError as error:
        say(str(error))
    except OSError as error:
        say(f"cannot run {options.command[0]}: {error.strerror}")
    except KeyboardInterrupt:
        say("interrupted while waiting")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
