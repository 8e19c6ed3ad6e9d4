# SPDX-License-Identifier: Apache-2.0
"""Messages of both interfaces of a Core, from a peer that may and from one that may not: an answer, or a typed error.

The first byte picks peer and method. A stranger is refused in the same words whatever the message says, unless it is no
message at all, and never hears of what exists.
"""

from __future__ import annotations

import atexit
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from openkcm.errors import AccessDenied, FormatError, InvalidInput, LimitExceeded, OpenKCMError
from openkcm.pki import DevelopmentCA
from openkcm.rpc import keys_pb2 as pb
from openkcm.rpc import wire
from openkcm.rpc.peer import Peer, Peers
from openkcm.rpc.server.admin_handlers import AdminHandlers
from openkcm.rpc.server.denials import Denials
from openkcm.rpc.server.handlers import KeyHandlers
from openkcm.rpc.session import Credentials, SessionTable
from support import make_vault

GATEWAY, STRANGER = "spiffe://example/gateway", "spiffe://example/stranger"
DATA = (
    *("OpenChannel", "FindService", "WrapKeys", "UnwrapKeys"),
    *("RewrapKeys", "ShredKeys", "FindShredded"),
)


class Site:
    """A vault of its own, for messages may shred what they like."""

    def __init__(self, folder: Path) -> None:
        ca = DevelopmentCA.create(folder / "pki")
        server = ca.issue_server("core", dns=["localhost"])
        self.core = make_vault(folder)
        self.core.grant(GATEWAY, "acme", "*", ("wrap", "unwrap", "shred"))
        self.service = self.core.find_service("acme", "records")
        denials = Denials(lambda line: None, seconds=3600)
        credentials = Credentials.load(server.certificate, server.key, ca.certificate_path)
        self.data = KeyHandlers(self.core, credentials, SessionTable(), denials)
        self.admin = AdminHandlers(self.core, denials)
        self.peers = [self._peer(ca, "one", GATEWAY), self._peer(ca, "two", STRANGER)]

    @staticmethod
    def _peer(ca: DevelopmentCA, name: str, spiffe: str) -> Peer:
        ca.issue_client(name, spiffe=spiffe)
        return Peers().read(ca.find(name).der)


@functools.cache
def site() -> Site:
    folder = tempfile.TemporaryDirectory(prefix="openkcm-fuzz-rpc-")
    made = Site(Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(made.core.close)
    return made


def calls() -> list[tuple[Any, str]]:
    """Every call of both interfaces."""
    data, admin = site().data, site().admin
    assert set(DATA) == set(data.methods)
    return [*((data, name) for name in DATA), *((admin, name) for name in sorted(admin.methods))]


def seeds() -> Iterator[bytes]:
    name = pb.ServiceName(tenant="acme", service="records", service_id=bytes(12))
    messages = (
        pb.ChannelHello(lowest_version=1, highest_version=1, public_key=bytes(32), certificates=[b"x"]),
        pb.FindServiceRequest(tenant="acme", service="records"),
        pb.WrapKeysRequest(session=bytes(16), service=name, kind=1, sealed_keys=bytes(56)),
        pb.UnwrapKeysRequest(
            session=bytes(16), nonce=bytes(16), service=name, kind=1, version=1, wrapped=bytes(72)
        ),
        pb.RewrapKeysRequest(service=name, kind=2, version=1, wrapped=bytes(72), ids=bytes(16)),
        pb.ShredKeysRequest(service=name, ids=bytes(16)),
        pb.FindShreddedRequest(service=name, ids=bytes(32)),
    )
    for at, message in enumerate(messages):
        yield bytes((at,)) + message.SerializeToString()
        yield bytes((0x80 | at,)) + message.SerializeToString()
    for at in range(len(messages), len(messages) + 19):
        yield (
            bytes((0x80 | at,)) + pb.FindServiceRequest(tenant="acme", service="records").SerializeToString()
        )


def check(data: bytes) -> None:
    if not data:
        return
    stranger, handlers = data[0] >> 7, calls()
    # Only a stranger tries the administrative interface: an operator's act on this vault would be everybody's.
    handler, name = handlers[(data[0] & 0x7F) % (len(handlers) if stranger else len(DATA))]
    real = data[1:].replace(bytes(12), site().service.service_id)
    try:
        reply = handler.call(name, site().peers[stranger], real)
    except OpenKCMError as error:
        told = wire.failure_of(error)
        assert "/" not in told.message and "Traceback" not in told.message
        if stranger:
            assert type(error) in (AccessDenied, InvalidInput, FormatError, LimitExceeded)
            assert type(error) is not AccessDenied or told.message == wire.REFUSED
    else:
        assert isinstance(reply, bytes) and not stranger
