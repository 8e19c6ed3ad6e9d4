# SPDX-License-Identifier: Apache-2.0
"""Root keys on tokens: what a customer's must look like, and making one.

Invariant: what ``grant`` tells a customer to make is what ``create_token_key`` makes: a key that cannot be read out and
can do nothing but what a root does.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any, Final

from ...errors import RootMisconfigured
from ..base import ANSWER_SECONDS, Grant
from .answers import ask
from .modules import Module, module_at
from .pins import Pin
from .uri import PKCS11URI, PRIVATE_KEY, SECRET_KEY

AES: Final = "aes"
AES_WRAP: Final = "aes-wrap"
RSA: Final = "rsa"

NEW_RSA_BITS: Final = 3072
MAKING_SECONDS: Final = 60.0
"""How long a token may take to make a key; an RSA key takes a while."""

USER: Final = "CKU_USER"

_SECRET: Final[Mapping[str, str]] = {
    "CKA_CLASS": "CKO_SECRET_KEY",
    "CKA_KEY_TYPE": "CKK_AES",
    "CKA_VALUE_LEN": "32",
}
_PRIVATE: Final[Mapping[str, str]] = {
    "CKA_CLASS": "CKO_PRIVATE_KEY",
    "CKA_KEY_TYPE": "CKK_RSA",
    "CKA_MODULUS": f"{NEW_RSA_BITS} bits, 2048 at least",
}
_GUARDED: Final[Mapping[str, str]] = {
    "CKA_TOKEN": "true",
    "CKA_PRIVATE": "true",
    "CKA_SENSITIVE": "true",
    "CKA_EXTRACTABLE": "false",
}
_USES: Final = ("ENCRYPT", "DECRYPT", "WRAP", "UNWRAP", "SIGN", "VERIFY", "DERIVE")
_ALLOWED: Final[Mapping[str, tuple[str, ...]]] = {
    AES: ("ENCRYPT", "DECRYPT"),
    AES_WRAP: ("WRAP", "UNWRAP"),
    RSA: ("DECRYPT",),
}
_TOOL_MECHANISMS: Final[Mapping[str, str]] = {
    AES: "AES-GCM",
    AES_WRAP: "0x210B,0x210A",  # CKM_AES_KEY_WRAP_KWP and CKM_AES_KEY_WRAP_PAD, which the tool has no names for
    RSA: "RSA-PKCS-OAEP,RSA-X-509",
}
_MECHANISMS: Final[Mapping[str, str]] = {
    AES: "CKM_AES_GCM, else CKM_AES_KEY_WRAP_KWP or CKM_AES_KEY_WRAP_PAD",
    AES_WRAP: "CKM_AES_KEY_WRAP_KWP, else CKM_AES_KEY_WRAP_PAD",
    RSA: "CKM_RSA_PKCS_OAEP with CKM_SHA256 and CKG_MGF1_SHA256, else CKM_RSA_X_509",
}


def grant_for(uri: PKCS11URI, module: str, identity: str | None) -> Grant:
    """What a customer must make on the token; PKCS#11 knows its callers by the user's PIN only."""
    kind = RSA if uri.type == PRIVATE_KEY else AES
    user = identity or USER
    lines = [
        f"The key, made on the token{_of(uri.token)} and used by its {user}, whose PIN is ours to hold:",
        "",
        *_attributes(uri, kind),
        "",
        "With OpenSC, which asks for the PIN (without --allowed-mechanisms where the token does not know it;",
        "what it does not set is the token's default, to be checked with the vendor's own tool):",
        "",
        _command(uri, module, kind),
    ]
    if kind == AES:
        lines += [
            "",
            "Where the token has no CKM_AES_GCM, or makes nonces of its own for it, a key for key wrap instead,",
            "with CKA_WRAP and CKA_UNWRAP true in the place of CKA_ENCRYPT and CKA_DECRYPT:",
            "",
            _command(uri, module, AES_WRAP),
        ]
    permissions = tuple(f"CKA_{use}" for use in _ALLOWED[kind])
    return Grant("key attributes", "\n".join(lines), permissions, user)


