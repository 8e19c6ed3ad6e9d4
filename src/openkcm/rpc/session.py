# SPDX-License-Identifier: Apache-2.0
"""Sessions: how two ends agree on an inner channel, and the channels that are agreed on.

Invariant: both ends have the same session keys only if both saw the same exchange: the versions offered and chosen,
both ephemeral keys, the session's id and lifetime, and both certificates, each proved by a signature. A session belongs
to the certificate that made it and to no other, ends at a fixed moment whatever is done with it, and is wiped then.

There is no input or output here: the caller carries the messages. docs/formats.md, "The inner channel", has them byte
by byte.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from ..alive import Alive
from ..clock import awake_clock
from ..crypto import Channel, ChannelOffer, offer_channel, random_bytes
from ..errors import AccessDenied, ChannelExpired, DecryptError, InvalidInput
from ..limits import KEY_BYTES
from .credentials import REFUSED, Credentials, check_signature

__all__ = [
    "Answer",
    "ChannelHello",
    "ChannelReply",
    "Credentials",
    "Offer",
    "Session",
    "SessionTable",
    "answer",
    "begin",
    "finish",
]

LOWEST_VERSION: Final = 1
HIGHEST_VERSION: Final = 1
"""The versions of the protocol that this build speaks."""

SESSION_ID_BYTES: Final = 16
SESSION_SECONDS: Final = 600
"""How long a session lasts by default."""

MAX_SESSION_SECONDS: Final = 3600
MARGIN_SECONDS: Final = 30.0
"""By how much a client ends a session before the server does, or a tenth of its lifetime if that is less."""

MOST_SESSIONS: Final = 10_000
"""Sessions a server keeps: 192 bytes of secret memory each."""

MOST_SESSIONS_EACH: Final = 1_000
"""Sessions of one certificate; a fleet may share one."""

_MAX_VERSION: Final = 0xFFFF
_MAX_SIGNATURE_BYTES: Final = 1024  # RSA of 8192 bits

_HELLO: Final = b"openkcm/v1/channel/hello"
_SESSION: Final = b"openkcm/v1/channel/session"


# ---- messages ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChannelHello:
    """What a client says first: the versions it speaks, its ephemeral key, who it is, and its signature over these."""

    lowest_version: int
    highest_version: int
    public_key: bytes
    certificates: tuple[bytes, ...]
    signature: bytes


@dataclass(frozen=True, slots=True)
class ChannelReply:
    """What the server answers; its signature covers the whole exchange. ``lifetime`` is in seconds."""

    version: int
    session: bytes
    lifetime: int
    public_key: bytes
    certificates: tuple[bytes, ...]
    signature: bytes


class Answer(NamedTuple):
    """What the server has after a hello: the reply to send, the channel to keep, the client's certificate in DER."""

    reply: ChannelReply
    channel: Channel
    leaf: bytes


class Offer(NamedTuple):
    """What a client keeps between its hello and the reply."""

    credentials: Credentials
    key: ChannelOffer
    hello: ChannelHello
    begun: float
    clock: Callable[[], float]


def begin(
    credentials: Credentials, *, clock: Callable[[], float] = awake_clock
) -> tuple[Offer, ChannelHello]:
    """Make a client's hello, and what is needed to understand the reply.

    Raises:
        SecretMemoryError: no memory could be locked for the ephemeral key.
    """
    begun, key = clock(), offer_channel()
    signed = _hello_bytes(LOWEST_VERSION, HIGHEST_VERSION, key.public, credentials.leaf)
    hello = ChannelHello(
        LOWEST_VERSION, HIGHEST_VERSION, key.public, credentials.certificates, credentials.sign(signed)
    )
    return Offer(credentials, key, hello, begun, clock), hello


