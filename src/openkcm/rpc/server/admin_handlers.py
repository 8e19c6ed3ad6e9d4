# SPDX-License-Identifier: Apache-2.0
"""The administrative interface of a Core: one method a call of ``admin.proto``.

Invariant: whoever calls holds the verb ``administer`` on what the call is about, on ``*`` and ``*`` where it is about
more than one tenant's business, and that is known before anything is looked up; whoever does not hears the same words
whatever exists. Every act is recorded with who had it done. No call returns a data key or opens one: there is none in
any message, and ``core`` is asked for nothing else than what ``Core`` gives to whoever manages keys.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from ...core import Core, Probe
from ...core.audit import acting
from ...errors import AccessDenied, InvalidInput, LimitExceeded
from ...keys import EVERY, Verb
from .. import admin_messages as messages
from .. import admin_pb2 as pb
from .. import wire
from ..peer import Peer
from .denials import Denials
from .gatekeeper import Gatekeeper

logger = logging.getLogger("openkcm.rpc")

SERVICE_NAME: Final = "openkcm.v1.Administration"

MAX_REQUEST_BYTES: Final = 64 * 1024
"""The largest is a certificate."""

MAX_REPLY_BYTES: Final = 64 * 1024 * 1024
"""The largest is the status of a hundred thousand tenants."""

MOST_RECORDS: Final = 1000
"""Audit records in one reply."""

CLOUD_ROOTS: Final = ("aws-kms://", "azure-kms://", "gcp-kms://")
"""What roots begin with that may be linked over the network unless the configuration says otherwise: those of which the
URI cannot make the Core read or write a file, load a module, or log in at a host of the caller's choice."""

Place = Callable[[Any], tuple[str, str]]
"""What a request is about: a tenant and a service, ``*`` for every one."""


class Method(NamedTuple):
    """A call: its parser, what a caller must be allowed to administer, and what carries it out."""

    parse: Callable[[bytes], Any]
    place: Place
    act: Callable[[Any], Any]


def _everything(request: Any) -> tuple[str, str]:
    return EVERY, EVERY


def _tenant(request: Any) -> tuple[str, str]:
    return request.tenant or EVERY, EVERY


def _service(request: Any) -> tuple[str, str]:
    return request.tenant, request.service