def _attributes(uri: PKCS11URI, kind: str) -> list[str]:
    named = {
        **({} if uri.object is None else {"CKA_LABEL": uri.object}),
        **({} if uri.id is None else {"CKA_ID": uri.id.hex()}),
    }
    uses = {f"CKA_{use}": "true" if use in _ALLOWED[kind] else "false" for use in _USES}
    if kind == RSA:
        for use in ("ENCRYPT", "WRAP", "VERIFY"):
            del uses[f"CKA_{use}"]  # the public half's
    rows = {
        **(_PRIVATE if kind == RSA else _SECRET),
        **named,
        **_GUARDED,
        **uses,
        "mechanism": _MECHANISMS[kind],
    }
    return [f"{name:<16} {value}" for name, value in rows.items()]


def _command(uri: PKCS11URI, module: str, kind: str) -> str:
    words = ["pkcs11-tool", "--module", module]
    if uri.token is not None:
        words += ["--token-label", uri.token]
    words += ["--login", "--login-type", "user"]
    if kind == RSA:
        words += ["--keypairgen", "--key-type", f"rsa:{NEW_RSA_BITS}"]
    else:
        words += ["--keygen", "--key-type", "AES:32"]
    if uri.object is not None:
        words += ["--label", uri.object]
    if uri.id is not None:
        words += ["--id", uri.id.hex()]
    words += ["--sensitive", "--private", "--usage-wrap" if kind == AES_WRAP else "--usage-decrypt"]
    words += ["--allowed-mechanisms", _TOOL_MECHANISMS[kind]]
    return shlex.join(words)


def _of(token: str | None) -> str:
    return "" if token is None else f" {token}"


def create_token_key(
    module_path: str,
    token: str,
    pin_source: str,
    label: str,
    key_id: bytes = b"\x01",
    *,
    kind: str = AES,
) -> str:
    """Make a root key that cannot be extracted, and return its root URI.

    Args:
        module_path: the PKCS#11 module.
        token: the label of an initialised token.
        pin_source: ``file:PATH`` or ``env:NAME``.
        label, key_id: of the new key.
        kind: ``aes`` (AES-256, to encrypt and decrypt), ``aes-wrap`` (the same, to wrap and unwrap) or ``rsa``.

    Raises:
        RootDenied, RootUnavailable, RootMisconfigured.
    """
    if kind not in _ALLOWED:
        raise RootMisconfigured(f"a root key is one of {', '.join(_ALLOWED)}")
    uri = PKCS11URI(
        token=token,
        object=label,
        id=key_id,
        module_path=module_path,
        pin_source=pin_source,
        type=PRIVATE_KEY if kind == RSA else SECRET_KEY,
    )

    def attempt(module: Module, pin: Pin | None, started: float) -> None:
        module.write(uri, pin, lambda session: _make(session, kind, label, key_id))

    module_at(module_path).use(pin_source, attempt, MAKING_SECONDS if kind == RSA else ANSWER_SECONDS)
    return str(uri)


def _make(session: Any, kind: str, label: str, key_id: bytes) -> None:
    from pkcs11 import Attribute, KeyType

    uses = {Attribute[use]: use in _ALLOWED[kind] for use in _USES}
    guarded = {Attribute.SENSITIVE: True, Attribute.EXTRACTABLE: False, Attribute.PRIVATE: True}
    if kind == RSA:
        ask(
            session.generate_keypair,
            KeyType.RSA,
            NEW_RSA_BITS,
            label=label,
            id=key_id,
            store=True,
            public_template={Attribute[use]: use == "ENCRYPT" for use in ("ENCRYPT", "WRAP", "VERIFY")},
            private_template=guarded
            | {
                use: value
                for use, value in uses.items()
                if use.name in ("DECRYPT", "UNWRAP", "SIGN", "DERIVE")
            },
        )
    else:
        ask(
            session.generate_key,
            KeyType.AES,
            256,
            label=label,
            id=key_id,
            store=True,
            template=guarded | uses,
        )
