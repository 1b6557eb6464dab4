"""Logging of step programs: one line per message on standard error, which the rules keep in `logs/`."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("stillhouse")


def configure_logging() -> None:
    """Send Stillhouse's messages to standard error with their time; libraries keep quiet below warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)
