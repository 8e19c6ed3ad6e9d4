# SPDX-License-Identifier: Apache-2.0
"""What is said to PostgreSQL, and what it answers: addresses, connections that never hang, and what failures mean.

Invariant: a password is in no message and no repr of ours. Every wait for the server has an end, also where it takes
bytes and never answers. A forked child neither uses its parent's connections nor says goodbye on them: psycopg leaves
a connection alone that another process made, and so do we.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeAlias, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from .errors import InvalidInput, StoreUnavailable

T = TypeVar("T")

SCHEMES: Final = ("postgresql://", "postgres://", "postgresql+psycopg://")

CONNECT_SECONDS: Final = 3
"""For one address of a server; ``connect_timeout`` in the URL is another number."""

PING_SECONDS: Final = 3.0
"""How long an idle connection may take to answer before another is made in its place."""

LOCK_SECONDS: Final = 5.0
"""How long a writer waits for another one."""

STATEMENT_SECONDS: Final = 10.0
SILENCE_SECONDS: Final = 12.0
"""How long a server may be silent in the middle of a statement, which it should have ended by itself before that."""

FORGOTTEN_SECONDS: Final = 30.0
"""After so long the server ends a transaction whose process was stopped in the middle, and holds up all others."""

_THIS_MACHINE: Final = ("localhost", "127.0.0.1", "::1")

# Where the network is gone without a word: ask after 2 s of silence, give up after 6.
_NETWORK: Final = {
    "connect_timeout": str(CONNECT_SECONDS),
    "keepalives_idle": "2",
    "keepalives_interval": "1",
    "keepalives_count": "4",
    "tcp_user_timeout": "6000",
}

# One round trip. What a server does not know at all it does not have to be told: 'off' and 'local' are the two
# settings of PostgreSQL by which a commit is acknowledged before it is as durable as the operator configured.
_SETTINGS: Final = f"""
SELECT set_config('statement_timeout', '{STATEMENT_SECONDS * 1000:.0f}', false),
       set_config('lock_timeout', '{LOCK_SECONDS * 1000:.0f}', false),
       set_config('idle_in_transaction_session_timeout', '{FORGOTTEN_SECONDS * 1000:.0f}', false),
       CASE WHEN current_setting('synchronous_commit', true) IN ('off', 'local')
            THEN set_config('synchronous_commit', 'on', false) END
"""

# By SQLSTATE, or its class (postgresql.org/docs/current/errcodes-appendix.html).
_ADVICE: Final = {
    "40": ("another process wrote at the same moment; nothing was changed, try again", True),
    "55P03": ("another process is writing for long; nothing was changed, try again", True),
    "57014": ("the database took too long; nothing was changed, try again", True),
    "25P03": ("this process stood still in the middle of a change; nothing was changed, try again", True),
    "25006": ("the database only reads: it is a standby, or being switched over; try again", True),
    "57P": ("the database is stopping or starting; try again", True),
    "08": ("the connection to the database was lost; try again", True),
    "53100": ("the database's disk is full; nothing was changed, make room and try again", True),
    "53": ("the database has no connection or memory to spare; try again, or raise its limits", True),
    "58": ("the database's disk failed; nothing was changed, check it and try again", True),
    "28": ("the database refuses this user or its password; correct them in the URL", False),
    "3D000": ("there is no database of that name, or no such user; make it, or correct the URL", False),
    "42501": ("this user may not do that in the database; GRANT it what 'openkcm init' needs", False),
    "42P01": ("the database has no vault's tables, or not all; make the vault with 'openkcm init'", False),
    "3F000": ("the database has no schema to make tables in; see its search_path", False),
    "XX": ("the database is damaged; restore it from a backup", False),
}
_LOST: Final = ("the database does not answer; check that it runs and can be reached, and try again", True)
_ODD: Final = ("the database does not answer as it should", True)

Advice: TypeAlias = "Mapping[str, tuple[str, bool]]"
"""By SQLSTATE, its class, or nothing for what the driver could not read: what to do, and whether to try again."""
# A server that refuses a connection gives no code to the client, only text.
_REFUSALS: Final = (
    (("authentication failed", "no password supplied", "pg_hba.conf", "role "), _ADVICE["28"]),
    (("does not exist",), _ADVICE["3D000"]),
    (
        ("certificate", "SSL", "ssl"),
        ("the database's TLS is not what the URL asks for; see its sslmode and sslrootcert", False),
    ),
    (("too many clients", "remaining connection slots"), _ADVICE["53"]),
    (("starting up", "shutting down", "recovery"), _ADVICE["57P"]),
)


def store_error(error: BaseException, what: str, special: Advice = MappingProxyType({})) -> StoreUnavailable:
    """Translate a database failure into one error that says what to do.

    Args:
        error: the driver's, or SQLAlchemy's around it. No word of it is passed on.
        what: names the database.
        special: advice that goes before the common one.
    """
    advice, retryable = _advice(getattr(error, "orig", error), special)
    return StoreUnavailable(f"{what}: {advice}", retryable=retryable)


def _advice(error: object, special: Advice = MappingProxyType({})) -> tuple[str, bool]:
    state = getattr(error, "sqlstate", None)
    if state is not None:
        keys = (state, state[:3], state[:2])
        found = next((table[key] for table in (special, _ADVICE) for key in keys if key in table), None)
        return found or (f"the database failed with SQLSTATE {state}; see its log", True)
    if isinstance(error, psycopg.OperationalError):
        text = str(error)  # looked into, never passed on
        refused = (advice for words, advice in _REFUSALS if any(word in text for word in words))
        return next(refused, _LOST)
    return special.get("", _ODD)


def is_conflict(error: BaseException) -> bool:
    """Whether the database says that two transactions were in each other's way, and that one should begin again."""
    return getattr(getattr(error, "orig", error), "sqlstate", None) in {"40001", "40P01"}