def answer(
    credentials: Credentials,
    hello: ChannelHello,
    leaf: bytes | None = None,
    *,
    lifetime: int = SESSION_SECONDS,
) -> Answer:
    """Agree with a client on a channel.

    Args:
        credentials: the server's.
        hello: what the client said; nothing of it is trusted.
        leaf: the client's certificate in DER as TLS verified it on this connection, which the hello must be of; None
            only where there is none, and then the hello's chain is verified.
        lifetime: of the session, in seconds.

    Raises:
        AccessDenied: the client is not who it should be.
        InvalidInput: it speaks no version of ours; or the lifetime is not 1 to 3600.
        SecretMemoryError: no memory could be locked for the session.
    """
    if not 1 <= lifetime <= MAX_SESSION_SECONDS:
        raise InvalidInput(f"a session lasts 1 to {MAX_SESSION_SECONDS} seconds, not {lifetime}")
    _check_hello(hello)
    client = credentials.check_client(hello.certificates, leaf)
    own = hello.certificates[0]
    check_signature(
        client,
        hello.signature,
        _hello_bytes(hello.lowest_version, hello.highest_version, hello.public_key, own),
    )
    version = min(hello.highest_version, HIGHEST_VERSION)
    if version < max(hello.lowest_version, LOWEST_VERSION):
        raise InvalidInput(
            f"the caller speaks versions {hello.lowest_version} to {hello.highest_version} of the protocol, this Core "
            f"{LOWEST_VERSION} to {HIGHEST_VERSION}; upgrade the older one"
        )
    key, session = offer_channel(), random_bytes(SESSION_ID_BYTES)
    try:
        transcript = _transcript(hello, version, key.public, session, lifetime, credentials.leaf)
        signature = credentials.sign(transcript)
        reply = ChannelReply(version, session, lifetime, key.public, credentials.certificates, signature)
        channel = key.agree(hello.public_key, transcript, False)
    except DecryptError:
        raise AccessDenied(REFUSED) from None
    finally:
        key.wipe()
    return Answer(reply, channel, own)


def finish(offer: Offer, reply: ChannelReply, server_name: str) -> Session:
    """Understand the server's reply; the offer is wiped, whatever the outcome.

    Args:
        offer: what ``begin`` gave; used once.
        reply: what the server said; nothing of it is trusted.
        server_name: the host name or IP address that the server's certificate must be for.

    Raises:
        AccessDenied: the server is not who it should be, or somebody altered the exchange.
        ConfigurationError: ``server_name`` can be no server's.
        SecretMemoryError: the offer was used before or belongs to the process before a fork, or no memory could be
            locked for the session.
    """
    try:
        _check_reply(offer.hello, reply)
        server = offer.credentials.check_server(reply.certificates, server_name)
        transcript = _transcript(
            offer.hello, reply.version, reply.public_key, reply.session, reply.lifetime, reply.certificates[0]
        )
        check_signature(server, reply.signature, transcript)
        channel = offer.key.agree(reply.public_key, transcript, True)
    except DecryptError:
        raise AccessDenied(REFUSED) from None
    finally:
        offer.key.wipe()
    lasts = reply.lifetime - min(MARGIN_SECONDS, reply.lifetime / 10)
    return Session(reply.session, channel, offer.begun + lasts, offer.clock)


def _check_hello(hello: ChannelHello) -> None:
    if not (
        1 <= hello.lowest_version <= hello.highest_version <= _MAX_VERSION
        and len(hello.public_key) == KEY_BYTES
        and len(hello.signature) <= _MAX_SIGNATURE_BYTES
    ):
        raise AccessDenied(REFUSED)


def _check_reply(hello: ChannelHello, reply: ChannelReply) -> None:
    if not (
        hello.lowest_version <= reply.version <= hello.highest_version
        and len(reply.session) == SESSION_ID_BYTES
        and 1 <= reply.lifetime <= MAX_SESSION_SECONDS
        and len(reply.public_key) == KEY_BYTES
        and len(reply.signature) <= _MAX_SIGNATURE_BYTES
    ):
        raise AccessDenied(REFUSED)


def _hello_bytes(lowest: int, highest: int, public_key: bytes, leaf: bytes) -> bytes:
    """What a client signs."""
    return _joined(_HELLO, _number(lowest), _number(highest), public_key, hashlib.sha256(leaf).digest())


def _transcript(
    hello: ChannelHello, version: int, public_key: bytes, session: bytes, lifetime: int, leaf: bytes
) -> bytes:
    """What a server signs, and both ends derive their keys from: everything that was said but the signatures."""
    return _joined(
        _SESSION,
        _number(hello.lowest_version),
        _number(hello.highest_version),
        _number(version),
        hello.public_key,
        public_key,
        session,
        _number(lifetime),
        hashlib.sha256(hello.certificates[0]).digest(),
        hashlib.sha256(leaf).digest(),
    )


def _number(value: int) -> bytes:
    return value.to_bytes(4, "big")


def _joined(*fields: bytes) -> bytes:
    """Each field behind its length (2), so that no two lists of fields give the same bytes."""
    return b"".join(len(field).to_bytes(2, "big") + field for field in fields)


# ---- sessions ------------------------------------------------------------------------------------------


class Session:
    """A client's session: ``session, channel = ...`` gives its id and its channel."""

    __slots__ = ("_clock", "channel", "id", "until")

    def __init__(self, session: bytes, channel: Channel, until: float, clock: Callable[[], float]) -> None:
        self.id = session
        self.channel = channel
        self.until = until
        self._clock = clock

    def __iter__(self) -> Iterator[Any]:
        return iter((self.id, self.channel))

    def __repr__(self) -> str:
        return f"<Session{'' if self.is_good() else ' over'}>"

    def is_good(self) -> bool:
        """Whether it may still be used: not past its end, not wiped, not the parent's."""
        return self._clock() < self.until and not self.channel.wiped


