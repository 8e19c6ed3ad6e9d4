# SPDX-License-Identifier: Apache-2.0
"""The Core's store in PostgreSQL, or in what speaks its protocol; several processes on several machines share it.

Invariant: that of ``store``. A reading is one snapshot (REPEATABLE READ, READ ONLY). A writing first locks the one row
of the table ``vault`` (SELECT ... FOR UPDATE), as SQLite locks its file, so that audit numbers and generations are
committed in their order. ``synchronous_commit`` is never weaker than ``on``. Every wait ends within seconds.

No query needs what distributed engines that speak PostgreSQL's protocol lack: no advisory and no table locks, no
triggers, sequences, temporary tables or server-side code, no DDL after the first migration but plain ALTER TABLE and
CREATE INDEX. LISTEN and NOTIFY are used where they are there; ``postgres_news`` polls behind them. Notifying comes
after the commit and outside of it, so that a commit neither waits for nor fails by it.

What differs from a file: deleted rows stay in the server's pages, its log and its backups until it reuses or drops
them. They are wrapped under the customer's root, which is what makes destroying them final.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import psycopg
import sqlalchemy as sql
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from ..errors import StoreUnavailable
from ..postgres import PING_SECONDS, SILENCE_SECONDS, Address, is_conflict, is_lost, store_error
from . import schema
from .postgres_news import CHANNEL, LAST_NUMBER, News
from .store import WHAT, Store

logger = logging.getLogger("openkcm")

POOL_SIZE: Final = 5
POOL_MOST: Final = 20
POOL_SECONDS: Final = 5.0
"""How long a thread waits for another one's connection, when all are in use."""

SLOW_SECONDS: Final = 1.0
AVOID_SECONDS: Final = 2.0
"""After a failure that took longer than the former nobody tries for the latter, so that not each thread waits for a
server that swallows what it is sent."""

_TRIES: Final = 4
_READ: Final = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
_WRITE: Final = {"isolation_level": "READ COMMITTED"}

_inherited: Final[list[object]] = []
"""What belongs to the parent of a forked process: kept, so that nothing is ever said on its connections."""


