# SPDX-License-Identifier: Apache-2.0
"""Who is at the other end of a connection, by its certificate.

Invariant: a Peer is made only of a certificate that TLS has verified on this connection; whether it is still good is
asked again at every call, and while there are none now and then, because connections outlive certificates.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from ..errors import AccessDenied, OpenKCMError
from ..identity import fingerprints_of, identity_of
from .wire import REFUSED

_KNOWN: Final = 8192
"""Certificates whose reading is remembered."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One end of a connection.

    ``leaf`` is its certificate in DER, ``fingerprints`` what it can be revoked by, ``until`` the moment (Unix time) at
    which it expires, ``address`` where it called from, for the log.
    """

    identity: str
    leaf: bytes
    fingerprints: tuple[bytes, bytes]
    until: float
    address: str = ""

    def check_time(self, now: Callable[[], float] = time.time) -> None:
        """Raise AccessDenied if the certificate has expired since the connection was made."""
        if now() >= self.until:
            raise AccessDenied(REFUSED)


class Peers:
    """Reads certificates, each once; the address is that of each connection."""

    def __init__(self) -> None:
        self._known: dict[bytes, Peer] = {}

    def read(self, certificate: bytes, address: str = "") -> Peer:
        """The peer of a verified certificate, PEM or DER, that calls from ``address``.

        Raises:
            AccessDenied: it does not say, or not clearly, who its bearer is.
        """
        known = self._known.get(certificate)
        if known is None:
            known = _read(certificate)
            if len(self._known) >= _KNOWN:
                self._known.clear()
            self._known[certificate] = known
        # Who has a copy of it calls from somewhere else.
        return replace(known, address=address)


class Shares:
    """How many of something each certificate has, so that no one has all of it. Safe for threads.

    Args:
        most: that one certificate may have.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._taken: dict[bytes, int] = {}

    def take(self, peer: Peer) -> bool:
        """Give a peer one more, unless its certificate has as many as it may have."""
        with self._lock:
            taken = self._taken.get(peer.leaf, 0)
            if taken >= self._most:
                return False
            self._taken[peer.leaf] = taken + 1
            return True

    def give_back(self, peer: Peer) -> None:
        """It has one less."""
        with self._lock:
            left = self._taken[peer.leaf] - 1
            if left:
                self._taken[peer.leaf] = left
            else:
                del self._taken[peer.leaf]


def _read(certificate: bytes) -> Peer:
    try:
        if certificate.startswith(b"-----"):
            parsed = x509.load_pem_x509_certificate(certificate)
        else:
            parsed = x509.load_der_x509_certificate(certificate)
        leaf = parsed.public_bytes(Encoding.DER)
        identity = identity_of(parsed)
    except (ValueError, OpenKCMError):
        raise AccessDenied(REFUSED) from None
    return Peer(identity, leaf, fingerprints_of(parsed), parsed.not_valid_after_utc.timestamp())
