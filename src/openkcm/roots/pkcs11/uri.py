# SPDX-License-Identifier: Apache-2.0
"""``pkcs11:`` URIs (RFC 7512), as far as they name a secret or private key on a token.

Invariant: strict. An attribute that is unknown, repeated, empty or malformed is refused, and so is a PIN inside the
URI: URIs are stored, logged and typed on command lines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from ...errors import RootMisconfigured

_PATH: Final = {"token", "serial", "manufacturer", "model", "slot-id", "object", "id", "type"}
_QUERY: Final = {"module-path", "pin-source"}
SECRET_KEY: Final = "secret-key"
PRIVATE_KEY: Final = "private"
_VALUE: Final = re.compile(r"(?:[A-Za-z0-9._~!$'()*+,=:@/&\[\]-]|%[0-9A-Fa-f]{2})+", re.ASCII)


@dataclass(frozen=True, slots=True)
class PKCS11URI:
    """A parsed URI; ``id`` is bytes, everything else text, None where it is not given.

    ``type`` is ``secret-key`` for an AES key, which it is where none is given, or ``private`` for an RSA key.
    """

    token: str | None = None
    serial: str | None = None
    manufacturer: str | None = None
    model: str | None = None
    slot_id: int | None = None
    object: str | None = None
    id: bytes | None = None
    module_path: str | None = None
    pin_source: str | None = None
    type: str = SECRET_KEY

    def __str__(self) -> str:
        """The canonical URI; parsing it gives the same again."""
        path = [f"{name}={quote(str(value), safe='')}" for name, value in self._path() if value is not None]
        if self.id is not None:
            path.append("id=" + "".join(f"%{byte:02x}" for byte in self.id))
        path.append(f"type={self.type}")
        query = [
            f"{name}={quote(value, safe='/:')}"
            for name, value in (("module-path", self.module_path), ("pin-source", self.pin_source))
            if value is not None
        ]
        return "pkcs11:" + ";".join(path) + ("?" + "&".join(query) if query else "")

    def token_part(self) -> tuple[str | int | None, ...]:
        """What of it names the token."""
        return self.token, self.serial, self.manufacturer, self.model, self.slot_id

    def _path(self) -> list[tuple[str, str | int | None]]:
        return [
            ("token", self.token),
            ("serial", self.serial),
            ("manufacturer", self.manufacturer),
            ("model", self.model),
            ("slot-id", self.slot_id),
            ("object", self.object),
        ]


def parse_pkcs11_uri(uri: str) -> PKCS11URI:
    """Parse a URI.

    Raises:
        RootMisconfigured: malformed, or it names no key, or it carries a PIN.
    """
    if not uri.startswith("pkcs11:"):
        raise RootMisconfigured("a PKCS#11 root starts with pkcs11:")
    path, _, query = uri.removeprefix("pkcs11:").partition("?")
    given = _attributes(path, ";", _PATH) | _attributes(query, "&", _QUERY)
    kind = _text(given.pop("type", None)) or SECRET_KEY
    if kind not in (SECRET_KEY, PRIVATE_KEY):
        raise RootMisconfigured("a root is an AES key, type=secret-key, or an RSA key, type=private")
    key_id = given.pop("id", None)
    slot = _text(given.pop("slot-id", None))
    if slot is not None and not re.fullmatch(r"0|[1-9][0-9]{0,19}", slot, re.ASCII):
        raise RootMisconfigured("slot-id is a decimal number")
    if key_id is None and "object" not in given:
        raise RootMisconfigured("name the key: object=LABEL or id=%01")
    return PKCS11URI(
        token=_text(given.get("token")),
        serial=_text(given.get("serial")),
        manufacturer=_text(given.get("manufacturer")),
        model=_text(given.get("model")),
        slot_id=None if slot is None else int(slot),
        object=_text(given.get("object")),
        id=key_id,
        module_path=_text(given.get("module-path")),
        pin_source=_text(given.get("pin-source")),
        type=kind,
    )


def _attributes(part: str, separator: str, known: set[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for piece in part.split(separator) if part else []:
        name, equals, value = piece.partition("=")
        if name == "pin-value":
            raise RootMisconfigured(
                "a PIN does not belong in a URI, which is stored and logged; use pin-source=file:PATH, "
                "pin-source=env:NAME or OPENKCM_PKCS11_PIN"
            )
        if name not in known or not equals or name in found:
            raise RootMisconfigured(
                f"the PKCS#11 URI has an unknown or repeated part; known are {', '.join(sorted(known))}"
            )
        if not _VALUE.fullmatch(value):
            raise RootMisconfigured(f"the PKCS#11 URI's {name} is empty, or holds characters to write as %XX")
        found[name] = unquote_to_bytes(value)
    return found


def _text(value: bytes | None) -> str | None:
    if value is None:
        return None
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise RootMisconfigured("the PKCS#11 URI holds text that is not UTF-8") from None
    if "\0" in text:
        raise RootMisconfigured("the PKCS#11 URI holds a zero byte")
    return text
