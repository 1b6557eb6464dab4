"""A real Slurm of one node on this machine, up and down: `python tests/slurm/one_node.py up|down [DIRECTORY]`.

Real daemons, real queue, simulated GPUs: the node offers four GRES devices whose device files are `/dev/null` under
other names, so that jobs get disjoint `CUDA_VISIBLE_DEVICES` and wait where there are too few. With books it has an
accounting database too, and takes no job without an account. Needs root and Debian's packages (`PACKAGES`). The
configuration goes to `/etc/slurm`, where jobs look for it too (the executor plugin takes `SLURM_CONF` out of their
environment); a configuration that this program did not write is never touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "munged")
PACKAGES_OF_BOOKS = ("slurmdbd", "mariadb-server-core")
PROGRAMS_OF_BOOKS = ("slurmdbd", "mariadbd", "mariadb-install-db")
CONFIGURATION = Path("/etc/slurm")
MARK = "# Written by tests/slurm/one_node.py of Stillhouse; `one_node.py down` removes it.\n"
DEFAULT_DIRECTORY = Path(tempfile.gettempdir()) / "stillhouse-slurm"
GPUS = 4
NODE = "localhost"
ACCOUNT = "lab"
# One node in three partitions, as on a cluster with a queue for GPU jobs and one whose jobs take their place.
SLURM_CONF = """\
ClusterName=stillhouse
SlurmctldHost={node}
SlurmUser=root
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=200000,bf_interval=1
{accounting}
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
KillWait=5
MinJobAge=3600
ReturnToService=2
SlurmdParameters=config_overrides
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
GresTypes=gpu
NodeName={node} NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=cpu Nodes={node} Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes={node} MaxTime=INFINITE State=UP
PartitionName=urgent Nodes={node} MaxTime=INFINITE State=UP PriorityTier=2
"""
WITHOUT_BOOKS = "AccountingStorageType=accounting_storage/none"
WITH_BOOKS = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={node}
AccountingStorageEnforce=associations
AccountingStorageTRES=gres/gpu"""
SLURMDBD_CONF = """\
AuthType=auth/munge
DbdHost={node}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageUser=root
PidFile={directory}/slurmdbd.pid
LogFile={directory}/slurmdbd.log
"""
GRES_CONF = "NodeName={node} Name=gpu File={directory}/devices/gpu[0-{last}]\n"
# Without this file slurmd looks for cgroups, which containers do not offer.
CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"


class SlurmUnavailableError(Exception):
    """Slurm cannot run here; the message says why and what would change that."""


def ensure_installed(programs: Sequence[str] = PROGRAMS, packages: Sequence[str] = PACKAGES) -> None:
    """Check for root and the programs; where `CI` is set the packages are installed, elsewhere they are named."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise SlurmUnavailableError("a one-node Slurm needs root on Linux")
    if missing := [program for program in programs if not find(program)]:
        install = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
        if not os.environ.get("CI") or not shutil.which("apt-get"):
            raise SlurmUnavailableError(f"{', '.join(missing)} not installed: {' '.join(install)}")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update"], install):
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SlurmUnavailableError(f"{' '.join(install)} failed: {done.stderr.strip()[-300:]}")
    conf = CONFIGURATION / "slurm.conf"
    if conf.exists() and not conf.read_text().startswith(MARK):
        raise SlurmUnavailableError(f"{conf} belongs to another Slurm; it is left alone")


def find(program: str) -> str | None:
    """Where a program is; daemons may lie outside a user's PATH."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def up(directory: Path = DEFAULT_DIRECTORY, books: bool = False) -> None:
    """Start munge (unless it runs), the controller and the node, and wait until the node is idle."""
    ensure_installed()
    if books:
        ensure_installed(PROGRAMS_OF_BOOKS, PACKAGES_OF_BOOKS)
    down(running_directory() or directory)
    for name in ("state", "spool", "devices"):
        (directory / name).mkdir(parents=True)
    for number in range(GPUS):
        os.mknod(directory / f"devices/gpu{number}", 0o20666, Path("/dev/null").stat().st_rdev)
    accounting = WITH_BOOKS.format(node=NODE) if books else WITHOUT_BOOKS
    values = {"node": NODE, "directory": directory, "gpus": GPUS, "last": GPUS - 1, "accounting": accounting}
    for name, text in (("slurm", SLURM_CONF), ("gres", GRES_CONF), ("cgroup", CGROUP_CONF)):
        (CONFIGURATION / f"{name}.conf").write_text(MARK + text.format(**values))
    if not answers("munge", "-n"):
        start_munge(directory)
    if books:
        start_books(directory)
    run(find("slurmctld") or "slurmctld")
    run(find("slurmd") or "slurmd", "-N", NODE)
    wait_for(lambda: node_state() == "idle", "the node to be idle", directory / "slurmctld.log")


def running_directory() -> Path | None:
    """Where the Slurm that an earlier `up` left behind keeps its files; None where there is none."""
    conf = CONFIGURATION / "slurm.conf"
    found = (
        re.search(r"^SlurmctldPidFile=(.+)/slurmctld\.pid$", conf.read_text(), re.MULTILINE) if conf.exists() else None
    )
    return Path(found[1]) if found else None