class AdminHandlers(Gatekeeper):
    """Answers the calls of the administrative interface.

    Args:
        core: what is administered.
        denials: where refusals are recorded.
        roots: what a root's URI must begin with to be linked, or asked, over the network.
    """

    def __init__(self, core: Core, denials: Denials, roots: Sequence[str] = CLOUD_ROOTS) -> None:
        super().__init__(core, denials)
        self._roots = tuple(roots)
        self.methods: Mapping[str, Method] = {
            "LinkTenant": Method(pb.LinkTenantRequest.FromString, _everything, self._link),
            "UnlinkTenant": Method(pb.TenantRequest.FromString, _everything, self._unlink),
            "ReplaceRoot": Method(pb.LinkTenantRequest.FromString, _everything, self._replace_root),
            "RotateTenant": Method(pb.TenantRequest.FromString, _tenant, self._rotate_tenant),
            "KillTenant": Method(pb.KillTenantRequest.FromString, _tenant, self._kill),
            "RestoreTenant": Method(pb.TenantRequest.FromString, _tenant, self._restore),
            "CreateService": Method(pb.ServiceRequest.FromString, _service, self._create_service),
            "RotateService": Method(pb.ServiceRequest.FromString, _service, self._rotate_service),
            "SetLease": Method(pb.SetLeaseRequest.FromString, _service, self._set_lease),
            "Status": Method(pb.TenantRequest.FromString, _tenant, self._status),
            "Probe": Method(pb.TenantRequest.FromString, _tenant, self._probe),
            "RootChanged": Method(pb.RootChangedRequest.FromString, _everything, self._root_changed),
            "AddGrant": Method(pb.GrantRequest.FromString, _everything, self._grant),
            "WithdrawGrant": Method(pb.GrantRequest.FromString, _everything, self._withdraw),
            "ListGrants": Method(pb.ListGrantsRequest.FromString, _everything, self._list_grants),
            "RevokeCertificate": Method(pb.RevokeCertificateRequest.FromString, _everything, self._revoke),
            "ListRevoked": Method(pb.ListRevokedRequest.FromString, _everything, self._list_revoked),
            "AuditRecords": Method(pb.AuditRecordsRequest.FromString, _everything, self._audit_records),
            "VerifyAudit": Method(pb.VerifyAuditRequest.FromString, _everything, self._verify_audit),
        }

    def call(self, name: str, peer: Peer, data: bytes) -> bytes:
        """Carry a call out: a request's bytes in, a reply's bytes out.

        Raises:
            OpenKCMError: to be told to the peer as ``failure_of`` has it.
        """
        try:
            return self._call(self.methods[name], peer, data)
        except Exception as error:
            self.refused(error, name, peer)
            raise

    # ---- who may -------------------------------------------------------------------------------------

    def _call(self, method: Method, peer: Peer, data: bytes) -> bytes:
        self.check_peer(peer)
        request = wire.parse(method.parse, data)
        self._check_allowed(peer, *method.place(request))
        with acting(peer.identity):
            reply: bytes = method.act(request).SerializeToString()
        if len(reply) > MAX_REPLY_BYTES:
            raise LimitExceeded("the answer is too long to send; name a tenant")
        return reply

    def check_caller(self, peer: Peer) -> None:
        """Raise AccessDenied if the peer administers nothing."""
        self.check_peer(peer)
        if not self.core.access.administers(peer.identity):
            raise AccessDenied(wire.REFUSED)

    def _check_allowed(self, peer: Peer, tenant: str, service: str) -> None:
        """Nothing was looked up yet: who may not administer a tenant does not learn whether it exists."""
        if not self.core.access.allows(peer.identity, tenant, service, Verb.ADMINISTER):
            raise AccessDenied(wire.REFUSED)

    def _check_root(self, uri: str) -> str:
        """Raise unless the configuration lets a root be named over the network.

        A URI can name a file to make (``local:``), a module to load or a file to read a PIN from (``pkcs11:``), or a
        host to log in at (``bao-transit:``), all on the Core's machine and with the Core's rights.
        """
        scheme = uri.partition(":")[0].lower()
        if any(_begins(uri, allowed) for allowed in self._roots):
            if scheme != "pkcs11" or "?" not in uri or uri in self._roots:
                return uri
            raise InvalidInput(
                "over the network a pkcs11: root names a key and neither a module nor a PIN's place"
            )
        raise InvalidInput(
            "roots of this kind are not linked over the network: add what its URI begins with to `roots` in the "
            "Core's configuration, or link it on the Core's machine"
        )

    def _check_apart(self, identity: str, verbs: Sequence[str]) -> None:
        """Raise if an identity would both administer and use data keys.

        Who may grant could else grant themselves the reading of a tenant's data. It takes a second identity, which
        whoever issues certificates must give them, and the grant to it is in the audit record.
        """
        held = {each.verb for each in self.core.grants(identity)} | set(verbs)
        if Verb.ADMINISTER in held and len(held) > 1:
            raise InvalidInput(
                "over the network an identity is given `administer` or the use of data keys, never both: use another"
            )

    # ---- the calls -----------------------------------------------------------------------------------

    def _link(self, request: pb.LinkTenantRequest) -> pb.Done:
        self.core.link_tenant(request.tenant, self._check_root(request.root))
        return pb.Done()

    def _unlink(self, request: pb.TenantRequest) -> pb.Done:
        self.core.unlink(request.tenant)
        return pb.Done()

    def _replace_root(self, request: pb.LinkTenantRequest) -> pb.Done:
        self.core.replace_root(request.tenant, self._check_root(request.root))
        return pb.Done()

    def _rotate_tenant(self, request: pb.TenantRequest) -> pb.VersionReply:
        return pb.VersionReply(version=self.core.rotate_tenant(request.tenant))

    def _kill(self, request: pb.KillTenantRequest) -> pb.Done:
        self.core.kill(request.tenant, request.reason)
        return pb.Done()

    def _restore(self, request: pb.TenantRequest) -> pb.Done:
        self.core.restore(request.tenant)
        return pb.Done()

    def _create_service(self, request: pb.ServiceRequest) -> pb.CreateServiceReply:
        made = self.core.create_service(request.tenant, request.service)
        return pb.CreateServiceReply(region=made.region, service_id=made.service_id)

    def _rotate_service(self, request: pb.ServiceRequest) -> pb.VersionReply:
        return pb.VersionReply(version=self.core.rotate_service(request.tenant, request.service))

    def _set_lease(self, request: pb.SetLeaseRequest) -> pb.Done:
        self.core.set_lease(request.tenant, request.service, request.seconds)
        return pb.Done()

    def _status(self, request: pb.TenantRequest) -> pb.StatusReply:
        tenants = self.core.status(request.tenant or None)
        return pb.StatusReply(region=self.core.region, tenants=map(messages.pack_tenant, tenants))

    def _probe(self, request: pb.TenantRequest) -> pb.ProbeReply:
        return _probes({request.tenant: self.core.probe(request.tenant)})

    def _root_changed(self, request: pb.RootChangedRequest) -> pb.ProbeReply:
        return _probes(self.core.root_changed(self._check_root(request.root)))

    def _grant(self, request: pb.GrantRequest) -> pb.GrantReply:
        self._check_apart(request.identity, request.verbs)
        added = self.core.grant(request.identity, request.tenant, request.service, list(request.verbs))
        return pb.GrantReply(verbs=added)

    def _withdraw(self, request: pb.GrantRequest) -> pb.GrantReply:
        verbs = list(request.verbs) or None
        return pb.GrantReply(
            verbs=self.core.withdraw(request.identity, request.tenant, request.service, verbs)
        )

    def _list_grants(self, request: pb.ListGrantsRequest) -> pb.ListGrantsReply:
        grants = self.core.grants(request.identity or None)
        return pb.ListGrantsReply(grants=map(messages.pack_grant, grants))

    def _revoke(self, request: pb.RevokeCertificateRequest) -> pb.RevokeCertificateReply:
        fingerprint = self.core.revoke_certificate(request.certificate, request.reason)
        return pb.RevokeCertificateReply(fingerprint=fingerprint)

    def _list_revoked(self, request: pb.ListRevokedRequest) -> pb.ListRevokedReply:
        return pb.ListRevokedReply(certificates=map(messages.pack_revoked, self.core.revoked()))

    def _audit_records(self, request: pb.AuditRecordsRequest) -> pb.AuditRecordsReply:
        most = min(request.most or MOST_RECORDS, MOST_RECORDS)
        after = min(request.after, 2**62)  # what a database's number can be
        records = self.core.audit_records(after, most)
        return pb.AuditRecordsReply(records=map(messages.pack_record, records))

    def _verify_audit(self, request: pb.VerifyAuditRequest) -> pb.VerifyAuditReply:
        return pb.VerifyAuditReply(first_wrong=self.core.verify_audit() or 0)


def _probes(found: dict[str, Probe]) -> pb.ProbeReply:
    return pb.ProbeReply(results=[messages.pack_probe(tenant, each) for tenant, each in found.items()])


def _begins(uri: str, allowed: str) -> bool:
    """Whether a URI is, or is below, what is allowed: ``bao-transit://a.example`` begins no ``...a.example.org``."""
    return uri == allowed or (
        uri.startswith(allowed) and (allowed[-1:] in ":/;" or uri[len(allowed)] in "/;?")
    )
