# SPDX-License-Identifier: Apache-2.0
"""What the Core's store and the Gateway's key store share: pragmas, what failures mean, and safety across fork.

Invariant: no connection of ours is open while the process forks, or when nobody has it any more.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from typing import Final, Protocol

from .alive import Alive
from .errors import StoreUnavailable

PRAGMAS: Final = ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "foreign_keys=ON")
"""Durable when acknowledged, and overwritten when deleted."""

BUSY_SECONDS: Final = 5.0
"""How long a writer waits for another process's write lock."""

_ADVICE: Final = {
    sqlite3.SQLITE_BUSY: ("the database is locked by another process; try again", True),
    sqlite3.SQLITE_LOCKED: ("the database is locked by another connection; try again", True),
    sqlite3.SQLITE_READONLY: (
        "the database, its -wal and -shm files or its folder are read-only; make all of them writable for this user",
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


class Connection(sqlite3.Connection):
    """A connection that is closed with the last that had it: not all who make a Gateway close it.

    Python does that too, but from 3.13 on it warns of each.
    """

    def __del__(self) -> None:
        self.close()


def store_error(error: BaseException, what: str) -> StoreUnavailable:
    """Translate a database failure into one error that says what to do; ``what`` names the database."""
    original = getattr(error, "orig", error)
    code = getattr(original, "sqlite_errorcode", None)
    if "closed database" in str(original):
        return StoreUnavailable(f"{what} was closed", retryable=False)
    advice, retryable = _ADVICE.get((code or 0) & 0xFF, ("the database does not answer as it should", True))
    return StoreUnavailable(f"{what}: {advice}", retryable=retryable)


# ---- fork ----------------------------------------------------------------------------------------------------


class Forkable(Protocol):
    """Something that holds connections which must not be open while the process forks."""

    def before_fork(self) -> None:
        """Wait for what is under way in other threads, let nothing new begin, close every connection."""

    def after_fork_in_parent(self) -> None:
        """Let work go on, with new connections."""


def close_before_fork(store: Forkable) -> None:
    """Have a store close its connections before each fork, as long as it lives.

    SQLite remembers in memory, which a child inherits, which locks its process holds, and the kernel does not give
    them to the child. A child of a process with an open connection would write without locks, and into a
    write-ahead log that its parent has deleted (sqlite.org/howtocorrupt.html, section 2.6). So both sides open
    new connections.
    """
    _stores.add(store)


_stores: Final[Alive[Forkable]] = Alive()
_waiting: list[Forkable] = []
_one_at_a_time = threading.RLock()


def _before_fork() -> None:
    _one_at_a_time.acquire()
    for store in _stores.all():
        store.before_fork()
        _waiting.append(store)


def _after_fork_in_parent() -> None:
    while _waiting:
        _waiting.pop().after_fork_in_parent()
    _one_at_a_time.release()


def _after_fork_in_child() -> None:
    global _one_at_a_time
    _waiting.clear()
    _one_at_a_time = threading.RLock()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
)
