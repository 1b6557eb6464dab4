"""The error that makes `fetch` try an entry's next source."""

from __future__ import annotations

from stillhouse.runtime.errors import UserError


class SourceError(UserError):
    """One source did not yield the asset: unreachable, absent, or not the bytes that were asked for."""
