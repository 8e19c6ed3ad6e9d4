# SPDX-License-Identifier: Apache-2.0
"""What SQLite's failures mean to an operator, for the Core's store and the Gateway's key store alike."""

from __future__ import annotations

import sqlite3
from typing import Final

from .errors import StoreUnavailable

PRAGMAS: Final = ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "foreign_keys=ON")
"""Durable when acknowledged, and overwritten when deleted."""

BUSY_SECONDS: Final = 5.0
"""How long a writer waits for another process's write lock."""

_ADVICE: Final = {
    sqlite3.SQLITE_BUSY: ("the database is locked by another process; try again", True),
    sqlite3.SQLITE_LOCKED: ("the database is locked by another connection; try again", True),
    sqlite3.SQLITE_READONLY: (
        "the database or its folder is read-only; make both writable for this user",
        False,
    ),
    sqlite3.SQLITE_FULL: ("the disk is full; nothing was changed, make room and try again", True),
    sqlite3.SQLITE_IOERR: (
        "the disk failed or is full; nothing was changed, check it and try again",
        True,
    ),
    sqlite3.SQLITE_CANTOPEN: (
        "the database file cannot be opened; check its path, folder, permissions and the open-file limit",
        False,
    ),
    sqlite3.SQLITE_CORRUPT: ("the database file is damaged; restore it from a backup", False),
    sqlite3.SQLITE_NOTADB: ("the file is not a database; check the path", False),
    sqlite3.SQLITE_PERM: ("the database file may not be opened by this user", False),
}


def store_error(error: BaseException, what: str) -> StoreUnavailable:
    """Translate a database failure into one error that says what to do; ``what`` names the database."""
    original = getattr(error, "orig", error)
    code = getattr(original, "sqlite_errorcode", None)
    if "closed database" in str(original):
        return StoreUnavailable(f"{what} was closed", retryable=False)
    advice, retryable = _ADVICE.get((code or 0) & 0xFF, ("the database does not answer as it should", True))
    return StoreUnavailable(f"{what}: {advice}", retryable=retryable)
