# SPDX-License-Identifier: Apache-2.0
"""The part of the Core that is about who may use it over the network.

Invariant: that of ``grants``; and what this process changes, it goes by at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..clock import utc_now
from ..errors import CoreUnavailable, StoreUnavailable
from ..identity import check_identity
from ..keys import Verb
from . import grants
from .grants import Grant, Grants, RevokedCertificate
from .watcher import Repeater

if TYPE_CHECKING:
    from .vault import Vault


class Access:
    """Grants, and revoked certificates; ``Core`` is made of this and of what is about keys."""

    def __init__(self, vault: Vault, poll_interval: float) -> None:
        self._vault = vault
        self._interval = poll_interval
        self._closed = False
        self._grants: Grants | None = None
        self._grants_repeater: Repeater[Access] | None = None
        self._access_lock = threading.Lock()

    def grant(
        self, identity: str, tenant: str, service: str, verbs: Iterable[Verb | str]
    ) -> tuple[Verb, ...]:
        """Let an identity do things with a service, over the network. Every Core on the store goes by it in a second.

        Args:
            identity: ``spiffe://TRUST-DOMAIN/PATH`` or ``cn:NAME``, as ``identity.identity_of`` gives it.
            tenant: a tenant's name, linked or not, or ``*`` for every one.
            service: a service's name, or ``*`` for every one.
            verbs: of ``Verb``; none includes another. ``administer`` on ``*`` and ``*`` may link tenants.

        Returns:
            The verbs that this adds; those that were there already stay as they are.

        Raises:
            InvalidInput: an identity, name or verb that is none.
            StoreUnavailable: nothing was changed.
        """
        self._check_open()
        added = grants.grant(self._vault.store, identity, tenant, service, verbs, utc_now())
        self._look_at_grants()
        return added

    def withdraw(
        self, identity: str, tenant: str, service: str, verbs: Iterable[Verb | str] | None = None
    ) -> tuple[Verb, ...]:
        """Take back what was granted in the very same words; other grants of the identity stay.

        Args:
            verbs: which; all of them by default.

        Returns:
            The verbs that were taken back; none if there was no such grant.

        Raises:
            InvalidInput: an identity, name or verb that is none.
            StoreUnavailable: nothing was changed.
        """
        self._check_open()
        taken = grants.withdraw(self._vault.store, identity, tenant, service, verbs, utc_now())
        self._look_at_grants()
        return taken

    def grants(self, identity: str | None = None) -> list[Grant]:
        """Every grant, or those of one identity, sorted."""
        self._check_open()
        wanted = None if identity is None else check_identity(identity)
        with self._vault.store.read() as connection:
            return grants.read_grants(connection, wanted)

    def revoke_certificate(self, certificate: bytes, reason: str = "") -> bytes:
        """Refuse a certificate from now on, whoever signed it; nothing takes it back. Its identity keeps its grants.

        Args:
            certificate: in DER; or, where that is not at hand, its 32-byte fingerprint (SHA-256 of the DER). Give the
                certificate if you can: who has it can make another of it with another fingerprint.
            reason: for the record; at most 256 characters are kept.

        Returns:
            Its fingerprint.

        Raises:
            FormatError: it is no certificate.
            StoreUnavailable: nothing was changed.
        """
        self._check_open()
        fingerprint = grants.revoke_certificate(self._vault.store, certificate, reason, utc_now())
        self._look_at_grants()
        return fingerprint

    def revoked(self) -> list[RevokedCertificate]:
        """Every certificate that was revoked, the newest first."""
        self._check_open()
        with self._vault.store.read() as connection:
            return grants.read_revoked(connection)

    @property
    def access(self) -> Grants:
        """Fast answers, kept in step with the store by a thread: for what serves this Core over the network."""
        self._check_open()
        if self._grants is None:
            with self._access_lock:
                if self._grants is None:
                    self._grants = Grants(self._vault.store, self._vault.clock, self._interval)
                    self._grants_repeater = Repeater(self, "openkcm-grants", _look, 0.0)
        return self._grants

    # ---- inside --------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._closed:
            raise CoreUnavailable("this Core was closed", retryable=False)

    def _look_at_grants(self) -> None:
        """Go by a change of this process at once. It is durable already, so a failure now is not its failure."""
        if self._grants is not None:
            with contextlib.suppress(StoreUnavailable):
                self._grants.look()

    def _forget_access(self) -> None:
        """In a forked child, which has no thread of the parent's, and maybe a lock that one held."""
        self._access_lock = threading.Lock()
        self._grants = self._grants_repeater = None

    def _stop_access(self) -> None:
        if self._grants_repeater is not None:
            self._grants_repeater.stop()


def _look(access: Access) -> float:
    if access._grants is not None:
        access._grants.look()
    return access._interval
