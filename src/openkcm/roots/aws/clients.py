# SPDX-License-Identifier: Apache-2.0
"""Clients of AWS KMS: one for all roots that are reached the same way, made under a lock, never shared with a child.

Invariant: a client makes one attempt a call and is used only in the process that made it. Roots share a client when
region, role, external id and the AWS environment agree, so a thousand tenants in one region cost one SDK session
(10 MB each) and one pool of connections. While a call of ours runs, the SDK's debug records of this thread are dropped:
they hold session tokens, the credentials that a role gives, and what was unwrapped.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urlsplit

from ...errors import RootMisconfigured
from ..base import ANSWER_SECONDS, CONNECT_SECONDS
from .uri import AWSURI

SESSION_NAME: Final = "openkcm"
"""Names our sessions of a customer's role in their CloudTrail."""

MAX_IDLE_CONNECTIONS: Final = 128
MAX_ANSWER_BYTES: Final = 64 * 1024

# Loggers of botocore whose debug records hold requests, answers or credentials.
_TALKATIVE: Final = (
    "botocore.auth",
    "botocore.credentials",
    "botocore.endpoint",
    "botocore.httpsession",
    "botocore.parsers",
    "botocore.retryhandler",
    "botocore.tokens",
    "botocore.utils",
)
_ENVIRONMENT: Final = ("REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")

_lock = threading.RLock()
_connections: weakref.WeakValueDictionary[tuple[Any, ...], Connection] = weakref.WeakValueDictionary()
_sessions: weakref.WeakValueDictionary[tuple[Any, ...], Any] = weakref.WeakValueDictionary()
_inherited: list[Any] = []
_loader: Any = None
_calling = threading.local()


class Connection:
    """A KMS client with its sessions: ``session`` signs its calls, ``base`` holds the credentials we started from."""

    def __init__(self, client: Any, session: Any, base: Any) -> None:
        self.client = client
        self.session = session
        self.base = base
        self.process = os.getpid()
        self.stale = False
        weakref.finalize(self, _close, client, self.process).atexit = False

    def __repr__(self) -> str:
        return f"<Connection to {self.host}>"

    @property
    def usable(self) -> bool:
        """Whether this process made it and its credentials have not been found wanting."""
        return not self.stale and self.process == os.getpid()

    @property
    def host(self) -> str:
        """The host that is asked."""
        return urlsplit(str(self.client.meta.endpoint_url)).hostname or "?"

    @property
    def plain(self) -> bool:
        """Whether the endpoint is spoken to without TLS."""
        return not str(self.client.meta.endpoint_url).startswith("https:")

    def discard(self) -> None:
        """Have the next call read the configuration and the credentials anew."""
        self.stale = True
        with _lock:
            for place in [place for place, session in _sessions.items() if session is self.base]:
                del _sessions[place]

    def sts(self) -> Any:
        """A client of AWS STS with the credentials that we started from; to be closed."""
        with _lock:
            return self.base.create_client("sts")

    def lasting_key(self) -> bool:
        """Whether the credentials that we started from are an access key without an end."""
        credentials = self.base.get_credentials()
        return credentials is not None and credentials.get_frozen_credentials().token is None


def connect(uri: AWSURI) -> Connection:
    """The client for a root, made if there is none.

    Raises:
        RootMisconfigured: the SDK is not installed.
        botocore.exceptions.BotoCoreError: the AWS configuration is wrong.
    """
    place = (_environment(), uri.region, uri.role, uri.external_id)
    with _lock:
        known = _connections.get(place)
        if known is not None and known.usable:
            return known
        with quiet():
            made = _connect(uri, place)
        _connections[place] = made
        return made


def _connect(uri: AWSURI, place: tuple[Any, ...]) -> Connection:
    try:
        import botocore.session  # type: ignore[import-untyped]  # noqa: F401
    except ImportError:
        raise RootMisconfigured("aws-kms: roots need the extra: pip install 'openkcm[aws]'") from None
    base = _sessions.get(place[:2])
    if base is None or base.get_credentials() is None:
        base = _sessions[place[:2]] = _session(uri.region)
    session = base if uri.role is None else _session_of_role(uri, base)
    client = session.create_client("kms")
    client.meta.events.register("before-parse.kms", _check_whole)
    return Connection(client, session, base)


