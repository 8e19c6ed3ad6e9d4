# SPDX-License-Identifier: Apache-2.0
"""The Core's database: transactions, and what its failures mean, whichever database it is.

Invariant: a write transaction is durable when ``write`` returns, and nothing of it is there when it raises; only
where the connection breaks in the middle of the commit itself can that not be told, and the error then says so. Write
transactions are ordered: each sees all that those before it committed.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar, Final

import sqlalchemy as sql
from sqlalchemy.engine import Connection, make_url
from sqlalchemy.exc import SQLAlchemyError

from ..errors import ConfigurationError, CoreUnavailable, InvalidInput, StoreUnavailable
from . import schema

WHAT: Final = "the vault's store"


class Store(abc.ABC):
    """One process's connections to a vault's database; safe for threads and across fork."""

    implicit: ClassVar[bool]
    """Whether a vault is made where there is none, without being asked for by name."""

    def __init__(self) -> None:
        self._retired = False

    # ---- what differs between databases --------------------------------------------------------------

    @property
    @abc.abstractmethod
    def place(self) -> str:
        """Where the store is, for people; without a password."""

    @property
    @abc.abstractmethod
    def default_seal(self) -> Path | None:
        """Where the vault's seal file is if nobody says otherwise; None if it has to be said."""

    @property
    @abc.abstractmethod
    def default_key_store(self) -> Path | None:
        """Where an embedded Gateway keeps its named data keys if nobody says otherwise; None if it has to be said."""

    @abc.abstractmethod
    def exists(self) -> bool:
        """Whether a vault is there, or the beginning of one.

        Raises:
            StoreUnavailable: it cannot be told.
        """

    @abc.abstractmethod
    def check_place(self) -> None:
        """Raise StoreUnavailable if no vault can be made there."""

    @abc.abstractmethod
    def make_place(self) -> None:
        """Make what the first transaction needs, readable by its owner alone."""

    @abc.abstractmethod
    def read(self) -> AbstractContextManager[Connection]:
        """A consistent view of the store."""

    @abc.abstractmethod
    def write(self) -> AbstractContextManager[Connection]:
        """A transaction that alone may write; durable when the block ends, undone when it raises."""

    @abc.abstractmethod
    def data_version(self) -> int:
        """A number that changes when another connection, of any process, has committed."""

    @abc.abstractmethod
    def checkpoint(self) -> bool:
        """Do what the database can, so that what was deleted is not left in it. Never raises; False if it failed."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close every connection; the next use opens new ones."""

    @abc.abstractmethod
    def forget(self) -> None:
        """In a forked child: begin anew, leaving alone what belongs to the parent."""

    @abc.abstractmethod
    def _check_tables(self, tables: set[str]) -> None:
        """Raise StoreUnavailable if a vault may not be made beside these tables."""

    def _change_schema(self) -> AbstractContextManager[Connection]:
        """A transaction to make or change tables in, alone where there are any."""
        return self.write()

    @abc.abstractmethod
    def look(self) -> None:
        """Learn now what other processes committed, where ``data_version`` alone does not ask the database."""

    @abc.abstractmethod
    def weakness(self) -> str:
        """What is weak about the way to the database, or nothing."""

    @abc.abstractmethod
    def silence(self) -> float:
        """Seconds since the database last answered, where it is asked all the time; else 0."""

    @abc.abstractmethod
    def on_news(self, wake: Callable[[], None]) -> None:
        """Call ``wake`` when another process is seen to have committed, where that is noticed without looking."""

    # ---- what does not -------------------------------------------------------------------------------

    def migrate(self) -> None:
        """Bring an empty or older database to the newest schema.

        Raises:
            StoreUnavailable: the database was made by a newer version, or is no vault at all.
        """
        if self._is_current():
            return
        from .migrations import upgrade

        try:
            with self._change_schema() as connection:
                upgrade(connection, schema.HEAD)
        except Exception:
            # Where the database is empty there is nothing yet for two processes to lock: one wins, both are content.
            if not self._is_current():
                raise

    def _is_current(self) -> bool:
        with self.read() as connection:
            revision = self._revision(connection)
        if revision is not None and revision > schema.HEAD:
            raise StoreUnavailable(
                f"the vault's schema {revision} is newer than this build's {schema.HEAD}; use a newer OpenKCM",
                retryable=False,
            )
        return revision == schema.HEAD

    def _revision(self, connection: Connection) -> str | None:
        """The schema's revision, None if there is no vault."""
        tables = set(sql.inspect(connection).get_table_names())
        found = None
        if tables >= {"alembic_version", schema.vault.name, schema.tenants.name}:
            found = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
        if found is None:
            self._check_tables(tables)
            return None
        return str(found)

    def retire(self) -> None:
        """Close for good: later uses raise CoreUnavailable."""
        self._retired = True
        self.close()

    def _check_open(self) -> None:
        if self._retired:
            raise CoreUnavailable("this Core was closed", retryable=False)


def open_store(url: str, *, poll_interval: float = 0.25) -> Store:
    """The store at a URL; nothing is connected yet.

    Args:
        url: ``sqlite:///PATH`` or ``postgresql://...``.
        poll_interval: seconds between looks at what other processes committed, for a database that is asked for it.

    Raises:
        InvalidInput: not a URL, or of a database that this version does not run on.
        ConfigurationError: its driver is not installed.
    """
    try:
        name = make_url(url).get_backend_name() if not url.startswith("postgres://") else "postgresql"
    except (SQLAlchemyError, ValueError, AttributeError):
        raise InvalidInput("a store is a URL such as sqlite:///vault.db") from None
    if name == "sqlite":
        from .sqlite_store import SQLiteStore

        return SQLiteStore(url)
    if name != "postgresql":
        raise InvalidInput(
            f"this version keeps its store in SQLite (sqlite:///PATH) or PostgreSQL (postgresql://...), not in {name}"
        )
    try:
        from .postgres_store import PostgresStore
    except ImportError:
        raise ConfigurationError(
            "a vault in PostgreSQL needs psycopg: pip install 'openkcm[postgres]'"
        ) from None
    return PostgresStore(url, poll_interval=poll_interval)
