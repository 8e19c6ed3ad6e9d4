# SPDX-License-Identifier: Apache-2.0
"""Between what a Core tells about itself and the messages of ``admin.proto``; both ends use it.

Invariant: what was packed unpacks to an equal value, and nothing secret is among it.
"""

from __future__ import annotations

from typing import Final

from ..core import (
    AuditRecord,
    Grant,
    Probe,
    RevokedCertificate,
    ServiceKeyStatus,
    ServiceStatus,
    TenantStatus,
)
from ..errors import FormatError, OpenKCMError
from ..keys import KeyState, TenantState, Verb
from . import admin_pb2 as pb
from . import keys_pb2, wire

_TOLD: Final = (
    *("root_denied", "root_disabled", "root_destroyed"),
    *("root_misconfigured", "root_unavailable", "root_throttled"),
    "tenant_dark",
    "store_unavailable",  # a kill that could not be recorded says so in it
)


def failure_of(error: BaseException) -> keys_pb2.Failure:
    """What an administrator is told of an error: what a root or the store answered too, which a Gateway need not
    know."""
    if isinstance(error, OpenKCMError) and error.code in _TOLD:
        return keys_pb2.Failure(code=error.code, message=str(error)[:1024], retryable=error.retryable)
    return wire.failure_of(error)


def pack_tenant(status: TenantStatus) -> pb.TenantStatus:
    """A tenant's status."""
    return pb.TenantStatus(
        tenant=status.tenant,
        region=status.region,
        state=status.state.value,
        reason=status.reason,
        root=status.root,
        development=status.development,
        key_version=status.key_version,
        open=status.open,
        shredded=status.shredded,
        services=map(_pack_service, status.services),
        created_at=status.created_at,
    )


def unpack_tenant(message: pb.TenantStatus) -> TenantStatus:
    """A tenant's status.

    Raises:
        FormatError: a state that this version does not know.
    """
    try:
        return TenantStatus(
            tenant=message.tenant,
            region=message.region,
            state=TenantState(message.state),
            reason=message.reason,
            root=message.root,
            development=message.development,
            key_version=message.key_version,
            open=message.open,
            shredded=message.shredded,
            services=tuple(map(_unpack_service, message.services)),
            created_at=message.created_at,
        )
    except ValueError:
        raise _newer() from None


def _pack_service(status: ServiceStatus) -> pb.ServiceStatus:
    return pb.ServiceStatus(
        tenant=status.tenant,
        service=status.service,
        service_id=status.service_id,
        active_version=status.active_version,
        versions=[
            pb.ServiceKeyStatus(version=each.version, state=each.state.value, created_at=each.created_at)
            for each in status.versions
        ],
        lease=status.lease,
        created_at=status.created_at,
    )


def _unpack_service(message: pb.ServiceStatus) -> ServiceStatus:
    return ServiceStatus(
        tenant=message.tenant,
        service=message.service,
        service_id=message.service_id,
        active_version=message.active_version,
        versions=tuple(
            ServiceKeyStatus(each.version, KeyState(each.state), each.created_at) for each in message.versions
        ),
        lease=message.lease,
        created_at=message.created_at,
    )


def pack_probe(tenant: str, probe: Probe) -> pb.ProbeResult:
    """What a root said."""
    return pb.ProbeResult(
        tenant=tenant,
        state=probe.state.value,
        reason=probe.reason,
        seconds=probe.seconds,
        asked_at=probe.asked_at,
        refused_at=probe.refused_at,
        first_refused_at=probe.first_refused_at,
        zeroed_at=probe.zeroed_at,
    )


def unpack_probe(message: pb.ProbeResult) -> Probe:
    """What a root said.

    Raises:
        FormatError: a state that this version does not know.
    """
    try:
        state = TenantState(message.state)
    except ValueError:
        raise _newer() from None
    return Probe(
        state,
        message.reason,
        message.seconds,
        message.asked_at,
        message.refused_at,
        message.first_refused_at,
        message.zeroed_at,
    )


def pack_grant(grant: Grant) -> pb.Grant:
    """A grant."""
    return pb.Grant(
        identity=grant.identity,
        tenant=grant.tenant,
        service=grant.service,
        verb=grant.verb.value,
        created_at=grant.created_at,
    )


def unpack_grant(message: pb.Grant) -> Grant:
    """A grant.

    Raises:
        FormatError: a verb that this version does not know.
    """
    try:
        verb = Verb(message.verb)
    except ValueError:
        raise _newer() from None
    return Grant(message.identity, message.tenant, message.service, verb, message.created_at)


def pack_revoked(revoked: RevokedCertificate) -> pb.RevokedCertificate:
    """A certificate that is refused."""
    return pb.RevokedCertificate(
        fingerprint=revoked.fingerprint,
        identity=revoked.identity,
        serial=revoked.serial,
        reason=revoked.reason,
        revoked_at=revoked.revoked_at,
    )


def unpack_revoked(message: pb.RevokedCertificate) -> RevokedCertificate:
    """A certificate that is refused."""
    return RevokedCertificate(
        message.fingerprint, message.identity, message.serial, message.reason, message.revoked_at
    )


def pack_record(record: AuditRecord) -> pb.AuditRecord:
    """An audit record."""
    return pb.AuditRecord(
        number=record.number,
        at=record.at,
        act=record.act,
        tenant=record.tenant,
        service=record.service,
        detail=record.detail,
    )


def unpack_record(message: pb.AuditRecord) -> AuditRecord:
    """An audit record."""
    return AuditRecord(
        message.number, message.at, message.act, message.tenant, message.service, message.detail
    )


def _newer() -> FormatError:
    return FormatError("the Core's answer holds a word that this version does not know; upgrade this side")