def start_munge(directory: Path) -> None:
    """Start the authentication daemon as its own user, which its packages made."""
    for folder in ("/run/munge", "/var/lib/munge", "/var/log/munge"):
        Path(folder).mkdir(mode=0o755, exist_ok=True)
        shutil.chown(folder, "munge", "munge")
    run("runuser", "-u", "munge", "--", find("munged") or "munged")
    wait_for(lambda: answers("munge", "-n"), "munge to answer", Path("/var/log/munge/munged.log"))
    (directory / "munged.pid").write_text(Path("/run/munge/munged.pid").read_text())


def start_books(directory: Path) -> None:
    """Start the accounting database of a cluster whose root user may charge one account."""
    files, socket = directory / "books", directory / "books.sock"
    run("mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={files}", "--skip-test-db")
    options = ("--no-defaults", "--user=root", "--skip-networking", "--skip-grant-tables")
    paths = (f"--datadir={files}", f"--socket={socket}", f"--pid-file={directory}/mariadbd.pid")
    log = directory / "mariadbd.log"
    with log.open("w") as stream:
        database = [find("mariadbd") or "mariadbd", *options, *paths]
        subprocess.Popen(database, stdout=stream, stderr=stream, start_new_session=True)
    wait_for(socket.exists, "the accounting database", log)
    conf = CONFIGURATION / "slurmdbd.conf"
    conf.write_text(MARK + SLURMDBD_CONF.format(node=NODE, directory=directory))
    conf.chmod(0o600)
    run("env", f"MYSQL_UNIX_PORT={socket}", find("slurmdbd") or "slurmdbd")
    wait_for(lambda: answers("sacctmgr", "list", "cluster"), "the books", directory / "slurmdbd.log")
    run("sacctmgr", "--immediate", "add", "cluster", "stillhouse")
    run("sacctmgr", "--immediate", "add", "account", ACCOUNT)
    run("sacctmgr", "--immediate", "add", "user", "root", f"Account={ACCOUNT}")


def down(directory: Path | None = None) -> None:
    """Cancel what runs, stop the daemons that `up` started and remove what it wrote."""
    directory = directory or running_directory() or DEFAULT_DIRECTORY
    if (directory / "slurmctld.pid").exists() and answers("squeue", "--noheader"):
        subprocess.run(["scancel", "--full", "--signal=KILL", "--state=RUNNING", "--user=root"], capture_output=True)
        subprocess.run(["scancel", "--user=root"], capture_output=True)
        wait_for(lambda: not queue(), "jobs to end", directory / "slurmctld.log")
    for name in ("slurmd", "slurmctld", "slurmdbd", "mariadbd", "munged"):
        stop(name, directory / f"{name}.pid")
    for process in of_jobs():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    for name in ("slurm", "gres", "cgroup", "slurmdbd"):
        conf = CONFIGURATION / f"{name}.conf"
        if conf.exists() and conf.read_text().startswith(MARK):
            conf.unlink()
    shutil.rmtree(directory, ignore_errors=True)


def stop(name: str, pid_file: Path) -> None:
    """End the daemon of a pid file, if the process of that number is still that daemon."""
    try:
        pid = int(pid_file.read_text())
        if Path(f"/proc/{pid}/comm").read_text().strip() != name:
            return
        os.kill(pid, signal.SIGTERM)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return
    wait_for(lambda: not alive(pid), f"{name} to end", pid_file)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def node_state() -> str:
    """The node's state in one word: idle, mixed, drained, draining, down."""
    return run("sinfo", "--noheader", "--partition=gpu", "--format=%T")


def queue(states: str = "pending,configuring,running,completing", format: str = "%i") -> list[str]:
    """One line per job in one of the states."""
    return run("squeue", "--noheader", f"--states={states}", f"--format={format}").splitlines()


def runs_here(job: str) -> bool:
    """Whether anything of a job is still on the node, be it a job that Slurm has put back into its queue."""
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if command.read_bytes().startswith(f"slurmstepd: [{job}.".encode()):
                return True
    return False


def of_jobs() -> Iterator[int]:
    """Processes that jobs have left; without control groups Slurm loses those whose parent has ended."""
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"SLURMD_NODENAME={NODE}\0".encode() in environment.read_bytes():
                yield int(environment.parent.name)


def run(*command: str) -> str:
    """Run a command; its output, or an error with what it said."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SlurmUnavailableError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout.strip()


def answers(*command: str) -> bool:
    """Whether a command ends well."""
    return subprocess.run(command, capture_output=True).returncode == 0


def wait_for(condition: Callable[[], bool], what: str, log: Path, seconds: float = 30) -> None:
    """Wait until the condition holds; after `seconds` the log's end says why it does not."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            end = log.read_text(errors="replace")[-1500:] if log.exists() else "no log"
            raise SlurmUnavailableError(f"waited {seconds:g} s for {what}: {end}")
        time.sleep(0.1)


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {"up": up, "down": down}
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in commands:
        raise SystemExit(__doc__)
    try:
        commands[sys.argv[1]](*(Path(argument).absolute() for argument in sys.argv[2:]))
    except SlurmUnavailableError as error:
        raise SystemExit(f"error: {error}") from None
