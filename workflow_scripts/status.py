"""What is done, running, stale, and why: `python workflow_scripts/status.py [snakemake's arguments]`, or `make status`.

Starts nothing, changes nothing and needs no lock, so it may be asked while a workflow runs in the same folder. What
is stale comes from `snakemake --summary`, what runs from the marks that Snakemake sets for the outputs of started
jobs, the pace from the newest log of a run.
"""

from __future__ import annotations

import contextlib
import csv
import re
import subprocess
import sys
import time
from base64 import urlsafe_b64decode
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

STATE = Path(".snakemake")
# What the columns `status` of --summary mean for a file that will be made again.
WHY = {
    "ok": "something that it is made from is made again",
    "updated input files": "an input changed",
    "rule implementation changed": "its rule changed",
    "set of input files changed": "other inputs are asked for",
    "params changed": "a setting or the code of its step changed",
}
STEPS = re.compile(r"^(\d+) of (\d+) steps .* done$", re.MULTILINE)
# How a dry run shows a job; one of a group is indented.
JOB = re.compile(r"^ +output: (.+)\n +log: (.+)$", re.MULTILINE)
QUIET_SECONDS = 120


@dataclass(frozen=True)
class File:
    """One output of the plan, as `--summary` prints it."""

    output_file: str
    rule: str
    status: str
    plan: str

    @property
    def done(self) -> bool:
        """Whether it is there and stays as it is."""
        return self.plan == "no update"


def summary(arguments: Sequence[str]) -> list[File]:
    """Every output of the workflow; ends the program with snakemake's own message where it cannot plan."""
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--summary", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip())
    table = done.stdout[done.stdout.index("output_file\t") :]
    rows = csv.DictReader(table.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [File(row["output_file"], row["rule"], row["status"], row["plan"]) for row in rows]


def started_outputs(state: Path = STATE) -> set[str]:
    """Outputs of jobs that have started and not ended well; a mark's name is the output's, encoded."""
    marks = state / "incomplete"
    return {
        urlsafe_b64decode("".join(part.removeprefix("@") for part in mark.relative_to(marks).parts)).decode()
        for mark in marks.rglob("*")
        if mark.is_file()
    }


def workflow_runs_here() -> bool:
    """Whether a process of this machine runs snakemake in this folder: a lock alone may be left from one that died."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (process / "cmdline").read_text().split("\0")
            if (process / "cwd").readlink() == Path.cwd() and any(Path(word).name == "snakemake" for word in arguments):
                return True
    return False


def job_logs(outputs: Iterable[str], arguments: Sequence[str]) -> dict[str, Path]:
    """The log of the job that makes each output, where there is one: a dry run of these outputs names it."""
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--dry-run", "--rerun-incomplete"]
    done = subprocess.run([*command, *outputs, *arguments], capture_output=True, text=True)
    logs: dict[str, Path] = {}
    for made, written in JOB.findall(done.stdout + done.stderr):
        logs |= dict.fromkeys(made.split(", "), Path(written.split(", ")[0]))
    return {output: log for output, log in logs.items() if log.is_file()}


def read_log(path: Path) -> tuple[str, str]:
    """The GPUs that a job leased, and what its log says last; a progress bar counts by its last state."""
    text = path.read_text(errors="replace").strip()
    leased = re.findall(r"^gpu_lease: leased (.+)$", text, re.MULTILINE)
    return (f" on {leased[-1]}" if leased else ""), text.rpartition("\n")[2][:160]


def pace(running: bool, state: Path = STATE) -> str | None:
    """How far the newest run is and how long it needs at its pace so far; None where nothing has run."""
    for log in sorted((state / "log").glob("*.log"), reverse=True):
        steps = STEPS.findall(text := log.read_text(errors="replace"))
        if "Job stats:" not in text or "This was a dry-run" in text:
            continue
        if not steps:
            return "no job of the newest run has ended yet"
        ended, total = map(int, steps[-1])
        begun = datetime.strptime(log.name[:17], "%Y-%m-%dT%H%M%S")
        elapsed = (datetime.now() if running else datetime.fromtimestamp(log.stat().st_mtime)) - begun
        line = f"newest run: {ended} of {total} jobs after {rounded(elapsed)}"
        return line + (f"; at that pace {rounded(elapsed / ended * (total - ended))} more" if ended < total else "")
    return None


def rounded(duration: timedelta) -> timedelta:
    """Without fractions of a second."""
    return timedelta(seconds=round(duration.total_seconds()))


def counted(names: Iterable[str]) -> str:
    """Names with how often each occurs, most frequent first."""
    return ", ".join(f"{count} {name}" for name, count in Counter(names).most_common())


def report(
    files: Sequence[File], open_files: Sequence[File], logs: dict[str, Path], running: bool, locked: bool
) -> str:
    """The page that the user reads; `open_files` are outputs of jobs that have started, `logs` what these write to."""
    lines = [f"{sum(file.done for file in files)} of {len(files)} files are up to date"]
    lines += [f"  {line}" for line in [pace(running)] if line]
    if open_files:
        stopped = "interrupted (run again to go on from there):"
        if locked:
            stopped = "locked, but not by this machine: it runs on another, or was killed (then: snakemake --unlock):"
        lines.append("running:" if running else stopped)
    for file in open_files:
        log = logs.get(file.output_file)
        devices, said = read_log(log) if log else ("", "")
        lines.append(f"  {file.output_file}{devices}")
        if log and said:
            quiet = time.time() - log.stat().st_mtime
            silence = f" (silent for {rounded(timedelta(seconds=quiet))})" if running and quiet > QUIET_SECONDS else ""
            lines.append(f"      {said}{silence}")
    pending = [file for file in files if not file.done and file not in open_files]
    if missing := [file.rule for file in pending if file.status == "missing"]:
        lines.append(f"not made yet, files by rule: {counted(missing)}")
    stale = [file for file in pending if file.status != "missing"]
    for why in dict.fromkeys(file.status for file in stale):
        lines.append(f"stale, {WHY.get(why, why)}:")
        lines += [f"  {file.output_file}" for file in stale if file.status == why]
    if stale:
        lines.append("The module or setting behind it: snakemake -n")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Print the report."""
    running, locked = workflow_runs_here(), any((STATE / "locks").glob("*.lock"))
    files, started = summary(arguments), started_outputs()
    open_files = [file for file in files if file.output_file in started]
    logs = job_logs([file.output_file for file in open_files], arguments) if open_files else {}
    print(report(files, open_files, logs, running, locked))


if __name__ == "__main__":
    main(sys.argv[1:])
