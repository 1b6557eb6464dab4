"""Digests of plain values: what a fingerprint, a cache key and a run record are made of."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest(value: Any) -> str:
    """Sha256 of a JSON-able value; equal values have equal digests whatever the order of their keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def short_digest(value: Any, length: int = 8) -> str:
    """The first digits of `digest`, for names that people read."""
    return digest(value)[:length]