def _session(region: str) -> Any:
    """A session with the SDK's own search for credentials; its clients make one attempt, within our times."""
    global _loader
    import botocore.session
    from botocore.config import Config  # type: ignore[import-untyped]

    session = botocore.session.Session()
    if _loader is None:
        _loader = session.get_component("data_loader")
    session.register_component("data_loader", _loader)  # it caches the service models, which are large
    session.set_config_variable("region", region)
    session.set_default_client_config(
        Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=ANSWER_SECONDS,
            retries={"mode": "standard", "total_max_attempts": 1},
            max_pool_connections=MAX_IDLE_CONNECTIONS,
            user_agent_extra="openkcm",
        )
    )
    return session


def _session_of_role(uri: AWSURI, base: Any) -> Any:
    """A session whose credentials are a role's, assumed when first needed and again before they expire."""
    from botocore.credentials import (  # type: ignore[import-untyped]
        AssumeRoleCredentialFetcher,
        CredentialResolver,
        DeferredRefreshableCredentials,
    )
    from botocore.exceptions import NoCredentialsError  # type: ignore[import-untyped]

    source = base.get_credentials()
    if source is None:
        raise NoCredentialsError
    more = {} if uri.external_id is None else {"ExternalId": uri.external_id}
    fetcher = AssumeRoleCredentialFetcher(
        client_creator=_locked_creator(base),
        source_credentials=source,
        role_arn=uri.role,
        extra_args={"RoleSessionName": SESSION_NAME, **more},
    )

    class Role:
        METHOD = "assume-role"
        CANONICAL_NAME = None

        def load(self) -> Any:
            return DeferredRefreshableCredentials(fetcher.fetch_credentials, self.METHOD)

    session = _session(uri.region)
    session.register_component("credential_provider", CredentialResolver([Role()]))
    return session


def _locked_creator(session: Any) -> Any:
    def create(service: str, **options: Any) -> Any:
        with _lock:  # a session makes one client at a time
            return session.create_client(service, **options)

    return create


def _check_whole(response_dict: Mapping[str, Any], **_: Any) -> None:
    """Refuse an answer that was cut off, which the SDK would take for a short one, or is absurdly long."""
    from botocore.exceptions import IncompleteReadError

    body, length = response_dict["body"], response_dict["headers"].get("content-length")
    if length is not None and str(length).strip() != str(len(body)):
        raise IncompleteReadError(actual_bytes=len(body), expected_bytes=length)
    if len(body) > MAX_ANSWER_BYTES:
        raise ValueError("an answer too long for AWS KMS")


def _environment() -> int:
    """A digest of what the SDK reads from the environment, so that a change of it is a change of place."""
    return hash(
        tuple(
            sorted(
                (name, value)
                for name, value in os.environ.items()
                if name.startswith("AWS_") or name.upper() in _ENVIRONMENT
            )
        )
    )


# ---- logs --------------------------------------------------------------------------------------------------


class _NotOurs(logging.Filter):
    """Drops debug records of a thread that is inside a call of ours; an application's own use stays visible."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno > logging.DEBUG or not getattr(_calling, "depth", 0)


_not_ours = _NotOurs()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the SDK from logging secrets while this thread calls it."""
    for name in _TALKATIVE:
        logging.getLogger(name).addFilter(_not_ours)  # once: a filter that is there is not added again
    _calling.depth = getattr(_calling, "depth", 0) + 1
    try:
        yield
    finally:
        _calling.depth -= 1


# ---- ends --------------------------------------------------------------------------------------------------


def _close(client: Any, process: int) -> None:
    if process == os.getpid():  # in a child the connections are the parent's, and its locks may be held
        client.close()


def _after_fork_in_child() -> None:
    global _lock, _connections, _sessions, _loader
    _inherited.append((dict(_connections), dict(_sessions)))
    _lock = threading.RLock()
    _connections, _sessions = weakref.WeakValueDictionary(), weakref.WeakValueDictionary()
    _loader = None


os.register_at_fork(after_in_child=_after_fork_in_child)
