# SPDX-License-Identifier: Apache-2.0
"""The Core's database: engine, transactions, and what its failures mean.

Invariant: a write transaction is durable when ``write`` returns, and nothing of it is there when it raises.
SQLite runs in WAL mode with full syncs and overwrites what it deletes.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sql
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import DBAPIError, NoSuchModuleError, SQLAlchemyError

from ..errors import CoreUnavailable, InvalidInput, StoreUnavailable
from ..sqlite import BUSY_SECONDS, PRAGMAS, close_before_fork, store_error
from . import schema

logger = logging.getLogger("openkcm")

WHAT: Final = "the vault's store"


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
    """Check a store URL.

    Raises:
        InvalidInput: not a URL, or of a database that this version does not run on.
    """
    try:
        parsed = make_url(url)
        name = parsed.get_backend_name()
    except (SQLAlchemyError, NoSuchModuleError, ValueError):
        raise InvalidInput("a store is a URL such as sqlite:///vault.db") from None
    if name != "sqlite":
        raise InvalidInput(f"this version keeps its store in SQLite (sqlite:///PATH), not in {name}")
    if not parsed.database or parsed.database == ":memory:":
        raise InvalidInput("a vault is a file: sqlite:///PATH")
    return parsed


class Store:
    """One process's connections to a vault's database."""

    def __init__(self, url: str, *, busy_seconds: float = BUSY_SECONDS) -> None:
        self._url = parse_url(url)
        self.path = Path(str(self._url.database)).absolute()
        self._busy_seconds = busy_seconds
        self._engine: Engine | None = None
        self._observer: sqlite3.Connection | None = None
        self._observers = 0
        self._retired = False
        self._reset_locks()
        close_before_fork(self)

    def _reset_locks(self) -> None:
        self._observing = threading.Lock()
        self._gate = threading.Condition()
        self._inside = 0
        self._forking = False
        self._nested = threading.local()

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

    @property
    def engine(self) -> Engine:
        """The process's engine, made on first use."""
        self._check_open()
        if self._engine is None:
            engine = sql.create_engine(
                self._url.set(database=str(self.path)),
                connect_args={"timeout": self._busy_seconds, "check_same_thread": False},
            )
            sql.event.listen(engine, "connect", _configure)
            self._engine = engine
        return self._engine

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
                )
                self._observers += 1
            # The number is the connection's own: one from another connection must never look the same.
            return self._observers << 32 | int(self._observer.execute("PRAGMA data_version").fetchone()[0])

    def migrate(self) -> None:
        """Bring an empty or older database to the newest schema.

        Raises:
            StoreUnavailable: the database was made by a newer version, or is no vault at all.
        """
        with self.read() as connection:
            revision = _revision(connection)
        if revision == schema.HEAD:
            return
        if revision is not None and revision > schema.HEAD:
            raise StoreUnavailable(
                f"the vault's schema {revision} is newer than this build's {schema.HEAD}; use a newer OpenKCM",
                retryable=False,
            )
        from .migrations import upgrade

        with self.write() as connection:
            upgrade(connection, schema.HEAD)

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

    def retire(self) -> None:
        """Close for good: later uses raise CoreUnavailable."""
        self._retired = True
        self.close()

    def _check_open(self) -> None:
        if self._retired:
            raise CoreUnavailable("this Core was closed", retryable=False)

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


def _revision(connection: Connection) -> str | None:
    """The schema's revision, None for an empty database."""
    tables = set(sql.inspect(connection).get_table_names())
    if not tables:
        return None
    found = None
    if tables >= {"alembic_version", schema.vault.name, schema.tenants.name}:
        found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    if found is None:
        raise StoreUnavailable(
            f"{WHAT}: the database holds other tables than a vault's; check the path", retryable=False
        )
    return str(found)


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


def default_key_store(path: Path) -> Path:
    """Where an embedded Gateway keeps its named data keys: ``vault.keys.db`` beside ``vault.db``."""
    return path.with_name(f"{path.stem}.keys.db")
