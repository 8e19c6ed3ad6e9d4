# SPDX-License-Identifier: Apache-2.0
"""Who a certificate stands for: one spelling, two forms that cannot be mixed up, and nobody where there is doubt."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from openkcm import AccessDenied, FormatError, InvalidInput
from openkcm.identity import check_identity, fingerprints_of, identity_of
from support import refused

KEY = ec.generate_private_key(ec.SECP256R1())
NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
URI = "spiffe://example/gateway/one"


def certificate(
    *names: str,
    uris: tuple[str, ...] = (),
    others: tuple[x509.GeneralName, ...] = (),
    ca: bool | None = False,
) -> x509.Certificate:
    """A certificate with these common names and URIs, signed by its own key."""
    # Not validated, as a hostile CA would not.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name, _validate=False) for name in names])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(KEY.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW)
        .not_valid_after(NOW + datetime.timedelta(days=1))
    )
    sans = [*map(x509.UniformResourceIdentifier, uris), *others]
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    return builder.sign(KEY, hashes.SHA256())


def der(found: x509.Certificate) -> bytes:
    return found.public_bytes(Encoding.DER)


@pytest.mark.parametrize(
    "identity",
    [
        URI,
        "spiffe://a/b",
        "spiffe://prod-1.example_x.com/ns/Default/sa/a.b-c_d",
        "spiffe://example/...",
        "spiffe://example/.a/b.",
        "spiffe://" + "a" * 255 + "/x",
        "spiffe://example/" + "p" * 495,
        "cn:gateway-1.example.com",
        "cn:A",
        "cn:" + "n" * 128,
    ],
)
def test_these_are_identities(identity: str) -> None:
    assert check_identity(identity) == identity


@pytest.mark.parametrize(
    "identity",
    [
        *("", "*", "gateway", "cn:", "cn:-x", "cn:a b", "cn:a/b", "cn:spiffe://example/x", "cn:a:b", "CN:gateway"),
        *("cn:gateway\n", "cn:gateway\0", "cn:g\u0430teway", "cn:gateway\u200b", "cn:" + "n" * 129, "cn:*"),
        *("spiffe://", "spiffe://example", "spiffe://example/", "spiffe:///x", "spiffe:/example/x", "spiffe://example//x"),
        *("SPIFFE://example/x", "Spiffe://example/x", "spiffe://Example/x", "spiffe://example/x/", "spiffe://example/./x"),
        *("spiffe://example/../x", "spiffe://example/x/..", "spiffe://example/x/.", "spiffe://example/a%2fb"),
        *("spiffe://example/x?y=1", "spiffe://example/x#y", "spiffe://example:443/x", "spiffe://u@example/x"),
        *("spiffe://example/x\n", "spiffe://example/x\0", "\nspiffe://example/x", " spiffe://example/x"),
        *("spiffe://ex\u0430mple/x", "spiffe://example/\u0445", "spiffe://example/x\r\nadmin", "https://example/x"),
        *("spiffe://" + "a" * 256 + "/x", "spiffe://example/" + "p" * 496),
        *("spiffe://example/x;y", "spiffe://example/x y"),
    ],
)  # fmt: skip
def test_these_are_none(identity: str) -> None:
    refused(lambda: check_identity(identity), InvalidInput)


@pytest.mark.parametrize("identity", [None, 5, b"cn:gateway", ["cn:gateway"]])
def test_an_identity_is_text(identity: object) -> None:
    refused(lambda: check_identity(identity), InvalidInput)


@given(st.text(max_size=40))
def test_no_text_is_both_and_none_is_unsafe(text: str) -> None:
    for identity in (text, f"cn:{text}", f"spiffe://example/{text}"):
        try:
            checked = check_identity(identity)
        except InvalidInput:
            continue
        assert checked.isascii()
        assert checked.isprintable()
        assert not set(checked) & set(" '\"\\<>$`*?#%")
        assert checked.startswith("cn:") != checked.startswith("spiffe://")


def test_the_uri_is_who_it_is_whatever_the_common_name_says() -> None:
    dns = (x509.DNSName("core.example"), x509.RFC822Name("a@example"))
    for found in (
        certificate("gateway", uris=(URI,)),
        certificate("spiffe://example/admin", uris=(URI,), others=dns),
        certificate(uris=(URI,)),
        certificate("a", "b", uris=(URI,), ca=None),
    ):
        assert identity_of(found) == identity_of(der(found)) == URI


def test_without_a_uri_it_is_the_common_name() -> None:
    assert identity_of(certificate("gateway-1")) == "cn:gateway-1"
    assert identity_of(certificate("gateway-1", others=(x509.DNSName("other"),))) == "cn:gateway-1"


@pytest.mark.filterwarnings("ignore:Attribute's length must be:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: certificate("gateway", uris=(URI, "spiffe://example/gateway/two")),
        lambda: certificate("gateway", uris=(URI, URI)),
        lambda: certificate("gateway", uris=(URI, "https://example/x")),
        lambda: certificate("gateway", uris=("https://example/x",)),
        lambda: certificate("gateway", uris=("SPIFFE://example/x",)),
        lambda: certificate("gateway", uris=("spiffe://example",)),
        lambda: certificate("gateway", uris=("cn:gateway",)),
        lambda: certificate(),
        lambda: certificate("gateway", "gateway"),
        lambda: certificate("one", "two"),
        lambda: certificate("spiffe://example/gateway/one"),
        lambda: certificate("cn:gateway"),
        lambda: certificate(""),
        lambda: certificate("gateway\0.example"),
        lambda: certificate("gateway\nadmin"),
        lambda: certificate("g\u0430teway"),
        lambda: certificate("gateway\u202e"),
        lambda: certificate("*"),
        lambda: certificate("n" * 129),
        lambda: certificate("gateway", uris=(URI,), ca=True),
        lambda: certificate("gateway", ca=True),
    ],
)
def test_in_doubt_it_is_nobody(make: Callable[[], x509.Certificate]) -> None:
    found = make()
    error = refused(lambda: identity_of(found), AccessDenied)
    assert str(error).isascii()
    assert str(error).isprintable()


def test_one_that_may_sign_by_its_key_usage_is_nobody() -> None:
    for sign, crl in ((True, False), (False, True)):
        usage = x509.KeyUsage(True, False, False, False, False, sign, crl, False, False)
        base = certificate("gateway")
        builder = (
            x509.CertificateBuilder()
            .subject_name(base.subject)
            .issuer_name(base.subject)
            .public_key(KEY.public_key())
            .serial_number(1)
            .not_valid_before(NOW)
            .not_valid_after(NOW + datetime.timedelta(days=1))
            .add_extension(usage, critical=True)
        )
        refused(lambda builder=builder: identity_of(builder.sign(KEY, hashes.SHA256())), AccessDenied)


@pytest.mark.parametrize("bad", [b"\0", b"\n", b"\xff", b" ", b"%"])
def test_bytes_in_a_uri_that_no_library_would_write(bad: bytes) -> None:
    forged = der(certificate("gateway", uris=(URI,))).replace(b"gateway/one", b"gateway" + bad + b"one")
    with pytest.raises((AccessDenied, FormatError)):
        identity_of(forged)


@pytest.mark.parametrize("data", [b"", b"x", b"\x30\x82", b"-----BEGIN CERTIFICATE-----", b"\0" * 1000])
def test_what_is_no_certificate(data: bytes) -> None:
    refused(lambda: identity_of(data), FormatError)
    refused(lambda: fingerprints_of(data), FormatError)


def test_a_certificate_with_something_after_it_is_none() -> None:
    refused(lambda: identity_of(der(certificate("gateway")) + b"\0"), FormatError)
    refused(lambda: identity_of(der(certificate("gateway"))[:-1]), FormatError)


BASE = der(certificate("gateway", uris=(URI,), others=(x509.DNSName("core.example"),)))


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
@pytest.mark.filterwarnings("ignore:Attribute's length must be:UserWarning")
@given(st.lists(st.tuples(st.integers(0, len(BASE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_an_altered_certificate_is_somebody_or_a_typed_error(changes: list[tuple[int, int]]) -> None:
    altered = bytearray(BASE)
    for at, value in changes:
        altered[at] = value
    try:
        identity = identity_of(bytes(altered))
    except (AccessDenied, FormatError):
        return
    assert check_identity(identity) == identity


def test_a_certificate_goes_by_its_bytes_and_by_what_is_signed() -> None:
    found = certificate("gateway")
    whole, signed = fingerprints_of(der(found))
    assert whole == hashlib.sha256(der(found)).digest() == found.fingerprint(hashes.SHA256())
    assert signed == hashlib.sha256(found.tbs_certificate_bytes).digest()
    assert fingerprints_of(found) == (whole, signed)
