# SPDX-License-Identifier: Apache-2.0
"""A Core somewhere else: what ``openkcm.connect`` gives, and a Gateway holds in a Core's place.

Invariant: a data key leaves this process only sealed under a session that the native layers agreed on; an answer counts
only if it is the answer to the very question; and what does not come in time is an outage (CoreUnavailable), never a
wrong key. Every call of the data interface may be made twice without harm, so that a call which an address did not
answer is made at the next, within one deadline; what the Core refused is not asked again, save with a new certificate.
Keys that were opened before a tenant went dark are not handed out after it. After a fork the child connects anew.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, TypeVar

from google.protobuf.message import Message

from ...alive import Alive
from ...clock import DICE, awake_clock
from ...crypto import SecretKeys, open_keys, random_bytes, seal_keys
from ...errors import (
    AccessDenied,
    ChannelExpired,
    CoreUnavailable,
    DecryptError,
    FormatError,
    InvalidInput,
    OpenKCMError,
    RootUnavailable,
    SecretMemoryError,
    StoreUnavailable,
    Unavailable,
)
from ...keys import Change, Event, Kind, OpenedKeys, Service, WrappedKeys, check_name
from ...limits import KEY_ID_BYTES, MAX_KEYS_PER_CALL, SERVICE_ID_BYTES
from ...waiting import THREADS, Waiting
from .. import keys_pb2 as pb
from .. import wire
from ..session import Session
from ..transport import Connector
from .endpoint import Endpoint, Endpoints
from .joining import Joined
from .listener import Watcher
from .own import OwnFiles

logger = logging.getLogger("openkcm.rpc")

M = TypeVar("M", bound=Message)

DEADLINE_SECONDS: Final = 5.0
"""For how long an answer is waited for, all addresses taken together."""

ROUNDS: Final = 2
"""How often every address is asked: a connection that was cut is made again by the second time."""

PAUSE_SECONDS: Final = 0.1
"""Between rounds, at most; from half of it up."""

STALE_SECONDS: Final = 0.75
"""How old opened keys may be where the watch stream is not heard, since nothing else would tell of a kill."""

FIRST_WORD_SECONDS: Final = 0.5
"""How long the first call waits for the watch stream, so that no kill falls between the two."""

Ask = Callable[[Endpoint, Session, float], Any]
"""Makes a call in a session; of use until a moment of ``time.monotonic``."""


class RemoteCore:
    """A Core that is reached over the network; made by ``openkcm.connect``. Safe for threads and across ``fork``.

    Args:
        addresses: of one Core or of its replicas, in the order of preference.
        connector: makes the transport to an address.
        own: this Gateway's certificate and key.
        server_name: what the Core's certificate must be for; by default each address's host.
        deadline: seconds for which an answer is waited for.
        waiting: how callers wait; the connector's transports wait in the same way.
    """

    far: Final = True
    """Calls take long and may fail: a Gateway fetches what it can in advance, and keeps what it cannot deliver."""

    def __init__(
        self,
        addresses: Sequence[str],
        connector: Connector,
        own: OwnFiles,
        *,
        server_name: str | None = None,
        deadline: float = DEADLINE_SECONDS,
        waiting: Waiting = THREADS,
    ) -> None:
        if not deadline > 0:
            raise InvalidInput("a deadline is a number of seconds above zero")
        self._deadline = deadline
        self.waiting = waiting
        self._closed = False
        self._make: Callable[[], Endpoints] = lambda: Endpoints(
            [Endpoint(each, connector, own, server_name, waiting) for each in addresses], waiting
        )
        self._start()
        _instances.add(self)

    def _start(self) -> None:
        self._joined = Joined(self._unwrap, waiting=self.waiting)
        self._changes = 0
        self._endpoints = self._make()
        self._granted: dict[bytes, float] = {}
        self._tenants: set[str] = set()
        self._lock = threading.Lock()
        self._listeners: dict[int, Callable[[Event], None]] = {}
        self._next = 0
        self._watcher: Watcher | None = None
        self._unwatched = False

    def close(self) -> None:
        """Close every connection. Idempotent."""
        if self._closed:
            return
        self._closed = True
        watcher = self._watcher
        if watcher is not None:
            watcher.stop()
        self._endpoints.close()

    def __enter__(self) -> RemoteCore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<RemoteCore {', '.join(self._endpoints.addresses)}{' closed' if self._closed else ''}>"

    # ---- what a Gateway needs (keys.FarKeyService) ---------------------------------------------------

    def find_service(self, tenant: str, name: str) -> Service:
        """As ``Core.find_service``."""
        request = pb.FindServiceRequest(
            tenant=check_name(tenant, "tenant"), service=check_name(name, "service")
        )
        reply = self._call("FindService", request, pb.FindServiceReply.FromString)
        if len(reply.service_id) != SERVICE_ID_BYTES:
            raise FormatError("the Core's answer has no service id")
        self._tenants.add(tenant)
        return Service(tenant, check_name(reply.region, "region"), name, reply.service_id)

    def wrap_keys(self, service: Service, keys: SecretKeys, kind: Kind, ids: bytes = b"") -> WrappedKeys:
        """As ``Core.wrap_keys``."""

        def ask(endpoint: Endpoint, session: Session, end: float) -> WrappedKeys:
            bound = wire.wrap_bound(session.id, service.service_id, kind, ids)
            request = pb.WrapKeysRequest(
                session=session.id,
                service=_name(service),
                kind=kind,
                ids=ids,
                sealed_keys=seal_keys(session.channel, keys, *bound),
            )
            data = endpoint.call("WrapKeys", request.SerializeToString(), end)
            reply = wire.parse(pb.WrapKeysReply.FromString, data)
            wrapped = wire.wrapped_of(kind, reply.version, reply.wrapped, ids)
            if len(wrapped) != len(keys):
                raise FormatError("the Core answered with another number of keys")
            return wrapped

        wrapped: WrappedKeys = self._in_session(ask, time.monotonic() + self._deadline)
        return wrapped

    def unwrap_keys(self, service: Service, wrapped: WrappedKeys) -> OpenedKeys:
        """As ``Core.unwrap_keys``; the lease is 0 while the watch stream is not heard."""
        end = time.monotonic() + self._deadline
        if len(wrapped) == 1:
            return self._joined.unwrap(service, wrapped, end)
        return self._unwrap(service, wrapped, end)

    def _unwrap(self, service: Service, wrapped: WrappedKeys, end: float) -> OpenedKeys:
        def ask(endpoint: Endpoint, session: Session, end: float) -> tuple[Any, ...]:
            nonce, listened = random_bytes(wire.NONCE_BYTES), endpoint is self._endpoints.heard
            request = pb.UnwrapKeysRequest(
                session=session.id,
                nonce=nonce,
                service=_name(service),
                kind=wrapped.kind,
                version=wrapped.version,
                wrapped=wrapped.wrapped,
                ids=wrapped.ids,
            )
            data = endpoint.call("UnwrapKeys", request.SerializeToString(), end)
            reply = wire.parse(pb.UnwrapKeysReply.FromString, data)
            bound = wire.unwrap_bound(session.id, nonce, service.service_id, wrapped)
            keys = _opened(session.channel, reply.sealed_keys, bound, len(wrapped))
            failures = wire.unpack_failures(reply.failures, len(wrapped)) if reply.failures else {}
            # A replica that is behind may open a key after the one that is listened to has told of the tenant's end.
            # Nobody would tell of it a second time, so that such a key must not be kept.
            return keys, failures, reply.lease if listened and endpoint is self._endpoints.heard else 0.0

        while True:
            changes, asked = self._changes, awake_clock()
            keys, failures, granted = self._in_session(ask, end)
            heard = self._heard()
            if changes == self._changes and (heard or awake_clock() - asked < STALE_SECONDS):
                break
            # A tenant may have gone dark since the Core said this: it has to say it again.
            keys.wipe()
            if time.monotonic() >= end:
                raise CoreUnavailable("the Core's answers come too late to be relied on")
        self._granted[service.service_id] = granted
        return keys, failures, granted if granted and heard else 0.0

    def lease(self, service: Service) -> float:
        """As ``Core.lease``, from what the Core last said, and 0 unless the watch stream was heard just now."""
        return self._granted.get(service.service_id, 0.0) if self._heard() else 0.0

    def in_touch(self, opened: float) -> bool:
        """As ``FarKeyService.in_touch``."""
        return self._heard() or awake_clock() - opened < STALE_SECONDS

    def rewrap_keys(
        self, service: Service, wrapped: WrappedKeys
    ) -> tuple[WrappedKeys, Mapping[int, OpenKCMError]]:
        """As ``Core.rewrap_keys``."""
        request = pb.RewrapKeysRequest(
            service=_name(service),
            kind=wrapped.kind,
            version=wrapped.version,
            wrapped=wrapped.wrapped,
            ids=wrapped.ids,
        )
        reply = self._call("RewrapKeys", request, pb.RewrapKeysReply.FromString)
        if len(reply.wrapped) != len(wrapped.wrapped):
            raise FormatError("the Core answered with another number of keys")
        moved = wire.wrapped_of(wrapped.kind, reply.version, reply.wrapped, wrapped.ids)
        return moved, wire.unpack_failures(reply.failures, len(wrapped))

    def shred_keys(self, service: Service, ids: bytes) -> None:
        """As ``Core.shred_keys``."""
        for part in _parts(ids):
            self._call(
                "ShredKeys",
                pb.ShredKeysRequest(service=_name(service), ids=part),
                pb.ShredKeysReply.FromString,
            )

    def shredded(self, service: Service, ids: bytes) -> frozenset[bytes]:
        """As ``Core.shredded``."""
        found: set[bytes] = set()
        for part in _parts(ids):
            request = pb.FindShreddedRequest(service=_name(service), ids=part)
            reply = self._call("FindShredded", request, pb.FindShreddedReply.FromString)
            found.update(reply.ids[at : at + KEY_ID_BYTES] for at in range(0, len(reply.ids), KEY_ID_BYTES))
        return frozenset(found)

    def watch(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """As ``Core.watch``."""
        self._check_open()
        with self._lock:
            self._next += 1
            number = self._next
            self._listeners[number] = listener

        def remove() -> None:
            self._listeners.pop(number, None)

        return remove

    # ---- inside --------------------------------------------------------------------------------------

    def _heard(self) -> bool:
        watcher = self._watcher
        return watcher is not None and watcher.is_heard()

    def _on_event(self, event: Event) -> None:
        """Pass a change on; one of no tenant is of every tenant."""
        if event.change is not Change.LIVE:
            self._granted.clear()
        if event.change is Change.DARK:
            self._changes += 1
        tenants = [event.tenant] if event.tenant else list(self._tenants)
        for tenant in tenants:
            told = Event(event.change, tenant, event.service_id, event.key_ids)
            for listener in list(self._listeners.values()):
                listener(told)

    def _check_open(self) -> None:
        if self._closed:
            raise CoreUnavailable("this Core was closed", retryable=False)

    def _call(self, method: str, request: Message, parse: Callable[[bytes], M]) -> M:
        data = request.SerializeToString()
        end = time.monotonic() + self._deadline
        return wire.parse(parse, self._ask(lambda endpoint, end: endpoint.call(method, data, end), end))

    def _in_session(self, ask: Ask, end: float) -> Any:
        return self._ask(lambda endpoint, end: _ask_in_session(ask, endpoint, end), end)

    def _ask(self, ask: Callable[[Endpoint, float], Any], end: float) -> Any:
        """Ask one address after the other until one answers or the time is up."""
        self._check_open()
        watcher = self._watcher
        if watcher is None or not watcher.spoken:
            self._watch_first()
        last: OpenKCMError | None = None
        for again in range(ROUNDS):
            if again and not self._pause(end):
                break
            endpoints = self._endpoints.in_order()
            for at, endpoint in enumerate(endpoints):
                now = time.monotonic()
                if now >= end:
                    break
                try:
                    # None may use up the time of those that come after it.
                    answer = _ask_renewed(ask, endpoint, now + (end - now) / (len(endpoints) - at))
                except CoreUnavailable as error:
                    self._check_open()
                    self._endpoints.failed(endpoint)
                    last = error
                    continue
                except (StoreUnavailable, RootUnavailable) as error:
                    # This replica lacks what another may still have open.
                    self._endpoints.answered(endpoint)
                    last = error
                    continue
                self._endpoints.answered(endpoint)
                return answer
            if not isinstance(last, CoreUnavailable):
                break
        raise last or CoreUnavailable("no Core answered in time")

    def _pause(self, end: float) -> bool:
        """Wait for a moment before asking again; False when there is no time left."""
        pause = PAUSE_SECONDS * DICE.uniform(0.5, 1.0)
        if time.monotonic() + pause >= end:
            return False
        self.waiting.sleep(pause)
        self._check_open()
        return True

    def _watch_first(self) -> None:
        """Begin to watch, with the first call that a Gateway makes; where that is slow or cannot be, go on without."""
        with self._lock:
            if not self._listeners:
                return
            if self._watcher is None:
                try:
                    self._watcher = Watcher(
                        self._endpoints, weakref.WeakMethod(self._on_event), self.waiting, self._unwatched
                    )
                except Unavailable as error:
                    # As out of touch: nothing is kept open. The next call tries again.
                    if not self._unwatched:
                        logger.warning("the Core is not listened to for now: %s", error)
                    self._unwatched = True
                    return
            watcher = self._watcher
        watcher.wait(min(FIRST_WORD_SECONDS, self._deadline / 4))

    def _after_fork(self) -> None:
        listeners, tenants = self._listeners, self._tenants
        self._endpoints.forget()
        self._start()
        self._listeners, self._tenants, self._next = listeners, tenants, max(listeners, default=0)


def _ask_renewed(ask: Callable[[Endpoint, float], Any], endpoint: Endpoint, end: float) -> Any:
    """Ask; once more where our certificate was refused, and there is another by now."""
    shown = endpoint.own.now()
    try:
        return ask(endpoint, end)
    except AccessDenied:
        if endpoint.own.look() is shown:
            raise
    return ask(endpoint, end)


def _ask_in_session(ask: Ask, endpoint: Endpoint, end: float) -> Any:
    """Ask; once more, in a new session, where the Core does not know the session any more."""
    session = endpoint.session(end)
    try:
        return ask(endpoint, session, end)
    except (ChannelExpired, SecretMemoryError) as error:
        if isinstance(error, SecretMemoryError) and not session.channel.wiped:
            raise
    endpoint.drop_session(session)
    return ask(endpoint, endpoint.session(end), end)


def _opened(channel: Any, sealed: bytes, bound: tuple[bytes, ...], count: int) -> SecretKeys:
    try:
        keys = open_keys(channel, sealed, *bound)
    except DecryptError:
        # Not the caller's record: what came is not the Core's answer to this question.
        raise CoreUnavailable(
            "what came is not the Core's answer; is somebody between it and here?"
        ) from None
    if len(keys) != count:
        keys.wipe()
        raise FormatError("the Core answered with another number of keys")
    return keys


def _name(service: Service) -> pb.ServiceName:
    return pb.ServiceName(tenant=service.tenant, service=service.name, service_id=service.service_id)


def _parts(ids: bytes) -> Sequence[bytes]:
    if len(ids) % KEY_ID_BYTES:
        raise InvalidInput("data key ids have 16 bytes each")
    step = MAX_KEYS_PER_CALL * KEY_ID_BYTES
    return [ids[at : at + step] for at in range(0, len(ids), step)]


_instances: Final[Alive[RemoteCore]] = Alive()


def _after_fork_in_child() -> None:
    for core in _instances.all():
        core._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
