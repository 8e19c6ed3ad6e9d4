# SPDX-License-Identifier: Apache-2.0
"""The data interface of a Core: one method a call of ``keys.proto``, for any transport.

Invariant: nothing is looked up for a peer before its certificate, its revocation and its grants were looked at, and
whoever is refused hears the same words whatever exists. Per call this does work in Python for the call, never for each
of its keys.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from ...core import Core
from ...crypto import Channel, open_keys, seal_keys
from ...errors import (
    AccessDenied,
    ChannelExpired,
    InvalidInput,
    SecretMemoryError,
    ServiceNotFound,
)
from ...keys import EVERY, Change, Event, Service, Verb, check_name
from .. import keys_pb2 as pb
from .. import wire
from ..peer import Peer
from ..session import ChannelHello, Credentials, SessionTable, answer
from .denials import Denials
from .gatekeeper import Gatekeeper

logger = logging.getLogger("openkcm.rpc")

DATA_VERBS: Final = (Verb.WRAP, Verb.UNWRAP, Verb.SHRED)


@contextlib.contextmanager
def alive(channel: Channel) -> Iterator[None]:
    """Say of a session that ended between look-up and use what is said of any that is over."""
    try:
        yield
    except SecretMemoryError:
        if channel.wiped:
            raise ChannelExpired from None
        raise


class Method(NamedTuple):
    """A call: its parser, and what carries it out."""

    parse: Callable[[bytes], Any]
    act: Callable[[Peer, Any], Any]


class KeyHandlers(Gatekeeper):
    """Answers the calls of the data interface.

    Args:
        core: whose keys.
        credentials: the server's certificate and key, which also sign the inner channel's agreement.
        sessions: the inner channels that peers have agreed on.
        denials: where refusals are recorded.
    """

    def __init__(
        self, core: Core, credentials: Credentials, sessions: SessionTable, denials: Denials
    ) -> None:
        super().__init__(core, denials)
        self.credentials = credentials
        self._sessions = sessions
        self._services: dict[tuple[str, str], Service] = {}
        self._unwatch = core.watch(self._on_change)
        self.methods: Final = {
            "OpenChannel": Method(pb.ChannelHello.FromString, self._open_channel),
            "FindService": Method(pb.FindServiceRequest.FromString, self._find_service),
            "WrapKeys": Method(pb.WrapKeysRequest.FromString, self._wrap),
            "UnwrapKeys": Method(pb.UnwrapKeysRequest.FromString, self._unwrap),
            "RewrapKeys": Method(pb.RewrapKeysRequest.FromString, self._rewrap),
            "ShredKeys": Method(pb.ShredKeysRequest.FromString, self._shred),
            "FindShredded": Method(pb.FindShreddedRequest.FromString, self._find_shredded),
        }

    def close(self) -> None:
        """Forget every session."""
        self._unwatch()
        self._sessions.close()

    def call(self, name: str, peer: Peer, data: bytes) -> bytes:
        """Carry a call out: a request's bytes in, a reply's bytes out.

        Raises:
            OpenKCMError: to be told to the peer as ``wire.failure_of`` has it.
        """
        method = self.methods[name]
        try:
            self.check_peer(peer)
            reply: bytes = method.act(peer, wire.parse(method.parse, data)).SerializeToString()
            return reply
        except Exception as error:
            self.refused(error, name, peer)
            raise

    # ---- who may ------------------------------------------------------------------------------------

    def check_caller(self, peer: Peer) -> None:
        """Raise AccessDenied if the peer may do nothing with anybody's data keys."""
        self.check_peer(peer)
        if not self.core.access.sees(peer.identity, EVERY):
            raise AccessDenied(wire.REFUSED)

    def may_any(self, peer: Peer, tenant: str, service: str) -> bool:
        """Whether the peer may do anything at all with a service's data keys."""
        allows = self.core.access.allows
        return any(allows(peer.identity, tenant, service, verb) for verb in DATA_VERBS)

    def _allow(self, peer: Peer, name: pb.ServiceName, verb: Verb) -> Service:
        wire.check_service(name)
        if not self.core.access.allows(peer.identity, name.tenant, name.service, verb):
            raise AccessDenied(wire.REFUSED)
        return self._service(name)

    # ---- which service ------------------------------------------------------------------------------

    def _service(self, name: pb.ServiceName) -> Service:
        place = (name.tenant, name.service)
        known = self._services.get(place)
        if known is None or known.service_id != name.service_id:
            known = self._look_up(*place)
            if known.service_id != name.service_id:
                raise ServiceNotFound("the tenant has another service by that name now; look it up again")
        return known

    def _look_up(self, tenant: str, service: str) -> Service:
        found = self._services[tenant, service] = self.core.find_service(tenant, service)
        return found

    def _on_change(self, event: Event) -> None:
        if event.change is Change.DARK:
            for place in [place for place in list(self._services) if place[0] == event.tenant]:
                self._services.pop(place, None)

    # ---- the calls ----------------------------------------------------------------------------------

    def _open_channel(self, peer: Peer, hello: pb.ChannelHello) -> pb.ChannelReply:
        # A session takes secret memory, which only those are given who may put a data key across.
        if not self.core.access.sees(peer.identity, EVERY):
            raise AccessDenied(wire.REFUSED)
        said = ChannelHello(
            hello.lowest_version,
            hello.highest_version,
            hello.public_key,
            tuple(hello.certificates),
            hello.signature,
        )
        reply, channel, leaf = answer(self.credentials, said, peer.leaf, lifetime=self._sessions.lifetime)
        self._sessions.add(reply.session, channel, leaf)
        return pb.ChannelReply(
            version=reply.version,
            session=reply.session,
            lifetime=reply.lifetime,
            public_key=reply.public_key,
            certificates=reply.certificates,
            signature=reply.signature,
        )

    def _find_service(self, peer: Peer, request: pb.FindServiceRequest) -> pb.FindServiceReply:
        tenant, service = check_name(request.tenant, "tenant"), check_name(request.service, "service")
        if not self.may_any(peer, tenant, service):
            raise AccessDenied(wire.REFUSED)
        found = self._look_up(tenant, service)
        return pb.FindServiceReply(region=found.region, service_id=found.service_id)

    def _wrap(self, peer: Peer, request: pb.WrapKeysRequest) -> pb.WrapKeysReply:
        service = self._allow(peer, request.service, Verb.WRAP)
        kind, ids = wire.kind_of(request.kind), request.ids
        channel = self._sessions.find(request.session, peer.leaf)
        bound = wire.wrap_bound(request.session, service.service_id, kind, ids)
        with alive(channel):
            keys = open_keys(channel, request.sealed_keys, *bound)
        try:
            wrapped = self.core.wrap_keys(service, keys, kind, ids)
        finally:
            keys.wipe()
        return pb.WrapKeysReply(version=wrapped.version, wrapped=wrapped.wrapped)

    def _unwrap(self, peer: Peer, request: pb.UnwrapKeysRequest) -> pb.UnwrapKeysReply:
        service = self._allow(peer, request.service, Verb.UNWRAP)
        if len(request.nonce) != wire.NONCE_BYTES:
            raise InvalidInput(f"an unwrap's nonce has {wire.NONCE_BYTES} bytes")
        wrapped = wire.wrapped_of(request.kind, request.version, request.wrapped, request.ids)
        channel = self._sessions.find(request.session, peer.leaf)
        keys, failures, lease = self.core.unwrap_keys(service, wrapped)
        try:
            bound = wire.unwrap_bound(request.session, request.nonce, service.service_id, wrapped)
            with alive(channel):
                sealed = seal_keys(channel, keys, *bound)
        finally:
            keys.wipe()
        return pb.UnwrapKeysReply(
            sealed_keys=sealed, lease=lease, failures=wire.pack_failures(failures) if failures else ()
        )

    def _rewrap(self, peer: Peer, request: pb.RewrapKeysRequest) -> pb.RewrapKeysReply:
        service = self._allow(peer, request.service, Verb.WRAP)
        wrapped = wire.wrapped_of(request.kind, request.version, request.wrapped, request.ids)
        moved, failures = self.core.rewrap_keys(service, wrapped)
        return pb.RewrapKeysReply(
            version=moved.version,
            wrapped=moved.wrapped,
            failures=wire.pack_failures(failures) if failures else (),
        )

    def _shred(self, peer: Peer, request: pb.ShredKeysRequest) -> pb.ShredKeysReply:
        self.core.shred_keys(self._allow(peer, request.service, Verb.SHRED), request.ids)
        return pb.ShredKeysReply()

    def _find_shredded(self, peer: Peer, request: pb.FindShreddedRequest) -> pb.FindShreddedReply:
        name = wire.check_service(request.service)
        if not self.may_any(peer, name.tenant, name.service):
            raise AccessDenied(wire.REFUSED)
        gone = self.core.shredded(self._service(name), request.ids)
        return pb.FindShreddedReply(ids=b"".join(sorted(gone)))