class _Kept(NamedTuple):
    channel: Channel
    leaf: bytes
    until: float


class SessionTable:
    """A server's sessions, by id.

    Args:
        lifetime: how long each lasts, in seconds.
        most: how many are kept; the oldest goes first.
        most_each: how many of one certificate are kept; its oldest goes first.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        lifetime: int = SESSION_SECONDS,
        *,
        most: int = MOST_SESSIONS,
        most_each: int = MOST_SESSIONS_EACH,
        clock: Callable[[], float] = awake_clock,
    ) -> None:
        self.lifetime = lifetime
        self._most = most
        self._most_each = most_each
        self._clock = clock
        self._after_fork()
        self._closed = False
        _tables.add(self)

    def _after_fork(self) -> None:
        """Start without sessions: secret memory is not inherited, and neither is the timer's thread."""
        self._lock = threading.Lock()
        self._kept: dict[bytes, _Kept] = {}
        self._own: dict[bytes, dict[bytes, None]] = {}
        self._timer: threading.Timer | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, session: bytes, channel: Channel, leaf: bytes) -> None:
        """Keep a session that was agreed on with the owner of a certificate (DER)."""
        now = self._clock()
        with self._lock:
            gone = self._take_expired(now)
            if self._closed:
                gone.append(channel)
            else:
                own = self._own.setdefault(leaf, {})
                while len(own) >= self._most_each:
                    gone.append(self._take(next(iter(own))))
                while len(self._kept) >= self._most:
                    gone.append(self._take(next(iter(self._kept))))
                self._own.setdefault(leaf, own)[session] = None
                self._kept[session] = _Kept(channel, leaf, now + self.lifetime)
                self._arm(now)
        _wipe(gone)

    def find(self, session: bytes, leaf: bytes) -> Channel:
        """The channel of a session.

        Args:
            session: its id, as a peer names it.
            leaf: the peer's certificate in DER, as TLS verified it.

        Raises:
            ChannelExpired: there is none, it is over, or it is another's: nothing tells these apart.
        """
        kept = self._kept.get(session)
        if kept is None or kept.leaf != leaf or self._clock() >= kept.until:
            raise ChannelExpired
        return kept.channel

    def drop(self, leaf: bytes) -> None:
        """End every session of a certificate (DER): it was revoked."""
        with self._lock:
            gone = [self._take(session) for session in list(self._own.get(leaf, ()))]
        _wipe(gone)

    def sweep(self) -> None:
        """Wipe what is over; a timer does so too."""
        with self._lock:
            gone = self._take_expired(self._clock())
        _wipe(gone)

    def close(self) -> None:
        """Wipe every session, and keep none from now on. Idempotent."""
        with self._lock:
            self._closed = True
            gone = [self._take(session) for session in list(self._kept)]
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        _wipe(gone)

    def _take(self, session: bytes) -> Channel:
        kept = self._kept.pop(session)
        own = self._own[kept.leaf]
        del own[session]
        if not own:
            del self._own[kept.leaf]
        return kept.channel

    def _take_expired(self, now: float) -> list[Channel]:
        """All last equally long, so that the oldest is over first."""
        gone = []
        while self._kept:
            session, kept = next(iter(self._kept.items()))
            if now < kept.until:
                break
            gone.append(self._take(session))
        return gone

    def _arm(self, now: float) -> None:
        """Have a timer wipe the oldest when it is over, where no new session comes to do it."""
        if self._timer is None and self._kept:
            until = next(iter(self._kept.values())).until
            timer = threading.Timer(max(until - now, 0.05), _ring, (weakref.ref(self),))
            timer.daemon = True
            # Where no thread can be had, the next new session wipes what is over; nobody finds it in the meantime.
            with contextlib.suppress(RuntimeError):
                timer.start()
                self._timer = timer

    def _rung(self) -> None:
        with self._lock:
            self._timer = None
            now = self._clock()
            gone = self._take_expired(now)
            if not self._closed:
                self._arm(now)
        _wipe(gone)


def _wipe(channels: list[Channel]) -> None:
    """Not under a table's lock: a wipe waits for the uses in flight."""
    for channel in channels:
        channel.wipe()


def _ring(table: weakref.ref[SessionTable]) -> None:
    """A timer must not keep a table alive that nobody has any more."""
    found = table()
    if found is not None:
        found._rung()


_tables: Final[Alive[SessionTable]] = Alive()


def _after_fork_in_child() -> None:
    for table in _tables.all():
        table._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
