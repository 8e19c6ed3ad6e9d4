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
import time
from collections.abc import Generator
from typing import Any, Final, TypeVar

import psycopg
from psycopg import Error, OperationalError
from psycopg.conninfo import conninfo_to_dict

from ..errors import InvalidInput, StoreUnavailable
from .keystore import WHAT

T = TypeVar("T")

CONNECT_SECONDS: Final = 4
STATEMENT_SECONDS: Final = 10
"""How long the server may work on a statement, its waiting for locks included."""

ANSWER_SECONDS: Final = STATEMENT_SECONDS + 2
"""How long we wait for an answer: longer, so that where the server is there it is the one to say so."""

FREE_SECONDS: Final = 10.0
_TICK_SECONDS: Final = 0.1

# Engines beside PostgreSQL take these too. Not as options of the connection, which poolers refuse.
_SESSION: Final = (
    f"SET statement_timeout = {STATEMENT_SECONDS * 1000}; SET lock_timeout = {STATEMENT_SECONDS * 1000}; "
    "SET synchronous_commit = on"
)


class Silent(OperationalError):
    """The server did not answer in time."""


class _Connection(psycopg.Connection[tuple[Any, ...]]):
    """A connection that does not wait for ever."""

    def wait(self, gen: Any, interval: float = _TICK_SECONDS, timeout: float | None = None) -> Any:
        """As ``psycopg.Connection.wait``, for at most ``ANSWER_SECONDS``."""
        return super().wait(_until(gen, time.monotonic() + ANSWER_SECONDS), _TICK_SECONDS)


def _until(steps: Generator[Any, Any, T], deadline: float) -> Generator[Any, Any, T]:
    """Pass a driver's steps on until the deadline; it is told every ``_TICK_SECONDS`` that nothing came."""
    try:
        wanted = next(steps)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() > deadline:
                raise Silent("no answer in time")
            # Of nothing it is told too: then what it wants is the same as before, and goes unread.
            wanted = steps.send(ready)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


class Pool:
    """Connections to one database.

    Args:
        url: libpq's.
        most: how many there may be at a time.

    Raises:
        InvalidInput: it is no URL of libpq's.
    """

    def __init__(self, url: str, most: int) -> None:
        self._parameters = _parse(url)
        self._most = most
        self._closed = False
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(self._most)
        self._idle: list[_Connection] = []

    def take(self) -> tuple[_Connection, bool]:
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

    def give_back(self, connection: _Connection) -> bool:
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

    def discard(self, connection: _Connection) -> None:
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

    def _connect(self) -> _Connection:
        try:
            connection = _Connection.connect(**self._parameters, autocommit=True, prepare_threshold=None)
        except Error as error:
            refused = connect_error(error)
        else:
            try:
                connection.execute(_SESSION.encode())
            except Error as error:
                connection.close()
                raise store_error(error) from None
            return connection
        raise refused


_inherited: list[_Connection] = []
"""A parent's connections, kept so that nothing finalises them."""


def _parse(url: str) -> dict[str, Any]:
    try:
        parameters = conninfo_to_dict(url)
    except Error:
        parameters = None
    if parameters is None:  # outside the block above: the driver's message has the URL in it
        raise InvalidInput("a PostgreSQL key store is a URL such as postgresql://user@host:5432/database")
    return {"connect_timeout": CONNECT_SECONDS, "application_name": "openkcm-gateway", **parameters}


# ---- what failures mean ---------------------------------------------------------------------------------------

# By the classes of PostgreSQL's error codes (its manual, appendix A), the longest prefix first.
_ADVICE: Final = {
    "25006": ("the server is a standby or read-only; connect to the primary", True),
    "42501": ("this user lacks a right on the tables or the schema; grant it", False),
    "53100": ("the server's disk is full; make room and try again", True),
    "53300": ("the server has no connection left; try again, or raise max_connections", True),
    "55P03": ("what is to be changed is locked by another; try again", True),
    "57014": ("the server took too long and was stopped; try again", True),
    "28": ("the server refuses this login; check user, password and pg_hba.conf", False),
    "3D": ("there is no such database; create it or correct the URL", False),
    "08": ("the connection was lost; try again", True),
    "40": ("others changed the same keys again and again; try again", True),
    "42": ("its tables are not as OpenKCM made them; find who changed them", False),
    "22": ("its tables are not as OpenKCM made them; find who changed them", False),
    "23": ("its tables refuse what OpenKCM adds; find who changed them", False),
    "53": ("the server is short of something; try again", True),
    "57": ("the server is stopping or starting; try again", True),
}
_LOGIN_REFUSED: Final = ("authentication failed", "no password supplied", "no pg_hba.conf entry", "password")
_CERTIFICATE_REFUSED: Final = ("certificate", "SSL", "ssl")


def store_error(error: Error) -> StoreUnavailable:
    """Translate a failure of a statement into one error that says what to do."""
    if isinstance(error, Silent):
        return StoreUnavailable(f"{WHAT}: the server does not answer; try again")
    code = error.sqlstate or ""
    for length in (5, 2):
        if code[:length] in _ADVICE:
            advice, retryable = _ADVICE[code[:length]]
            return StoreUnavailable(f"{WHAT}: {advice}", retryable=retryable)
    if not code and isinstance(error, OperationalError):
        return StoreUnavailable(f"{WHAT}: the connection was lost; try again")
    if not code:
        # Not the server's word but the driver's, of an answer that is not of the expected kind.
        return StoreUnavailable(f"{WHAT}: {_ADVICE['42'][0]}", retryable=False)
    return StoreUnavailable(f"{WHAT}: the server failed with SQLSTATE {code}; see its log", retryable=True)


def connect_error(error: Error) -> StoreUnavailable:
    """Translate a failure to connect, of which libpq gives no code but text."""
    if error.sqlstate:
        return store_error(error)
    text = str(error)
    if any(word in text for word in _LOGIN_REFUSED):
        advice, retryable = _ADVICE["28"]
    elif "does not exist" in text:
        advice, retryable = "there is no such database or user; create it or correct the URL", False
    elif any(word in text for word in _CERTIFICATE_REFUSED):
        advice, retryable = (
            "no TLS as the URL asks for; check sslmode, sslrootcert and the certificates",
            False,
        )
    else:
        advice, retryable = "the server does not answer, or takes no connections; try again", True
    return StoreUnavailable(f"{WHAT}: {advice}", retryable=retryable)
