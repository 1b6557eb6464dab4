"""Logging of step programs: one line per message on standard error, which the rules keep in `logs/`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(message)s"
logger = logging.getLogger("stillhouse")


def configure_logging() -> None:
    """Send Stillhouse's messages to standard error with their time; libraries keep quiet below warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT, datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)


def log_to_file(work_dir: Path) -> Path:
    """Keep this attempt's messages in `work_dir` too: the workflow deletes a job's log before every attempt."""
    work_dir.mkdir(parents=True, exist_ok=True)
    path = work_dir / f"attempt-{len(list(work_dir.glob('attempt-*.log'))) + 1}.log"
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORMAT))
    logger.addHandler(handler)
    return path
