# SPDX-License-Identifier: Apache-2.0
"""The PKCS#11 URI parser: what it accepts has one canonical text, which parses to the same; no PIN is ever taken."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from openkcm.errors import RootMisconfigured
from openkcm.roots.pkcs11.uri import parse_pkcs11_uri

# RFC 7512, section 3, and what this project adds to or takes from it.
EXAMPLES = (
    "pkcs11:object=my-pubkey;type=public",
    "pkcs11:token=The%20Software%20PKCS%2311%20Softtoken;manufacturer=Snake%20Oil,%20Inc.;model=1.0?pin-source=file:/p",
    "pkcs11:object=my-certificate;type=cert;id=%69%95%3E%5C%F4%BD%EC%91;serial=?pin-source=file:/etc/token_pin",
    "pkcs11:object=root;type=secret-key;token=airline?module-path=/usr/lib/softhsm/libsofthsm2.so",
    "pkcs11:slot-id=0;id=%01?pin-source=env:PIN&module-path=/m.so",
    "pkcs11:object=a?pin-value=1234",
    "pkcs11:object=%C3%A9;serial=42;model=m;manufacturer=n",
    "pkcs11:",
)


def seeds() -> Iterator[bytes]:
    for example in EXAMPLES:
        yield example.encode()


def check(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    with contextlib.suppress(RootMisconfigured):
        found = parse_pkcs11_uri(text)
        assert "pin-value" not in text.partition("?")[2].split("=")[0]
        canonical = str(found)
        assert parse_pkcs11_uri(canonical) == found
        assert str(parse_pkcs11_uri(canonical)) == canonical
        assert canonical.isascii() and canonical.isprintable()
