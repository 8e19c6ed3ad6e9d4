# SPDX-License-Identifier: Apache-2.0
"""A Core somewhere else: what ``openkcm.connect`` gives, and a Gateway holds in a Core's place.

Invariant: a data key leaves this process only sealed under a session that the native layers agreed on; an answer counts
only if it is the answer to the very question; and what does not come in time is an outage (CoreUnavailable), never a
wrong key. Every call of the data interface may be made twice without harm, so that a call which an address did not
answer is made at the next, within one deadline. After a fork the child connects anew.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, TypeVar

from google.protobuf.message import Message

from ..crypto import SecretKeys, open_keys, random_bytes, seal_keys
from ..errors import (
    ChannelExpired,
    CoreUnavailable,
    DecryptError,
    FormatError,
    InvalidInput,
    OpenKCMError,
    SecretMemoryError,
)
from ..keys import Change, Event, Kind, OpenedKeys, Service, WrappedKeys, check_name
from ..limits import KEY_ID_BYTES, MAX_KEYS_PER_CALL, SERVICE_ID_BYTES
from . import keys_pb2 as pb
from . import wire
from .endpoint import Endpoint, Endpoints
from .listener import Watcher
from .session import Credentials
from .transport import Connector

M = TypeVar("M", bound=Message)

DEADLINE_SECONDS: Final = 5.0
"""For how long an answer is waited for, all addresses taken together."""


class RemoteCore:
    """A Core that is reached over the network; made by ``openkcm.connect``. Safe for threads and across ``fork``.

    Args:
        addresses: of one Core or of its replicas, in the order of preference.
        connector: makes the transport to an address.
        credentials: this Gateway's certificate and key, for the inner channel.
        server_name: what the Core's certificate must be for; by default each address's host.
        deadline: seconds for which an answer is waited for.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        connector: Connector,
        credentials: Credentials,
        *,
        server_name: str | None = None,
        deadline: float = DEADLINE_SECONDS,
    ) -> None:
        if not deadline > 0:
            raise InvalidInput("a deadline is a number of seconds above zero")
        self._deadline = deadline
        self._closed = False
        self._make = lambda: Endpoints(
            [Endpoint(each, connector, credentials, server_name) for each in addresses]
        )
        self._start()
        _instances.add(self)

    def _start(self) -> None:
        self._endpoints = self._make()
        self._granted: dict[bytes, float] = {}
        self._tenants: set[str] = set()
        self._lock = threading.Lock()
        self._listeners: dict[int, Callable[[Event], None]] = {}
        self._next = 0
        self._watcher: Watcher | None = None

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

    # ---- what a Gateway needs (keys.KeyService) ------------------------------------------------------

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

        def ask(endpoint: Endpoint, seconds: float) -> WrappedKeys:
            session, channel = endpoint.session(seconds)
            bound = wire.wrap_bound(session, service.service_id, kind, ids)
            request = pb.WrapKeysRequest(
                session=session,
                service=_name(service),
                kind=kind,
                ids=ids,
                sealed_keys=seal_keys(channel, keys, bound),
            )
            data = endpoint.call("WrapKeys", request.SerializeToString(), seconds)
            reply = wire.parse(pb.WrapKeysReply.FromString, data)
            wrapped = wire.wrapped_of(kind, reply.version, reply.wrapped, ids)
            if len(wrapped) != len(keys):
                raise FormatError("the Core answered with another number of keys")
            return wrapped

        return self._with_endpoint(ask)

    def unwrap_keys(self, service: Service, wrapped: WrappedKeys) -> OpenedKeys:
        """As ``Core.unwrap_keys``; the lease is 0 while the watch stream is not heard."""

        def ask(endpoint: Endpoint, seconds: float) -> OpenedKeys:
            session, channel = endpoint.session(seconds)
            nonce = random_bytes(wire.NONCE_BYTES)
            request = pb.UnwrapKeysRequest(
                session=session,
                nonce=nonce,
                service=_name(service),
                kind=wrapped.kind,
                version=wrapped.version,
                wrapped=wrapped.wrapped,
                ids=wrapped.ids,
            )
            data = endpoint.call("UnwrapKeys", request.SerializeToString(), seconds)
            reply = wire.parse(pb.UnwrapKeysReply.FromString, data)
            bound = wire.unwrap_bound(session, nonce, service.service_id, wrapped)
            keys = _opened(channel, reply.sealed_keys, bound, len(wrapped))
            failures = wire.unpack_failures(reply.failures, len(wrapped)) if reply.failures else {}
            return keys, failures, reply.lease

        keys, failures, granted = self._with_endpoint(ask)
        self._granted[service.service_id] = granted
        return keys, failures, granted if granted and self._heard() else 0.0

    def lease(self, service: Service) -> float:
        """As ``Core.lease``, from what the Core last said, and 0 unless the watch stream was heard just now."""
        return self._granted.get(service.service_id, 0.0) if self._heard() else 0.0

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
                "ShredKeys", pb.ShredKeysRequest(service=_name(service), ids=part), pb.ShredKeysReply.FromString
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
            if self._watcher is None:
                self._watcher = Watcher(self._endpoints, weakref.WeakMethod(self._on_event))

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
        return wire.parse(parse, self._with_endpoint(lambda endpoint, seconds: endpoint.call(method, data, seconds)))

    def _with_endpoint(self, ask: Callable[[Endpoint, float], Any]) -> Any:
        """Ask one address after the other until one answers or the time is up."""
        self._check_open()
        end = time.monotonic() + self._deadline
        last: OpenKCMError | None = None
        for endpoint in self._endpoints.in_order():
            left = end - time.monotonic()
            if left <= 0:
                break
            try:
                answer = _ask_in_session(ask, endpoint, left, end)
            except CoreUnavailable as error:
                self._check_open()
                self._endpoints.failed(endpoint)
                last = error
                continue
            self._endpoints.answered(endpoint)
            return answer
        raise last or CoreUnavailable("no Core answered in time")

    def _after_fork(self) -> None:
        listeners, tenants = self._listeners, self._tenants
        watched = self._watcher is not None
        self._endpoints.forget()
        self._start()
        self._listeners, self._tenants, self._next = listeners, tenants, len(listeners) + 1_000_000
        if watched and not self._closed:
            self._watcher = Watcher(self._endpoints, weakref.WeakMethod(self._on_event))


def _ask_in_session(ask: Callable[[Endpoint, float], Any], endpoint: Endpoint, left: float, end: float) -> Any:
    """Ask; once more, in a new session, where the Core does not know the session any more."""
    try:
        return ask(endpoint, left)
    except (ChannelExpired, SecretMemoryError) as error:
        if isinstance(error, SecretMemoryError) and not endpoint.has_lost_session():
            raise
        endpoint.drop_session()
        return ask(endpoint, max(end - time.monotonic(), 0.001))


def _opened(channel: Any, sealed: bytes, bound: bytes, count: int) -> SecretKeys:
    try:
        keys = open_keys(channel, sealed, bound)
    except DecryptError:
        # Not the caller's record: what came is not the Core's answer to this question.
        raise CoreUnavailable("what came is not the Core's answer; is somebody between it and here?") from None
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


_instances: weakref.WeakSet[RemoteCore] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for core in list(_instances):
        core._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
