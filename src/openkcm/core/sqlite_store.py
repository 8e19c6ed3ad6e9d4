# SPDX-License-Identifier: Apache-2.0
"""The Core's store in a SQLite file.

Invariant: that of ``store``. SQLite runs in WAL mode with full syncs and overwrites what it deletes.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from ..errors import InvalidInput, StoreUnavailable
from ..sqlite import BUSY_SECONDS, PRAGMAS, close_before_fork, store_error
from ..sqlite import Connection as OurConnection
from .seal import sync_folder
from .store import WHAT, Store

logger = logging.getLogger("openkcm")


@contextmanager
def translated() -> Iterator[None]:
    """Turn database failures inside the block into StoreUnavailable."""
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        if isinstance(error, sql.exc.IntegrityError):
            raise
        raise store_error(error, WHAT) from None
    except SQLAlchemyError as error:
        raise StoreUnavailable(
            f"the vault's store: unexpected {type(error).__name__}", retryable=False
        ) from None


def parse_url(url: str) -> URL:
    """Check a store URL; raises InvalidInput if it is not one of a file."""
    parsed = make_url(url)
    if not parsed.database or parsed.database == ":memory:":
        raise InvalidInput("a vault is a file: sqlite:///PATH")
    return parsed


class SQLiteStore(Store):
    """One process's connections to a vault's file."""

    implicit = True

    def __init__(self, url: str, *, busy_seconds: float = BUSY_SECONDS) -> None:
        super().__init__()
        self._url = parse_url(url)
        self.path = Path(str(self._url.database)).absolute()
        self._busy_seconds = busy_seconds
        self._engine: Engine | None = None
        self._observer: sqlite3.Connection | None = None
        self._observers = 0
        self._reset_locks()
        close_before_fork(self)

    def _reset_locks(self) -> None:
        self._observing = threading.Lock()
        self._making = threading.Lock()
        self._gate = threading.Condition()
        self._inside = 0
        self._forking = False
        self._nested = threading.local()

    @property
    def place(self) -> str:
        """The file."""
        return str(self.path)

    @property
    def default_seal(self) -> Path:
        """``vault.seal`` beside ``vault.db``."""
        return self.path.with_suffix(".seal")

    @property
    def default_key_store(self) -> Path:
        """``vault.keys.db`` beside ``vault.db``."""
        return self.path.with_name(f"{self.path.stem}.keys.db")

    def exists(self) -> bool:
        """Whether the database file is there and holds anything.

        Raises:
            StoreUnavailable: it cannot be told, or only its write-ahead log is there.
        """
        if _size(self.path):
            return True
        log = self.path.with_name(f"{self.path.name}-wal")
        if _size(log):
            # SQLite deletes the log of a database that is not there, with all that was committed to it.
            raise StoreUnavailable(
                f"{WHAT}: {self.path} is missing or empty, but its write-ahead log {log.name} is there; put the "
                "database back beside it, or move the log away to begin anew",
                retryable=False,
            )
        return False

    def check_place(self) -> None:
        """Raise StoreUnavailable if the folder is not there."""
        if not self.path.parent.is_dir():
            raise StoreUnavailable(
                f"the folder {self.path.parent} for the vault is not there", retryable=False
            )

    def make_place(self) -> None:
        """Make the file, durably, readable by its owner alone; SQLite gives its WAL the same mode."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.fchmod(descriptor, 0o600)  # an empty file may have been there
            os.close(descriptor)
            sync_folder(self.path.parent)
        except OSError as error:
            raise StoreUnavailable(
                f"the vault {self.path} cannot be made: {error.strerror}", retryable=False
            ) from None

    def _check_tables(self, tables: set[str]) -> None:
        if tables:
            raise StoreUnavailable(
                f"{WHAT}: the database holds other tables than a vault's; check the path", retryable=False
            )

    @property
    def engine(self) -> Engine:
        """The process's engine, made on first use."""
        self._check_open()
        with self._making:  # of two, one would be forgotten, and its connection still be open at a fork
            if self._engine is None:
                self._engine = self._make_engine()
            return self._engine

    def _make_engine(self) -> Engine:
        engine = sql.create_engine(
            self._url.set(database=str(self.path)),
            connect_args={
                "timeout": self._busy_seconds,
                "check_same_thread": False,
                "factory": OurConnection,
            },
        )
        sql.event.listen(engine, "connect", _configure)
        return engine

    @contextmanager
    def _use(self) -> Iterator[None]:
        """Use connections; not while the process forks, unless this thread was using them before."""
        depth = getattr(self._nested, "depth", 0)
        with self._gate:
            while self._forking and not depth:
                self._gate.wait()
            self._inside += 1
        self._nested.depth = depth + 1
        try:
            with translated():
                yield
        finally:
            self._nested.depth = depth
            with self._gate:
                self._inside -= 1
                self._gate.notify_all()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view of the store."""
        with self._use(), self.engine.connect() as connection:
            connection.exec_driver_sql("BEGIN")
            try:
                yield connection
            finally:
                _end(connection, "ROLLBACK")

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that alone may write; durable when the block ends, undone when it raises."""
        with self._use(), self.engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.exec_driver_sql("COMMIT")
            except BaseException:
                _end(connection, "ROLLBACK")
                raise

    def data_version(self) -> int:
        """A number that changes when any other connection, of any process, commits (PRAGMA data_version)."""
        with self._use(), self._observing:
            self._check_open()
            if self._observer is None:
                self._observer = sqlite3.connect(
                    f"{self.path.as_uri()}?mode=rw",
                    uri=True,
                    timeout=0.1,
                    check_same_thread=False,
                    isolation_level=None,
                    factory=OurConnection,
                )
                self._observers += 1
            # The number is the connection's own: one from another connection must never look the same.
            return self._observers << 32 | int(self._observer.execute("PRAGMA data_version").fetchone()[0])

    def look(self) -> None:
        """Nothing: ``data_version`` asks the file each time."""

    def weakness(self) -> str:
        """Nothing: the file's mode is what protects it."""
        return ""

    def silence(self) -> float:
        """0: a file answers at once, or with an error."""
        return 0.0

    def on_news(self, wake: Callable[[], None]) -> None:
        """Nothing: that another process committed is noticed only by looking."""

    def checkpoint(self) -> bool:
        """Fold the write-ahead log into the database, so that what was deleted is not left in it either.

        Never raises: what it follows is durable already. False if it failed, or if another connection was in the way
        for as long as a writer waits; the next checkpoint then does it.
        """
        try:
            with self._use(), self.engine.connect() as connection:
                busy = connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").scalar()
        except StoreUnavailable as error:
            logger.warning("deleted keys may still be in the write-ahead log of %s: %s", self.path, error)
            return False
        if busy:
            logger.warning("deleted keys may still be in the write-ahead log of %s: it is in use", self.path)
        return not busy

    def close(self) -> None:
        """Close every connection; the next use opens new ones."""
        with self._observing:
            if self._observer is not None:
                self._observer.close()
            self._observer = None
        if self._engine is not None:
            self._engine.dispose()
        self._engine = None

    def before_fork(self) -> None:
        """Wait until no other thread uses a connection, then close all."""
        own = getattr(self._nested, "depth", 0)
        with self._gate:
            self._forking = True
            while self._inside > own:
                self._gate.wait()
        self.close()

    def after_fork_in_parent(self) -> None:
        """Go on, with new connections."""
        with self._gate:
            self._forking = False
            self._gate.notify_all()

    def forget(self) -> None:
        """In a forked child: locks that no thread of the parent holds."""
        self._reset_locks()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StoreUnavailable(f"{WHAT} cannot be reached: {error.strerror}", retryable=False) from None


def _end(connection: Connection, statement: str) -> None:
    try:
        connection.exec_driver_sql(statement)
    except DBAPIError:
        connection.invalidate()  # SQLite has already rolled back; the connection is not reused


def _configure(connection: Any, record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by name, in read and write
    cursor = connection.cursor()
    for pragma in PRAGMAS:
        _set_pragma(cursor, pragma)
    cursor.close()


def _set_pragma(cursor: Any, pragma: str) -> None:
    # Turning a new database to WAL does not wait for another process that is doing the same.
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute(f"PRAGMA {pragma}")
            return
        except sqlite3.OperationalError as error:
            if (error.sqlite_errorcode & 0xFF) != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
