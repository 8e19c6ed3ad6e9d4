# SPDX-License-Identifier: Apache-2.0
"""Certificates for tests, of every kind of key and with every fault."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CLIENT = ExtendedKeyUsageOID.CLIENT_AUTH
SERVER = ExtendedKeyUsageOID.SERVER_AUTH
NOW = datetime.datetime.now(datetime.UTC)
HOUR = datetime.timedelta(hours=1)

KEYS = {
    "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "p521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "rsa1024": lambda: rsa.generate_private_key(65537, 1024),
}


@cache
def key_of(kind: str, number: int = 0) -> Any:
    """A key of a kind; the same for the same number, because RSA keys take time."""
    return KEYS[kind]()


def pem_of(key: Any) -> bytes:
    """A private key in PEM (PKCS #8)."""
    data: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return data


class Authority:
    """A CA, at the top or below another."""

    def __init__(self, name: str = "test CA", above: Authority | None = None) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = (above or self)._sign(
            self.name, self.key.public_key(), None, None, NOW + 24 * HOUR
        )
        self.above = above

    def _sign(
        self,
        subject: x509.Name,
        key: Any,
        usage: x509.ObjectIdentifier | None,
        names: Sequence[x509.GeneralName] | None,
        until: datetime.datetime,
    ) -> x509.Certificate:
        """A certificate: of a CA without a usage."""
        ca = usage is None
        builder = (
            x509.CertificateBuilder(self.name, subject, key, x509.random_serial_number())
            .not_valid_before(min(NOW, until) - HOUR)
            .not_valid_after(until)
            .add_extension(x509.BasicConstraints(ca, None), True)
            .add_extension(x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False)
        )
        if usage is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        return builder.sign(self.key, SHA256())

    def issue(
        self,
        key: Any,
        usage: x509.ObjectIdentifier,
        *names: x509.GeneralName,
        until: datetime.datetime = NOW + HOUR,
    ) -> list[x509.Certificate]:
        """A leaf's chain, up to below the top."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "leaf")])
        chain = [self._sign(subject, key.public_key(), usage, names, until)]
        above: Authority | None = self
        while above is not None and above.above is not None:
            chain.append(above.certificate)
            above = above.above
        return chain


def write_pem(path: Path, certificates: Sequence[x509.Certificate]) -> Path:
    """Write certificates into a file."""
    path.write_bytes(b"".join(each.public_bytes(Encoding.PEM) for each in certificates))
    return path


def write_key(path: Path, data: bytes, mode: int = 0o600) -> Path:
    """Write a private key into a file."""
    path.write_bytes(data)
    path.chmod(mode)
    return path
