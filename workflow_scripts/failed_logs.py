"""The end of each failed job's log, at the end of a failed run: `python workflow_scripts/failed_logs.py RUN_LOG`.

The Snakefile calls it when a run fails; RUN_LOG is the workflow's own log, which names failed jobs and their logs.
Snakemake's `show-failed-logs` would print them whole, hours of training and all attempts included.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LINES = 25
# A job's failure inside a group is indented.
FAILURE = re.compile(r"^( *)Error in rule (?P<rule>\w+):$(?P<facts>(?:\n\1 {4}.*)*)", re.MULTILINE)
FACT = re.compile(r"^ *(jobid|log): (.+)$", re.MULTILINE)


def failed_jobs(text: str) -> dict[str, tuple[str, list[Path]]]:
    """The rule and the logs of each job that failed and did not succeed later, by its number."""
    failed: dict[str, tuple[str, list[Path]]] = {}
    for match in FAILURE.finditer(text):
        facts = dict(FACT.findall(match["facts"]))
        number = facts.get("jobid", "")
        if re.search(rf"^Finished jobid: {number} ", text[match.end() :], re.MULTILINE):
            continue
        logs = facts.get("log", "").partition(" (check log file")[0]
        failed[number] = (match["rule"], [Path(name) for name in logs.split(", ") if name])
    return failed


def tail(path: Path) -> str:
    """The last lines of a log, each progress bar by its last state."""
    try:
        with path.open(errors="replace", newline="") as stream:  # As it is: a bar's carriage returns are no line ends.
            text = stream.read().rstrip()
    except OSError as error:
        return f"    {error.strerror}"
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join(f"    {line}" for line in lines[-LINES:] if line)


def main(run_log: Path) -> None:
    """Print the ends of the logs; the job's own log comes first, then the scheduler's."""
    for rule, logs in failed_jobs(run_log.read_text(errors="replace")).values():
        for log in logs:
            print(f"{rule}: the end of {log}\n{tail(log)}", file=sys.stderr)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(Path(name))
