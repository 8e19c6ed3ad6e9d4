# SPDX-License-Identifier: Apache-2.0
"""``openkcm.connect_admin``: a Core's key management from another machine.

Invariant: the methods and what they return are ``Core``'s own; nothing here can open a data key. A call that must not
be made twice is made at one address only; of the others, an address that does not answer is passed over.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from google.protobuf.message import Message

from ...core import AuditRecord, Grant, Probe, RevokedCertificate, ServiceStatus, TenantStatus
from ...core.grants import check_verbs
from ...errors import AccessDenied, CoreUnavailable, FormatError, InvalidInput
from ...identity import check_identity
from ...keys import EVERY, Service, Verb, check_name
from ...limits import SERVICE_ID_BYTES
from .. import admin_messages as messages
from .. import admin_pb2 as pb
from .. import wire
from ..credentials import Reading
from .endpoint import host_of
from .line import Lines
from .own import OwnFiles

if TYPE_CHECKING:
    from .connect import TLS
    from .grpc_client import GrpcTransport

M = TypeVar("M", bound=Message)

DEADLINE_SECONDS: Final = 30.0
"""For how long an answer is waited for: linking and probing wait for a root."""


def connect_admin(
    addresses: str | Sequence[str], *, tls: TLS, deadline: float = DEADLINE_SECONDS
) -> RemoteAdmin:
    """Reach the administrative interface of a Core, over gRPC with mutual TLS 1.3.

    Args:
        addresses: ``HOST:PORT`` of the interface, or of each replica's in the order of preference.
        tls: the operator's certificate and key, and whom to trust; files that are replaced are taken up within seconds.
        deadline: seconds for which an answer is waited for.

    Raises:
        InvalidInput: an address is none, or the deadline.
        ConfigurationError: a certificate or a key cannot be used, or gRPC cannot be kept to TLS 1.3 (docs/remote.md).
    """
    return RemoteAdmin([addresses] if isinstance(addresses, str) else list(addresses), tls, deadline)


class RemoteAdmin:
    """A Core's key management, as ``Core`` has it; made by ``connect_admin``. Safe for threads, not across ``fork``.

    Every method may raise AccessDenied, where the identity of the certificate has no grant to administer what the
    call is about, and CoreUnavailable; and what the same method of ``Core`` raises.
    """

    def __init__(self, addresses: Sequence[str], tls: TLS, deadline: float = DEADLINE_SECONDS) -> None:
        if not addresses:
            raise InvalidInput("a Core has at least one address")
        if not deadline > 0:
            raise InvalidInput("a deadline is a number of seconds above zero")
        for address in addresses:
            host_of(address)
        self._own = own = OwnFiles(tls.read)  # every mistake in the files is told now, and in our words
        connector = partial(_transport, tls.server_name)
        self.addresses = tuple(addresses)
        self._deadline = deadline
        self._lines = [Lines(address, connector, own) for address in addresses]
        for each in self._lines:
            each.now()

    def close(self) -> None:
        """Close every connection. Idempotent."""
        for each in self._lines:
            each.close()

    def __enter__(self) -> RemoteAdmin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<RemoteAdmin {', '.join(self.addresses)}>"

    # ---- tenants and services ------------------------------------------------------------------------

    def link_tenant(self, tenant: str, root: str) -> None:
        """As ``Core.link_tenant``; which roots may be linked over the network, the Core's configuration says."""
        request = pb.LinkTenantRequest(tenant=check_name(tenant, "tenant"), root=str(root))
        self._once("LinkTenant", request, pb.Done)

    def unlink(self, tenant: str) -> None:
        """As ``Core.unlink``."""
        self._once("UnlinkTenant", _tenant(tenant), pb.Done)

    def replace_root(self, tenant: str, root: str) -> None:
        """As ``Core.replace_root``; see ``link_tenant``."""
        request = pb.LinkTenantRequest(tenant=check_name(tenant, "tenant"), root=str(root))
        self._once("ReplaceRoot", request, pb.Done)

    def rotate_tenant(self, tenant: str) -> int:
        """As ``Core.rotate_tenant``."""
        return self._once("RotateTenant", _tenant(tenant), pb.VersionReply).version

    def kill(self, tenant: str, reason: str = "") -> None:
        """As ``Core.kill``; where one address does not answer, the next is asked."""
        # Whatever was given as a reason, it must not stand in the way.
        told = str(reason).encode("utf-8", "replace").decode()[:1024]
        request = pb.KillTenantRequest(tenant=check_name(tenant, "tenant"), reason=told)
        self._anywhere("KillTenant", request, pb.Done)

    def restore(self, tenant: str) -> None:
        """As ``Core.restore``."""
        self._once("RestoreTenant", _tenant(tenant), pb.Done)

    def create_service(self, tenant: str, name: str) -> Service:
        """As ``Core.create_service``."""
        reply = self._once("CreateService", _service(tenant, name), pb.CreateServiceReply)
        if len(reply.service_id) != SERVICE_ID_BYTES:
            raise FormatError("the Core's answer has no service id")
        return Service(tenant, check_name(reply.region, "region"), name, reply.service_id)

    def rotate_service(self, tenant: str, name: str) -> int:
        """As ``Core.rotate_service``."""
        return self._once("RotateService", _service(tenant, name), pb.VersionReply).version

    def set_lease(self, tenant: str, name: str, seconds: float) -> None:
        """As ``Core.set_lease``."""
        request = pb.SetLeaseRequest(
            tenant=check_name(tenant, "tenant"), service=check_name(name, "service"), seconds=seconds
        )
        self._anywhere("SetLease", request, pb.Done)

    def status(self, tenant: str | None = None) -> list[TenantStatus]:
        """As ``Core.status``; of all tenants for whoever may administer all."""
        request = pb.TenantRequest() if tenant is None else _tenant(tenant)
        return [
            messages.unpack_tenant(each) for each in self._anywhere("Status", request, pb.StatusReply).tenants
        ]

    def list_tenants(self) -> list[TenantStatus]:
        """As ``Core.list_tenants``."""
        return self.status()

    def list_services(self, tenant: str) -> tuple[ServiceStatus, ...]:
        """As ``Core.list_services``."""
        return self.status(tenant)[0].services

    # ---- roots ---------------------------------------------------------------------------------------

    def probe(self, tenant: str) -> Probe:
        """As ``Core.probe``."""
        reply = self._anywhere("Probe", _tenant(tenant), pb.ProbeReply)
        if len(reply.results) != 1:
            raise FormatError("the Core's answer is not that of one tenant's root")
        return messages.unpack_probe(reply.results[0])

    def root_changed(self, uri: str) -> dict[str, Probe]:
        """As ``Core.root_changed``."""
        reply = self._anywhere("RootChanged", pb.RootChangedRequest(root=str(uri)), pb.ProbeReply)
        return {each.tenant: messages.unpack_probe(each) for each in reply.results}

    # ---- who may do what -----------------------------------------------------------------------------

    def grant(
        self, identity: str, tenant: str, service: str, verbs: Iterable[Verb | str]
    ) -> tuple[Verb, ...]:
        """As ``Core.grant``."""
        return self._verbs("AddGrant", _grant(identity, tenant, service, verbs))

    def withdraw(
        self, identity: str, tenant: str, service: str, verbs: Iterable[Verb | str] | None = None
    ) -> tuple[Verb, ...]:
        """As ``Core.withdraw``."""
        return self._verbs("WithdrawGrant", _grant(identity, tenant, service, verbs))

    def grants(self, identity: str | None = None) -> list[Grant]:
        """As ``Core.grants``."""
        request = pb.ListGrantsRequest(identity="" if identity is None else check_identity(identity))
        return [
            messages.unpack_grant(each)
            for each in self._anywhere("ListGrants", request, pb.ListGrantsReply).grants
        ]

    def revoke_certificate(self, certificate: bytes, reason: str = "") -> bytes:
        """As ``Core.revoke_certificate``."""
        if not isinstance(certificate, bytes):
            raise InvalidInput(
                "a certificate is revoked by its DER bytes, or by the 32 bytes of its fingerprint"
            )
        told = str(reason).encode("utf-8", "replace").decode()[:1024]
        request = pb.RevokeCertificateRequest(certificate=certificate, reason=told)
        return self._anywhere("RevokeCertificate", request, pb.RevokeCertificateReply).fingerprint

    def revoked(self) -> list[RevokedCertificate]:
        """As ``Core.revoked``."""
        reply = self._anywhere("ListRevoked", pb.ListRevokedRequest(), pb.ListRevokedReply)
        return [messages.unpack_revoked(each) for each in reply.certificates]

    # ---- the record ----------------------------------------------------------------------------------

    def audit_records(self, after: int = 0, most: int | None = None) -> list[AuditRecord]:
        """As ``Core.audit_records``; asked for in parts."""
        found: list[AuditRecord] = []
        for record in self._records(after):
            if most is not None and len(found) >= most:
                break
            found.append(record)
        return found

    def verify_audit(self) -> int | None:
        """As ``Core.verify_audit``; the Core checks its own."""
        return self._anywhere("VerifyAudit", pb.VerifyAuditRequest(), pb.VerifyAuditReply).first_wrong or None

    # ---- inside --------------------------------------------------------------------------------------

    def _records(self, after: int) -> Iterator[AuditRecord]:
        while True:
            reply = self._anywhere("AuditRecords", pb.AuditRecordsRequest(after=after), pb.AuditRecordsReply)
            for each in reply.records:
                if each.number <= after:
                    raise FormatError("the Core's audit records are not in order")
                after = each.number
                yield messages.unpack_record(each)
            if not reply.records:
                return

    def _verbs(self, method: str, request: pb.GrantRequest) -> tuple[Verb, ...]:
        verbs = self._anywhere(method, request, pb.GrantReply).verbs
        return check_verbs(verbs) if verbs else ()

    def _once(self, method: str, request: Message, reply: type[M]) -> M:
        """Make a call that may have been carried out though no answer came: at the first address, and not again."""
        data = self._ask(self._lines[0], method, request.SerializeToString(), self._deadline)
        return wire.parse(reply.FromString, data)

    def _anywhere(self, method: str, request: Message, reply: type[M]) -> M:
        """Make a call that does no harm when it is made twice, at the first address that answers."""
        data, end = request.SerializeToString(), time.monotonic() + self._deadline
        last = CoreUnavailable("no Core answered in time")
        for at, line in enumerate(self._lines):
            left = end - time.monotonic()
            if left <= 0:
                break
            try:
                # None of them may take what the others need.
                answer = self._ask(line, method, data, left / (len(self._lines) - at))
                return wire.parse(reply.FromString, answer)
            except CoreUnavailable as error:
                last = error
        raise last

    def _ask(self, lines: Lines, method: str, data: bytes, seconds: float) -> bytes:
        """Ask one address; once more where it was a certificate that has been replaced that was refused."""
        line = lines.now()
        try:
            return line.transport.call(method, data, seconds)
        except AccessDenied:
            if self._own.look() is line.reading:
                raise
            return lines.now().transport.call(method, data, seconds)


def _transport(server_name: str | None, address: str, reading: Reading) -> GrpcTransport:
    from ..server.admin_handlers import MAX_REPLY_BYTES, SERVICE_NAME
    from .grpc_client import GrpcTransport

    most = MAX_REPLY_BYTES + 1024
    return GrpcTransport(address, lambda: reading.pem, server_name, service=SERVICE_NAME, most=most)


def _tenant(tenant: str) -> pb.TenantRequest:
    return pb.TenantRequest(tenant=check_name(tenant, "tenant"))


def _service(tenant: str, name: str) -> pb.ServiceRequest:
    return pb.ServiceRequest(tenant=check_name(tenant, "tenant"), service=check_name(name, "service"))


def _grant(identity: str, tenant: str, service: str, verbs: Any) -> pb.GrantRequest:
    return pb.GrantRequest(
        identity=check_identity(identity),
        tenant=tenant if tenant == EVERY else check_name(tenant, "tenant"),
        service=service if service == EVERY else check_name(service, "service"),
        verbs=[] if verbs is None else check_verbs(verbs),
    )
