# SPDX-License-Identifier: Apache-2.0
"""Who a caller is: the one identity that a certificate stands for.

Invariant: a certificate has one identity or none, an identity has one spelling, and those of the two forms cannot be
taken for each other: ``spiffe://TRUST-DOMAIN/PATH`` from the certificate's only URI, else ``cn:NAME`` from its only
common name. What passed here is ASCII and safe in a log line, a table and a command line.

Whoever signs certificates decides who is who; that a chain is valid is the business of TLS, not of this module.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Final

from .errors import AccessDenied, FormatError, InvalidInput
from .limits import MAX_IDENTITY_BYTES, MAX_NAME_BYTES, MAX_TRUST_DOMAIN_BYTES

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

SPIFFE: Final = "spiffe://"
COMMON_NAME: Final = "cn:"

# SPIFFE-ID, sections 2.1 and 2.2: lower case trust domain; path segments not empty, not "." or ".."; no percent
# encoding, query, fragment, port or user.
_SPIFFE: Final = re.compile(
    rf"spiffe://[a-z0-9._-]{{1,{MAX_TRUST_DOMAIN_BYTES}}}(?:/(?!\.{{1,2}}(?:/|\Z))[A-Za-z0-9._-]+)+\Z",
    re.ASCII,
)
_COMMON_NAME: Final = re.compile(rf"cn:[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME_BYTES - 1}}}\Z", re.ASCII)

_FORMS: Final = (
    "an identity is spiffe://TRUST-DOMAIN/PATH (lower case domain; path segments of A-Z a-z 0-9 . _ -) or cn:NAME "
    f"(1 to {MAX_NAME_BYTES} characters of A-Z a-z 0-9 . _ -), of at most {MAX_IDENTITY_BYTES} characters"
)


def check_identity(value: object) -> str:
    """Return ``value`` if it is an identity in its one spelling.

    Source: the SPIFFE ID standard, sections 2.1 to 2.3.

    Raises:
        InvalidInput: not text, too long, or of neither form.
    """
    if not isinstance(value, str):
        raise InvalidInput(f"an identity is text, not {type(value).__name__}")
    if len(value) > MAX_IDENTITY_BYTES or not (_SPIFFE.match(value) or _COMMON_NAME.match(value)):
        raise InvalidInput(_FORMS)
    return value


def parse_certificate(certificate: bytes | Certificate) -> Certificate:
    """Parse one certificate in DER.

    Raises:
        FormatError: it is none.
    """
    from cryptography.x509 import Certificate, load_der_x509_certificate

    if isinstance(certificate, Certificate):
        return certificate
    try:
        return load_der_x509_certificate(bytes(certificate))
    except Exception:
        # The bytes are whoever's that connects, and the library has many errors for them.
        raise FormatError("not a certificate in DER; give the leaf certificate alone") from None


def identity_of(certificate: bytes | Certificate) -> str:
    """Return the identity of a leaf certificate: its SPIFFE ID, else ``cn:`` and its common name.

    Args:
        certificate: the leaf, in DER or parsed. Its chain must have been verified by somebody.

    Raises:
        FormatError: it is no certificate, or an extension of it cannot be read.
        AccessDenied: it stands for no identity, or for more than one: several URIs (X509-SVID, section 2), a URI that
            is no SPIFFE ID, no URI and not exactly one usable common name; or it is one that may sign others
            (X509-SVID, section 4).

    Source: the SPIFFE X509-SVID standard.
    """
    from cryptography import x509

    parsed = parse_certificate(certificate)
    try:
        signs = _may_sign(parsed)
        uris = _uris(parsed)
        names = [name.value for name in parsed.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
    except Exception:
        raise FormatError("the certificate has an extension or name that cannot be read") from None
    if signs:
        raise AccessDenied("the certificate may sign others, so it is nobody's; use a leaf certificate")
    if len(uris) > 1:
        raise AccessDenied("the certificate has several URIs, so it stands for nobody; issue it with one")
    if uris:
        # Not one of the other form: a URI may be "cn:NAME" too.
        return _checked(uris[0], SPIFFE, "URI")
    if len(names) != 1 or not isinstance(names[0], str):
        raise AccessDenied("the certificate has no URI and not exactly one common name; issue it with one")
    return _checked(COMMON_NAME + names[0], COMMON_NAME, "common name")


def fingerprints_of(certificate: bytes | Certificate) -> tuple[bytes, bytes]:
    """Return the two names by which a certificate is revoked: SHA-256 of its DER, and of its signed part.

    The first is what ``openssl x509 -fingerprint -sha256`` prints. It alone would not do: who has a certificate can
    make another of it that is as valid and has another fingerprint, since an ECDSA signature (r, s) is as good as
    (r, n - s). The signed part cannot be changed.

    Raises:
        FormatError: it is no certificate.
    """
    from cryptography.hazmat.primitives.serialization import Encoding

    parsed = parse_certificate(certificate)
    whole = parsed.public_bytes(Encoding.DER)
    return hashlib.sha256(whole).digest(), hashlib.sha256(parsed.tbs_certificate_bytes).digest()


def _checked(identity: str, form: str, what: str) -> str:
    try:
        if identity.startswith(form):
            return check_identity(identity)
    except InvalidInput:
        pass
    # Not what it says: that comes from whoever connects, and may be anything.
    raise AccessDenied(f"the {what} of the certificate is no identity: {_FORMS}")


def _uris(certificate: Certificate) -> list[str]:
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def _may_sign(certificate: Certificate) -> bool:
    from cryptography import x509

    extensions = certificate.extensions
    try:
        if extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            return True
    except x509.ExtensionNotFound:
        pass
    try:
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return usage.key_cert_sign or usage.crl_sign