def is_lost(error: BaseException) -> bool:
    """Whether the server did not answer, or not any more."""
    return _advice(getattr(error, "orig", error)) is _LOST


class Address:
    """Where a database is and how to log in, as libpq's URL says it; prints without the password.

    ``place`` names it for people. ``listen`` is our own parameter of the URL, ``listen=off``: whether the database
    can tell what other processes do (LISTEN), which some that speak PostgreSQL's protocol cannot. The server knows us
    as ``application``.

    Raises:
        InvalidInput: the URL is not one of a PostgreSQL database.
    """

    def __init__(self, url: str, application: str = "openkcm") -> None:
        for scheme in SCHEMES:
            if url.startswith(scheme):
                url = f"postgresql://{url.removeprefix(scheme)}"
        self.listen, url = _take_listen(url)
        parsed = _parse(url)
        if parsed is None:  # outside the driver's error, whose message has the URL in it
            raise InvalidInput(
                "not a URL of a PostgreSQL database, as postgresql://USER:PASSWORD@HOST:PORT/DATABASE; percent-encode "
                "what is special in the password, and see libpq's documentation for its parameters"
            )
        if not parsed.get("dbname"):
            raise InvalidInput("name the database: postgresql://USER@HOST:PORT/DATABASE")
        self._parameters = _Hidden(
            _NETWORK
            | {"application_name": application}
            | {name: str(value) for name, value in parsed.items()}
        )
        user, port = parsed.get("user"), parsed.get("port")
        self.place = (
            f"postgresql://{f'{user}@' if user else ''}{parsed.get('host', '')}{f':{port}' if port else ''}"
            f"/{parsed['dbname']}"
        )

    @property
    def weakness(self) -> str:
        """What is weak about the connection, or nothing: it is TLS with the server verified, or stays on this machine.

        What passes is wrapped keys and the audit record; whoever answers in the server's place could undo a kill.
        """
        hosts = self._parameters["host"].split(",") + self._parameters["hostaddr"].split(",")
        if all(not host or host.startswith(("/", "@")) or host in _THIS_MACHINE for host in hosts):
            return ""
        mode = self._parameters["sslmode"] or os.environ.get("PGSSLMODE", "prefer")
        return "" if mode == "verify-full" else f"the server is not verified (sslmode={mode})"

    def __repr__(self) -> str:
        return f"<Address {self.place}>"

    def connect(self, *, autocommit: bool = False) -> BoundedConnection:
        """A new connection, set up; raises psycopg's errors."""
        connection = BoundedConnection.connect(self._parameters.conninfo(), autocommit=autocommit)
        try:
            connection.execute(_SETTINGS)
            if not autocommit:
                connection.commit()
        except BaseException:
            connection.close()
            raise
        return connection


class _Hidden:
    """Parameters that no repr shows."""

    def __init__(self, parameters: dict[str, str]) -> None:
        self._parameters = parameters

    def __repr__(self) -> str:
        return "<redacted>"

    def __getitem__(self, name: str) -> str:
        return self._parameters.get(name, "")

    def conninfo(self) -> str:
        return make_conninfo("", **self._parameters)


def _parse(url: str) -> dict[str, Any] | None:
    try:
        return conninfo_to_dict(url)
    except psycopg.Error:
        return None


def _take_listen(url: str) -> tuple[bool, str]:
    base, mark, query = url.partition("?")
    kept = [each for each in query.split("&") if not each.startswith("listen=")]
    listen = [each.removeprefix("listen=") for each in query.split("&") if each.startswith("listen=")]
    if not set(listen) <= {"on", "off"} or len(listen) > 1:
        raise InvalidInput("listen is on or off")
    return listen != ["off"], f"{base}{mark if any(kept) else ''}{'&'.join(kept)}"


class Silent(psycopg.OperationalError):
    """The server did not answer in time."""


class BoundedConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection whose server may be silent for ``patience`` seconds; then it is closed and counts as lost."""

    patience: float = PING_SECONDS

    def wait(self, gen: Generator[Any, Any, T], *arguments: Any, **options: Any) -> T:
        """As psycopg's, which every statement goes through, and with an end."""
        return super().wait(self._bounded(gen), *arguments, **options)

    def _bounded(self, gen: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        # psycopg's own waiting sends what the socket is ready for, or nothing (0) each tenth of a second.
        heard = time.monotonic()
        try:
            ready = yield next(gen)
            while True:
                now = time.monotonic()
                if ready:
                    heard = now
                elif now - heard > self.patience:
                    self.pgconn.finish()
                    raise Silent("the server is silent")
                ready = yield gen.send(ready)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
