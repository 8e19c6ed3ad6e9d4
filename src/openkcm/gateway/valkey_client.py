# SPDX-License-Identifier: Apache-2.0
"""Connections to Valkey or Redis, and what its failures mean.

Invariant: nothing waits longer than seconds. TLS is verified to the host, with no way to ask for less. No message of
ours has a word of the server's or of the URL in it.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

import valkey
from valkey.backoff import NoBackoff
from valkey.exceptions import (
    AuthenticationError,
    AuthenticationWrongNumberOfArgsError,
    BusyLoadingError,
    InvalidResponse,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)
from valkey.exceptions import ConnectionError as NoConnection
from valkey.exceptions import TimeoutError as NoAnswer
from valkey.retry import Retry

from ..errors import InvalidInput, StoreUnavailable
from .keystore import REPLACED, WHAT

CONNECT_SECONDS: Final = 4.0
ANSWER_SECONDS: Final = 10.0
FREE_SECONDS: Final = 10.0
"""How long a call waits for a connection that others use."""

IDLE_SECONDS: Final = 30
"""A connection that was idle for longer is tried before it is used."""

_PORT: Final = 6379
_TLS: Final = ("valkeys", "rediss")
_FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_FORM: Final = (
    "a Valkey key store is a URL such as valkey://user:password@host:6379/0 (valkeys:// for TLS, and then "
    "?ssl_ca_certs=FILE&ssl_certfile=FILE&ssl_keyfile=FILE where wanted)"
)


def connect(url: str, most: int) -> Callable[[], Any]:
    """What makes clients for a URL, each with a pool of its own; none connects before it is used.

    Raises:
        InvalidInput: the URL is of another form.
    """
    settings = _parse(url)

    def make() -> Any:
        pool: Any = valkey.BlockingConnectionPool(  # type: ignore[no-untyped-call]
            max_connections=most,
            timeout=FREE_SECONDS,
            socket_connect_timeout=CONNECT_SECONDS,
            socket_timeout=ANSWER_SECONDS,
            socket_keepalive=True,
            health_check_interval=IDLE_SECONDS,
            retry=Retry(NoBackoff(), 0),
            client_name="openkcm-gateway",
            lib_name=None,
            lib_version=None,
            **settings,
        )
        return valkey.Valkey(connection_pool=pool)

    return make


def _parse(url: str) -> dict[str, Any]:
    try:
        parsed = urlsplit(url)
        port = parsed.port
        settings: dict[str, Any] = dict(
            parse_qsl(parsed.query, keep_blank_values=True, strict_parsing=bool(parsed.query))
        )
    except ValueError:
        parsed = None
    if parsed is None or not parsed.hostname or parsed.fragment:
        raise InvalidInput(_FORM)
    tls, database = parsed.scheme in _TLS, parsed.path.removeprefix("/")
    if not set(settings) <= (set(_FILES) if tls else set()) or not (database == "" or _is_number(database)):
        raise InvalidInput(_FORM)
    settings.update(host=parsed.hostname, port=port or _PORT, db=int(database or 0))
    if parsed.username:
        settings["username"] = unquote(parsed.username)
    if parsed.password:
        settings["password"] = unquote(parsed.password)
    if tls:
        settings.update(
            connection_class=valkey.SSLConnection,
            ssl_cert_reqs="required",
            ssl_check_hostname=True,
            ssl_min_version=ssl.TLSVersion.TLSv1_2,
        )
    return settings


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5


# ---- what failures mean ---------------------------------------------------------------------------------------

_ADVICE: Final[tuple[tuple[type[Exception], str, bool], ...]] = (
    # Subclasses before what they derive from.
    (AuthenticationError, "the server refuses this login; check user and password", False),
    (AuthenticationWrongNumberOfArgsError, "the server refuses this login; it knows no users", False),
    (BusyLoadingError, "the server is starting; try again", True),
    (
        NoPermissionError,
        "this user lacks a right; allow it the commands and keys of docs/key-stores.md",
        False,
    ),
    (ReadOnlyError, "the server is a replica; connect to the primary", True),
    (OutOfMemoryError, "the server's memory is full; raise maxmemory and try again", True),
    (NoAnswer, "the server does not answer; try again", True),
    (TimeoutError, "the server does not answer; try again", True),
    (InvalidResponse, "what answers is no Valkey; check host and port", False),
)
# By the first word of the server's answer.
_ANSWERS: Final = {
    "OPENKCM": (REPLACED, False),
    "WRONGTYPE": (
        f"{WHAT}: something else is under its names; find who wrote it, or use another database",
        False,
    ),
    "MISCONF": (f"{WHAT}: the server cannot write to its disk; see its log", True),
    "NOREPLICAS": (f"{WHAT}: the server has too few replicas to take changes; try again", True),
    "BUSY": (f"{WHAT}: the server is busy with somebody's script; try again", True),
    "MASTERDOWN": (f"{WHAT}: the server has lost its primary; try again", True),
    "CLUSTERDOWN": (f"{WHAT}: the server's cluster is down; try again", True),
    "MOVED": (f"{WHAT}: the server has the keys on another node of its cluster; connect to that one", False),
    "NOAUTH": (f"{WHAT}: the server wants a login; put user and password into the URL", False),
}


def store_error(error: BaseException) -> StoreUnavailable:
    """Translate a failure into one error that says what to do."""
    for kind, advice, retryable in _ADVICE:
        if isinstance(error, kind):
            return StoreUnavailable(f"{WHAT}: {advice}", retryable=retryable)
    if isinstance(error, ResponseError):
        message, retryable = _answer(str(error))
        return StoreUnavailable(message, retryable=retryable)
    if isinstance(error, NoConnection) and isinstance(error.__context__, ssl.SSLError):
        return StoreUnavailable(
            f"{WHAT}: no TLS with the server; check ssl_ca_certs and its certificate", retryable=False
        )
    return StoreUnavailable(f"{WHAT}: the server does not answer, or takes no connections; try again")


def _answer(text: str) -> tuple[str, bool]:
    return _ANSWERS.get(
        text.partition(" ")[0],
        (f"{WHAT}: the server refuses what OpenKCM asks for; it must be Valkey, or Redis 6 or newer", False),
    )
