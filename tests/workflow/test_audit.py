"""The audit fails on a known vulnerability, and says so where nothing can be known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.workflow import REPOSITORY

CLEAN = {"name": "good", "version": "1.0", "vulns": []}
VULNERABLE = {"name": "bad", "version": "2.0", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}
UNKNOWN = {"name": "odd", "version": "3.0", "skip_reason": "not found on the index"}


@pytest.mark.parametrize(
    ("packages", "status", "message"),
    [
        ([CLEAN], 0, "lock.txt: 1 packages audited, 0 with known vulnerabilities"),
        ([CLEAN, VULNERABLE], 1, "lock.txt: bad==2.0: CVE-1, fixed in 2.1"),
        ([CLEAN, UNKNOWN], 0, "0 with known vulnerabilities, 1 unknown to the database"),
        ([UNKNOWN], 0, "NOT AUDITED, no advisory database can be reached: not found on the index"),
        (None, 0, "NOT AUDITED, no advisory database can be reached: no route to host"),
    ],
    ids=["clean", "vulnerable", "partly unknown", "an index without advisories", "no network"],
)
def test_the_audit_says_what_the_database_knows(
    tmp_path: Path, packages: list[dict[str, object]] | None, status: int, message: str
) -> None:
    answer = (
        "raise SystemExit('no route to host')"
        if packages is None
        else f"print({json.dumps({'dependencies': packages})!r})"
    )
    (tmp_path / "pip_audit.py").write_text(answer)
    done = subprocess.run(
        [sys.executable, REPOSITORY / ".ci/audit", "lock.txt"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (status, "")
    assert message in done.stdout
