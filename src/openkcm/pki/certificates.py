# SPDX-License-Identifier: Apache-2.0
"""The certificates themselves: what is in them, and which names they may bear.

Invariant: what is made here is accepted by OpenSSL, BoringSSL and ``cryptography.x509.verification`` alike, and for
one purpose only; serial numbers are 159 random bits (RFC 5280, section 4.1.2.2).
"""

from __future__ import annotations

import datetime
import enum
import ipaddress
import re
import secrets
from collections.abc import Sequence
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ..errors import InvalidInput
from ..keys import check_name

MAX_DAYS: Final = 3650
MAX_COMMON_NAME: Final = 64
"""X.520, ub-common-name; OpenSSL refuses longer ones."""

SKEW: Final = datetime.timedelta(minutes=5)
"""Certificates begin so much before they were made, for clocks that differ."""

_LABEL: Final = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_DNS: Final = re.compile(rf"(?=.{{1,253}}\Z)(?:\*\.)?{_LABEL}(?:\.{_LABEL})*\Z", re.ASCII)


class Role(enum.StrEnum):
    """What a certificate is for; none is for both."""

    SERVER = "server"
    CLIENT = "client"


_USAGES: Final = {Role.SERVER: ExtendedKeyUsageOID.SERVER_AUTH, Role.CLIENT: ExtendedKeyUsageOID.CLIENT_AUTH}


def new_key() -> ec.EllipticCurvePrivateKey:
    """Make a P-256 key, which every TLS library takes."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The private key in PEM (PKCS #8), not encrypted."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def ca_certificate(
    key: ec.EllipticCurvePrivateKey, now: datetime.datetime, lifetime: datetime.timedelta
) -> x509.Certificate:
    """A self-signed CA that signs leaves only."""
    # Random, so that two CAs are two names to whoever looks for a certificate's issuer.
    name = x509.Name(
        [x509.NameAttribute(NameOID.COMMON_NAME, f"OpenKCM development CA {secrets.token_hex(4)}")]
    )
    public = key.public_key()
    return (
        _builder(name, name, public, now, lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )


def leaf_certificate(
    public: ec.EllipticCurvePublicKey,
    name: str,
    role: Role,
    sans: list[x509.GeneralName],
    valid: tuple[datetime.datetime, datetime.timedelta],
    issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey],
) -> x509.Certificate:
    """A certificate for one role; ``valid`` is from when and for how long."""
    ca, ca_key = issuer
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        _builder(subject, ca.subject, public, *valid)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([_USAGES[role]]), critical=False)
        .add_extension(x509.SubjectAlternativeName(sans), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False
        )
        .sign(ca_key, hashes.SHA256())
    )


def crl(
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    revoked: Sequence[x509.RevokedCertificate],
    now: datetime.datetime,
) -> bytes:
    """The list of what was revoked, in PEM."""
    # There is nobody to renew it: it is good for as long as the CA is.
    ends = max(ca.not_valid_after_utc, now)
    builder = x509.CertificateRevocationListBuilder(
        issuer_name=ca.subject, last_update=now - SKEW, next_update=ends
    )
    for entry in revoked:
        builder = builder.add_revoked_certificate(entry)
    public = ca_key.public_key()
    signed = (
        builder.add_extension(x509.CRLNumber(int(now.timestamp() * 1000)), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    return signed.public_bytes(Encoding.PEM)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    now: datetime.datetime,
    lifetime: datetime.timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + lifetime)
    )


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def role_of(certificate: x509.Certificate) -> Role:
    """What one of our certificates is for."""
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    return Role.SERVER if ExtendedKeyUsageOID.SERVER_AUTH in usage else Role.CLIENT


def sans_of(certificate: x509.Certificate) -> list[x509.GeneralName]:
    """The alternative names of one of our certificates."""
    return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)


def san_text(name: x509.GeneralName) -> str:
    """An alternative name for people, with what it is before it."""
    kinds = {x509.DNSName: "dns", x509.IPAddress: "ip", x509.UniformResourceIdentifier: "uri"}
    return f"{kinds.get(type(name), 'email')}:{name.value}"


# ---- names and numbers that may be asked for -------------------------------------------------------------------


def check_leaf_name(name: object) -> str:
    """Return a certificate's name, which is a folder and a common name.

    Raises:
        InvalidInput: not a name as tenants have it, or over 64 characters, or one of the folder's own files.
    """
    checked = check_name(name, "certificate")
    if len(checked) > MAX_COMMON_NAME:
        raise InvalidInput(f"a certificate's name has at most {MAX_COMMON_NAME} characters")
    if checked in ("issued", "ca.crt", "ca.key", "crl.pem"):
        raise InvalidInput(f"a certificate cannot be named {checked}; the CA has a file of that name")
    return checked


def dns_name(name: str) -> x509.DNSName:
    """A host name, in lower case; ``*.`` may stand before it.

    Raises:
        InvalidInput: not a host name (RFC 1123), or not ASCII: write an international name in its xn-- form.
    """
    lower = name.lower()
    if not _DNS.match(lower) or is_address(lower):
        raise InvalidInput(f"{name!r} is no host name; an address goes with --ip")
    return x509.DNSName(lower)


def ip_address(address: str) -> x509.IPAddress:
    """An IPv4 or IPv6 address.

    Raises:
        InvalidInput: it is none, or one with a zone.
    """
    if not is_address(address) or "%" in address:
        raise InvalidInput(f"{address!r} is no IP address; a host name goes with --dns")
    return x509.IPAddress(ipaddress.ip_address(address))


def is_address(text: str) -> bool:
    """Whether this is an IP address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def lifetime(days: float) -> datetime.timedelta:
    """How long a certificate is to be valid.

    Raises:
        InvalidInput: not above 0, or over 3650 days.
    """
    if not 0 < days <= MAX_DAYS:
        raise InvalidInput(f"a certificate is valid for more than 0 and at most {MAX_DAYS} days")
    return datetime.timedelta(days=days)
