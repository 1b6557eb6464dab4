"""The GPU lease on fake devices: disjoint, all or none, as long-lived as its job, clear where it refuses."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.workflow import REPOSITORY

PROGRAM = REPOSITORY / "workflow_scripts/gpu_lease.py"
SHOW = ["sh", "-c", 'echo "${CUDA_VISIBLE_DEVICES-unset}"']
HIDDEN = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "SLURM_JOB_ID", "STILLHOUSE_LOCK_DIR")


@dataclass(frozen=True)
class FakeMachine:
    """A node whose GPUs exist by name only, with lock directory and job scratch under `directory`."""

    directory: Path

    def start(self, *arguments: str, gpus: str = "GPU-a,GPU-b,GPU-c,GPU-d", umask: int = -1, **variables: str):
        """Start the lease program with `arguments`; `variables` are added to the environment."""
        environment = {name: value for name, value in os.environ.items() if name not in HIDDEN}
        environment |= {"STILLHOUSE_FAKE_GPUS": gpus, "STILLHOUSE_LOCK_DIR": str(self.directory / "leases")}
        return subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments],
            env=environment | variables,
            cwd=self.directory,
            umask=umask,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **options: str) -> tuple[int, str, str]:
        """Run the lease program to its end: status, stdout, stderr."""
        process = self.start(*arguments, **options)
        out, error = process.communicate(timeout=30)
        return process.returncode, out.strip(), error.strip()

    def hold(self, *arguments: str, **options: str) -> subprocess.Popen[str]:
        """Start a job and return once it has its lease."""
        process = self.start(*arguments, **options)
        assert process.stderr is not None
        assert "leased" in process.stderr.readline()
        return process

    def is_free(self, **options: str) -> bool:
        """Whether a one-GPU node could give its GPU to a job right now."""
        return self.run("1", "--timeout", "0", "--", "true", gpus="GPU-a", **options)[0] == 0

    def becomes_free(self) -> bool:
        """Whether it is free within two seconds: a killed process needs a moment to be gone."""
        deadline = time.monotonic() + 2
        while not (free := self.is_free()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return free


@pytest.fixture
def machine(tmp_path: Path) -> FakeMachine:
    return FakeMachine(tmp_path)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_twenty_concurrent_jobs_of_mixed_sizes_are_always_disjoint_and_all_finish(machine):
    # Each device is a directory while in use: mkdir fails if two jobs ever share one.
    job = 'for d in $(echo "$CUDA_VISIBLE_DEVICES" | tr , " "); do mkdir "busy-$d" || exit 3; done; '
    job += 'sleep 0.05; rmdir $(echo "busy-$CUDA_VISIBLE_DEVICES" | sed "s/,/ busy-/g"); '
    job += 'echo "$CUDA_VISIBLE_DEVICES"'
    sizes = [1, 2, 3, 4] * 5
    jobs = [machine.start(str(size), "--", "sh", "-c", job) for size in sizes]
    results = [process.communicate(timeout=30) for process in jobs]
    assert [process.returncode for process in jobs] == [0] * 20, results
    assert [len(set(out.strip().split(","))) for out, _ in results] == sizes


def test_two_jobs_that_each_want_every_device_take_turns(machine):
    jobs = [machine.start("2", "--", "sleep", "0.05", gpus="GPU-a,GPU-b") for _ in range(6)]
    for process in jobs:
        process.communicate(timeout=20)
    assert all(process.returncode == 0 for process in jobs)


def test_a_job_gets_uuids_and_the_device_order(machine):
    status, out, _ = machine.run("2", "--", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES $CUDA_DEVICE_ORDER")
    assert (status, out) == (0, "GPU-a,GPU-b PCI_BUS_ID")


@pytest.mark.fault("kill -9 of a job that holds GPUs (stale lock)", "its devices are free at once")
def test_kill_9_of_the_job_releases_its_devices_and_waiters_are_told_its_pid(machine):
    job = machine.hold("1", "--", "sleep", "30", gpus="GPU-a")
    status, _, error = machine.run("1", "--timeout", "0.1", "--", "true", gpus="GPU-a")
    assert status == 1
    assert "waiting for 1 GPU: GPU-a held by pid" in error
    assert f"held by pid {job.pid}" in error, "exec keeps the process id, so the holder named is the job itself"
    job.send_signal(signal.SIGKILL)
    job.communicate()
    assert machine.is_free()


def test_the_lease_lives_as_long_as_a_child_that_outlives_the_job(machine):
    job = machine.start("1", "--", "sh", "-c", "sleep 30 >/dev/null 2>&1 & echo $!", gpus="GPU-a")
    child = int(job.communicate(timeout=10)[0])
    try:
        assert job.returncode == 0
        assert not machine.is_free()
    finally:
        os.kill(child, signal.SIGKILL)
    assert machine.becomes_free()


def test_a_script_that_uses_low_descriptors_keeps_its_lease(machine):
    script = "exec 3>a 4>b 5>c 6>d 7>e 8>f 9>g; exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&-; exec sleep 30"
    job = machine.hold("1", "--", "sh", "-c", script, gpus="GPU-a")
    time.sleep(0.1)
    assert not machine.is_free()
    end(job)


def test_the_exit_status_and_umask_of_the_job_are_its_own(machine):
    process = machine.start("1", "--", "sh", "-c", "umask; exit 7", umask=0o027)
    assert process.communicate(timeout=10)[0].strip() in ("0027", "027")
    assert process.returncode == 7


def test_devices_that_a_scheduler_gave_are_left_alone(machine):
    job = machine.hold("4", "--", "sleep", "30")
    slurm = {"SLURM_JOB_ID": "17", "CUDA_VISIBLE_DEVICES": "1,3"}
    assert machine.run("2", "--", *SHOW, **slurm)[:2] == (0, "1,3")
    assert machine.run("1", "--", *SHOW, CUDA_VISIBLE_DEVICES="GPU-c")[:2] == (0, "GPU-c")
    assert machine.run("4", "--at-most", "--", *SHOW, **slurm)[:2] == (0, "1,3")
    end(job)


def test_more_visible_devices_than_needed_are_the_pool_to_lease_from(machine):
    jobs = [
        machine.hold("1", "--", *SHOW[:2], f"{SHOW[2]}; exec sleep 30", CUDA_VISIBLE_DEVICES=pool)
        for pool in ("3,1", "3,1")
    ]
    assert [process.stdout.readline().strip() for process in jobs] == ["GPU-d", "GPU-b"]
    assert machine.run("1", "--timeout", "0", "--", *SHOW, CUDA_VISIBLE_DEVICES="GPU-b,GPU-d")[0] == 1
    assert machine.run("1", "--timeout", "0", "--", *SHOW)[1] == "GPU-a"
    for process in jobs:
        end(process)


def test_a_pool_that_names_a_device_which_is_not_there_is_refused(machine):
    status, _, error = machine.run("1", "--", "true", CUDA_VISIBLE_DEVICES="0,7")
    assert status == 1
    assert "'7'" in error and "GPU-a, GPU-b, GPU-c, GPU-d" in error


@pytest.mark.parametrize("given", [{}, {"CUDA_VISIBLE_DEVICES": "0,1"}])
def test_a_node_with_too_few_devices_is_refused_with_both_numbers(machine, given):
    status, out, error = machine.run("3", "--", "echo", "ran", gpus="GPU-a,GPU-b", **given)
    assert (status, out) == (1, "")
    assert "needs 3 GPUs" in error and "offers it 2 GPUs" in error and len(error.splitlines()) == 1


def test_at_most_takes_what_a_smaller_node_has(machine):
    assert machine.run("3", "--at-most", "--", *SHOW, gpus="GPU-a,GPU-b")[:2] == (0, "GPU-a,GPU-b")


@pytest.mark.parametrize("variables", [{"gpus": ""}, {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}])
def test_without_a_gpu_the_job_runs_on_the_cpu_as_it_is(machine, variables):
    command = ["2", "--distributed", "--", "echo", "as it is"]
    assert machine.run(*command, **variables) == (0, "as it is", "")


def test_a_job_that_asks_for_no_gpu_sees_none(machine):
    assert machine.run("0", "--", *SHOW)[:2] == (0, "")


def test_a_device_that_a_foreign_process_occupies_is_skipped_above_the_threshold(machine):
    occupied = {"STILLHOUSE_FAKE_OCCUPIED": "GPU-a=4000,GPU-b=10"}
    assert machine.run("1", "--", *SHOW, **occupied)[1] == "GPU-b"
    assert machine.run("1", "--foreign-mib", "5000", "--", *SHOW, **occupied)[1] == "GPU-a"
    status, _, error = machine.run("4", "--timeout", "0.1", "--", "true", **occupied)
    assert status == 1
    assert "GPU-a in use, without a lease, by pid 1" in error


def test_a_job_that_waits_gets_its_devices_when_they_are_free(machine):
    job = machine.hold("1", "--", "sleep", "3", gpus="GPU-a")
    status, out, error = machine.run("1", "--timeout", "60", "--", *SHOW, gpus="GPU-a")
    assert (status, out) == (0, "GPU-a")
    assert "waiting for 1 GPU" in error and "leased GPU-a" in error
    end(job)


def test_users_with_different_umasks_exclude_each_other_in_one_open_directory(machine):
    job = machine.hold("1", "--", "sleep", "30", gpus="GPU-a", umask=0o077)
    directory = machine.directory / "leases"
    assert directory.stat().st_mode & 0o7777 == 0o1777
    assert (directory / "GPU-a.lock").stat().st_mode & 0o7777 == 0o666
    assert not machine.is_free(umask=0o022)
    end(job)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_respects_a_lease_and_can_take_it_over(lease_module, monkeypatch):
    parent = Path(tempfile.mkdtemp())
    parent.chmod(0o755)
    monkeypatch.setenv("STILLHOUSE_LOCK_DIR", str(parent / "leases"))
    node = lease_module.Node(["GPU-a"], lambda device: {})

    def another_user_gets() -> bool:
        if (process := os.fork()) == 0:
            status = 2
            try:
                os.setgid(65534)
                os.setuid(65534)
                status = 0 if lease_module.try_lease(["GPU-a"], 1, node, 64)[0] else 1
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert status != 2, "the other user met an error"
        return status == 0

    previous = os.umask(0)
    try:
        directory = lease_module.open_lock_directory()
        descriptor = lease_module.lock(directory, "GPU-a")
        assert isinstance(descriptor, int)
        assert not another_user_gets()
        os.close(descriptor)
        assert another_user_gets()
    finally:
        os.umask(previous)
        shutil.rmtree(parent)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_jobs_of_two_users_on_one_node_never_share_a_device(lease_module, monkeypatch, tmp_path):
    parent = Path(tempfile.mkdtemp())
    parent.chmod(0o777)
    monkeypatch.setenv("STILLHOUSE_LOCK_DIR", str(parent / "leases"))
    pool = ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]
    node = lease_module.Node(pool, lambda device: {})

    def job(user: int, count: int) -> None:
        if user:
            os.setgid(user)
            os.setuid(user)
        for _ in range(5):
            # A directory per device in use: mkdir fails if two jobs ever share one.
            leased = lease_module.wait_for_lease(pool, count, node, 64, timeout=60)
            for device in leased:
                (parent / device).mkdir()
            time.sleep(0.002)
            for device in leased:
                (parent / device).rmdir()
            os.closerange(lease_module.LOWEST_LOCK_DESCRIPTOR, lease_module.LOWEST_LOCK_DESCRIPTOR + 20)

    processes = []
    for number in range(12):
        if (process := os.fork()) == 0:
            status = 1
            try:
                os.umask(0)
                job((0, 65534)[number % 2], 1 + number % 4)
                status = 0
            finally:
                os._exit(status)
        processes.append(process)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    shutil.rmtree(parent)
    assert statuses == [0] * 12


@pytest.mark.parametrize("trick", ["file", "link", "missing parent"])
def test_a_lock_directory_that_cannot_be_used_is_a_clear_error(machine, trick):
    place = machine.directory / "place"
    if trick == "file":
        place.touch()
    elif trick == "link":
        place.symlink_to(machine.directory)
    else:
        place = place / "deeper"
    status, out, error = machine.run("1", "--", "echo", "ran", STILLHOUSE_LOCK_DIR=str(place))
    assert (status, out) == (1, "")
    assert str(place) in error and "set STILLHOUSE_LOCK_DIR" in error and "Traceback" not in error


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_an_unwritable_lock_directory_is_a_clear_error(machine):
    (machine.directory / "leases").mkdir(mode=0o555)
    status, _, error = machine.run("1", "--", "true")
    assert status == 1 and "GPU-a.lock: Permission denied" in error and "set STILLHOUSE_LOCK_DIR" in error


@pytest.mark.parametrize("trick", ["symbolic link", "hard link", "pipe"])
def test_a_planted_lock_file_is_refused_and_its_target_untouched(machine, trick):
    target, lock = machine.directory / "precious", machine.directory / "leases" / "GPU-a.lock"
    target.write_text("precious")
    lock.parent.mkdir()
    if trick == "symbolic link":
        lock.symlink_to(target)
    elif trick == "hard link":
        lock.hardlink_to(target)
    else:
        os.mkfifo(lock)
    status, _, error = machine.run("1", "--", "true")
    assert status == 1 and "GPU-a.lock" in error and "Traceback" not in error
    assert target.read_text() == "precious"


def test_a_distributed_job_starts_by_accelerate_launch(machine):
    python = machine.directory / "python"
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    job = ["--distributed", "--", str(python), "-m", "package.train", "steps=3"]
    words = machine.run("2", *job)[1].split()
    assert words[:3] == ["-m", "accelerate.commands.accelerate_cli", "launch"]
    assert words[-3:] == ["-m", "package.train", "steps=3"]
    assert words[words.index("--num_processes") + 1] == "2"
    given = machine.run("2", *job, CUDA_VISIBLE_DEVICES="0,1")[1]
    assert "--num_processes 2" in given, "devices given by a scheduler are used by as many processes"
    assert machine.run("1", *job)[1] == "-m package.train steps=3"


LAUNCHER = f"""#!{sys.executable}
import socket, sys
address = ("", int(sys.argv[sys.argv.index("--main_process_port") + 1]))
try:
    socket.socket().bind(address)
except OSError:
    print(address[1])
server = socket.socket()
server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
server.bind(address)
server.listen()
sys.stdin.read()
"""


def test_the_port_of_a_distributed_job_is_free_for_its_launcher_and_for_nobody_else(machine):
    launcher = machine.directory / "launcher"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    jobs = [machine.hold("2", "--distributed", "--", str(launcher), "-m", "x") for _ in "ab"]
    ports = {job.communicate(timeout=30)[0] for job in jobs}
    assert len(ports - {""}) == 2
    assert [job.returncode for job in jobs] == [0, 0]


def test_commands_that_cannot_run_are_one_clear_line(machine):
    assert "python -m module" in machine.run("2", "--distributed", "--", "echo", "x")[2].splitlines()[-1]
    assert "cannot run no-such-program: No such file" in machine.run("1", "--", "no-such-program")[2]
    assert machine.run("1")[0] == 2
    assert machine.run("-1", "--", "true")[0] == 2
