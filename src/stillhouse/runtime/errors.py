"""Errors that a user can act on: one clear line that names what is wrong and what to do.

Programs print the message of a `UserError` without a traceback and exit with status 1 (see `commands`);
every other exception is a defect of Stillhouse and keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend; the message names the file, key or path, the fault and the remedy."""


class ConfigurationError(UserError):
    """A configuration layer does not validate; the message names the file, the key and the nearest valid key."""