class PostgresStore(Store):
    """One process's connections to a vault's database.

    Args:
        url: ``postgresql://USER:PASSWORD@HOST:PORT/DATABASE`` with libpq's parameters (sslmode, sslrootcert, ...), and
            ``listen=off`` to do without LISTEN.
        poll_interval: seconds between looks at what other processes committed.
    """

    implicit = False
    default_seal = None
    default_key_store = None

    def __init__(self, url: str, *, poll_interval: float = 0.25) -> None:
        super().__init__()
        self._address = Address(url)
        self._interval = poll_interval
        self._wake: Callable[[], None] | None = None
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._engine: Engine | None = None
        self._making = threading.Lock()
        self._avoid = 0.0
        self._news = News(self._address, self._interval)
        if self._wake is not None:
            self._news.wake(self._wake)

    @property
    def place(self) -> str:
        """User, host and database."""
        return self._address.place

    # ---- transactions --------------------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        """The process's engine, made on first use."""
        self._check_open()
        with self._making:
            if self._engine is None:
                engine = sql.create_engine(
                    "postgresql+psycopg://",
                    creator=self._address.connect,
                    pool_size=POOL_SIZE,
                    max_overflow=POOL_MOST - POOL_SIZE,
                    pool_timeout=POOL_SECONDS,
                    pool_pre_ping=True,
                    pool_use_lifo=True,
                    hide_parameters=True,
                )
                sql.event.listen(engine, "checkout", _patient)
                sql.event.listen(engine, "checkin", _impatient)
                self._engine = engine
                # A store that nobody holds any more, and that nobody closed, keeps no connections open either.
                weakref.finalize(self, _dispose, engine, os.getpid())
            return self._engine

    @contextmanager
    def _use(self) -> Iterator[None]:
        """Say what failures of the database mean; and spare others the wait for one that does not answer."""
        started = time.monotonic()
        if started < self._avoid:
            raise StoreUnavailable(f"{WHAT}: the database did not answer a moment ago; try again")
        try:
            yield
        except IntegrityError:
            raise
        except (DBAPIError, psycopg.Error) as error:
            if is_lost(error) and time.monotonic() - started > SLOW_SECONDS:
                self._avoid = time.monotonic() + AVOID_SECONDS
            raise store_error(error, WHAT) from None
        except PoolTimeout:
            raise StoreUnavailable(f"{WHAT}: every connection to the database is in use; try again") from None
        except SQLAlchemyError as error:
            raise StoreUnavailable(f"{WHAT}: unexpected {type(error).__name__}", retryable=False) from None
        self._news.heard = max(self._news.heard, self._news.clock())

    @contextmanager
    def _transaction(self, options: dict[str, Any]) -> Iterator[Connection]:
        """A transaction that is rolled back unless the block commits."""
        connection = self.engine.connect()
        try:
            yield connection.execution_options(**options)
        finally:
            if os.getpid() == self._process:
                connection.close()
            else:
                _inherited.append(connection)  # the block forked, and this is the child

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view of the store."""
        with self._use(), self._transaction(_READ) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that alone may write; durable when the block ends, undone when it raises."""
        with self._use(), self._transaction(_WRITE) as connection:
            _lock(connection)
            yield connection
            self._commit(connection)

    @contextmanager
    def _change_schema(self) -> Iterator[Connection]:
        with self._use(), self._transaction(_WRITE) as connection:
            if sql.inspect(connection).has_table(schema.vault.name):
                _lock(connection)
            yield connection
            self._commit(connection)

    def _commit(self, connection: Connection) -> None:
        try:
            connection.commit()
        except DBAPIError as error:
            if not is_lost(error):
                raise
            raise StoreUnavailable(
                f"{WHAT}: the connection was lost in the middle of the commit, so that it is not known whether the "
                "change was made; look ('openkcm status'), and repeat it if it was not"
            ) from None
        self._news.moved()
        if self._news.listening:
            self._notify(connection)

    def _notify(self, connection: Connection) -> None:
        """Tell other processes to look, if that can be; they look by themselves in any case."""
        try:
            link = connection.connection.driver_connection
            assert isinstance(link, psycopg.Connection)
            link.autocommit = True
            try:
                link.execute("SELECT pg_notify(%s, %s)", (CHANNEL, self._news.token))
            finally:
                link.autocommit = False
        except (psycopg.Error, SQLAlchemyError) as error:
            logger.debug("no notification was sent: %s", type(error).__name__)

    # ---- what others did -----------------------------------------------------------------------------

    def data_version(self) -> int:
        """A number that moves with every commit of this process, and soon after another's; asks nobody."""
        self._check_open()
        return self._news.current(self._last_number)

    def look(self) -> None:
        """Ask the database now whether another process has committed."""
        self._news.note(self._last_number())

    def _last_number(self) -> int:
        with self.read() as connection:
            return int(connection.exec_driver_sql(LAST_NUMBER).scalar() or 0)

    def weakness(self) -> str:
        """Whether others could read what passes, or answer in the server's place."""
        return self._address.weakness

    def silence(self) -> float:
        """Seconds since the database last answered."""
        return self._news.clock() - self._news.heard

    def on_news(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` when another process has committed."""
        self._wake = wake
        self._news.wake(wake)

    # ---- making a vault ------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether the database holds a vault."""
        with self.read() as connection:
            if self._revision(connection) is None:
                return False
            return connection.execute(sql.select(schema.vault.c.vault_id)).first() is not None

    def check_place(self) -> None:
        """Raise StoreUnavailable if the database cannot be used."""
        with self.read() as connection:
            self._revision(connection)

    def make_place(self) -> None:
        """Nothing: whoever made the database says who may read it."""

    def _check_tables(self, tables: set[str]) -> None:
        # Others may be there, of an extension or of a Gateway's key store, as long as none would be taken for ours.
        if tables & {"alembic_version", *schema.metadata.tables}:
            raise StoreUnavailable(
                f"{WHAT}: the database holds tables of somebody else with the names of a vault's; make a database for "
                "the vault alone",
                retryable=False,
            )

    def checkpoint(self) -> bool:
        """Nothing: when deleted rows are overwritten is the server's own affair (VACUUM, its log, its backups)."""
        return True

    # ---- its life ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close every connection; the next use opens new ones."""
        self._news.stop()
        with self._making:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.dispose()
        if not self._retired:
            self._begin()

    def forget(self) -> None:
        """In a forked child: new connections, the parent's being left alone."""
        _inherited.extend([self._engine, self._news])
        self._begin()


def _dispose(engine: Engine, process: int) -> None:
    if os.getpid() == process:  # and not in a forked child
        engine.dispose()


def _lock(connection: Connection) -> None:
    """Wait for other writers; again where the database wants the transaction begun anew, nothing being done yet."""
    query = sql.select(schema.vault.c.vault_id).with_for_update()
    for left in reversed(range(_TRIES)):
        try:
            connection.execute(query).all()
            return
        except DBAPIError as error:
            if not is_conflict(error) or not left:
                raise
            connection.rollback()


def _patient(link: Any, record: Any, proxy: Any) -> None:
    link.patience = SILENCE_SECONDS


def _impatient(link: Any, record: Any) -> None:
    if link is not None:
        link.patience = PING_SECONDS
