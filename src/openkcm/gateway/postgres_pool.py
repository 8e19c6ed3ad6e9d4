# SPDX-License-Identifier: Apache-2.0
"""A few connections to PostgreSQL that all threads share, and what its failures mean.

Invariant: nothing waits longer than seconds: for a connection, for the server to take one, or for its answer. A child
never uses a connection of its parent, nor says anything on it. No message of ours has a word of the server's or of
the URL in it.

Not ``psycopg_pool``: its threads are not there in a forked child, and it has no bound on the wait for an answer.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Final

import psycopg
from psycopg import Error

from .. import postgres
from ..errors import StoreUnavailable
from ..postgres import Address, BoundedConnection
from .keystore import WHAT

FREE_SECONDS: Final = 10.0
"""How long to wait for a connection that others use."""

# What the same failures mean where each statement is whole by itself, and is tried again by us.
_ADVICE: Final = {
    "25006": ("the server is a standby or read-only; connect to the primary", True),
    "42501": ("this user lacks a right on the tables or the schema; grant it", False),
    "55P03": ("what is to be changed is locked by another; try again", True),
    "57014": ("the server took too long and was stopped; try again", True),
    "40": ("others changed the same keys again and again; try again", True),
    "53100": ("the database's disk is full; make room and try again", True),
    "58": ("the database's disk failed; check it and try again", True),
    **dict.fromkeys(
        ("", "22", "3F", "42"), ("its tables are not as OpenKCM made them; find who changed them", False)
    ),
    "23": ("its tables refuse what OpenKCM adds; find who changed them", False),
}


def store_error(error: Error) -> StoreUnavailable:
    """Translate a failure into one error that says what to do."""
    return postgres.store_error(error, WHAT, _ADVICE)


class Pool:
    """Connections to one database.

    Args:
        url: libpq's.
        most: how many there may be at a time.

    Raises:
        InvalidInput: it is no URL of libpq's, or names no database.
    """

    def __init__(self, url: str, most: int) -> None:
        self._address = Address(url, "openkcm-gateway")
        self._most = most
        self._closed = False
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(self._most)
        self._idle: list[BoundedConnection] = []

    def take(self) -> tuple[BoundedConnection, bool]:
        """A connection for the caller alone, and whether it is new.

        Raises:
            StoreUnavailable: none was free in time, or the server takes none.
        """
        if self._closed:
            raise StoreUnavailable(f"{WHAT} was closed", retryable=False)
        free = self._free
        if not free.acquire(timeout=FREE_SECONDS):
            raise StoreUnavailable(f"{WHAT}: all its connections are in use; try again")
        try:
            with self._lock:
                if self._idle:
                    return self._idle.pop(), False
            return self._connect(), True
        except BaseException:
            free.release()
            raise

    def give_back(self, connection: BoundedConnection) -> bool:
        """Take a connection back; False if it is of no more use, and then the idle ones are not either."""
        alive = not connection.closed and not connection.broken and not self._closed
        # An error that the server answered with leaves the connection usable; one in between does not.
        alive = alive and connection.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
        if not alive:
            self.discard(connection)
            return False
        with self._lock:
            self._idle.append(connection)
        self._free.release()
        return True

    def discard(self, connection: BoundedConnection) -> None:
        """Close a connection that is of no use any more, and the idle ones, which are likely to be as it is."""
        connection.close()
        self._close_idle()
        self._free.release()

    def forget(self) -> None:
        """In a forked child: let go of the parent's connections without a word to the server."""
        inherited = self._idle
        self._reset()
        for connection in inherited:
            # The driver does not know, and must not: it would say goodbye for the parent. It never finalises what
            # another process made.
            with contextlib.suppress(OSError, Error):
                os.close(connection.pgconn.socket)
        _inherited.extend(inherited)

    def close(self) -> None:
        """Close the idle connections at once and those in use when they come back; idempotent."""
        self._closed = True
        self._close_idle()

    def _close_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for each in idle:
            each.close()

    def _connect(self) -> BoundedConnection:
        try:
            connection = self._address.connect(autocommit=True)
        except Error as error:
            raise store_error(error) from None
        connection.patience = postgres.SILENCE_SECONDS
        connection.prepare_threshold = None  # what a pooler passes on to another session it does not know
        return connection


_inherited: list[BoundedConnection] = []
"""A parent's connections, kept so that nothing finalises them."""
