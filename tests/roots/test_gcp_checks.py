# SPDX-License-Identifier: Apache-2.0
"""What the Cloud KMS root checks of an answer that says yes: who gave it, whether it is whole, whether it is one."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from gcp_support import CONTEXT, NAME, SEALED
from gcp_support import cloud as cloud
from gcp_support import key as key
from gcp_support import root as root
from openkcm.errors import RootMisconfigured, RootUnavailable
from openkcm.roots.gcp import MAX_CIPHERTEXT_BYTES, GCPRoot
from openkcm.roots.gcp.session import MAX_ANSWER_BYTES, crc32c
from openkcm.testing.gcp import GCPKey
from support import refused


def encrypted(**other: object) -> dict[str, object]:
    """A right answer to an encryption, with these fields in place of its own; None leaves one out."""
    ciphertext = bytes(range(100))
    right = {
        "name": f"{NAME}/cryptoKeyVersions/1",
        "ciphertext": base64.b64encode(ciphertext).decode(),
        "ciphertextCrc32c": str(crc32c(ciphertext)),
        "verifiedPlaintextCrc32c": True,
        "verifiedAdditionalAuthenticatedDataCrc32c": True,
    }
    return {name: value for name, value in (right | other).items() if value is not None}


SHORT = {"ciphertext": base64.b64encode(bytes(27)).decode(), "ciphertextCrc32c": str(crc32c(bytes(27)))}
LONG = {
    "ciphertext": base64.b64encode(bytes(MAX_CIPHERTEXT_BYTES + 1)).decode(),
    "ciphertextCrc32c": str(crc32c(bytes(MAX_CIPHERTEXT_BYTES + 1))),
}


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        ({}, None),
        ({"ciphertextCrc32c": "1"}, RootUnavailable),
        ({"ciphertextCrc32c": None}, RootUnavailable),
        ({"ciphertext": None}, RootUnavailable),
        ({"verifiedPlaintextCrc32c": False}, RootUnavailable),
        ({"verifiedPlaintextCrc32c": None}, RootUnavailable),
        ({"verifiedAdditionalAuthenticatedDataCrc32c": False}, RootUnavailable),
        ({"name": None}, RootMisconfigured),
        ({"name": NAME}, RootMisconfigured),
        ({"name": f"{NAME}2/cryptoKeyVersions/1"}, RootMisconfigured),
        ({"name": f"{NAME}/cryptoKeyVersions/1/x"}, RootMisconfigured),
        (SHORT, RootMisconfigured),
        (LONG, RootMisconfigured),
        ({"ciphertext": 5}, RootMisconfigured),
        ({"ciphertext": "*"}, RootUnavailable),  # protobuf overlooks what is no base64
        ({"ciphertextCrc32c": "many"}, RootMisconfigured),
        ({"verifiedPlaintextCrc32c": "yes"}, RootMisconfigured),
    ],
)
def test_an_encryption_is_checked(
    key: GCPKey, root: GCPRoot, other: dict[str, object], kind: type[Exception] | None
) -> None:
    assert key.resource == NAME
    key.reply(encrypted(**other))
    if kind is None:
        assert root.wrap(SEALED, CONTEXT) == b"\x01" + bytes(range(100))
    else:
        refused(lambda: root.wrap(SEALED, CONTEXT), kind)


PLAIN = {"plaintext": base64.b64encode(SEALED).decode(), "plaintextCrc32c": str(crc32c(SEALED))}
DEEP = b'{"x":' * 50_000 + b"1" + b"}" * 50_000


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (PLAIN, None),
        (PLAIN | {"somethingNew": {"x": 1}}, None),
        (PLAIN | {"plaintextCrc32c": "1"}, RootUnavailable),
        (PLAIN | {"plaintextCrc32c": None}, RootMisconfigured),
        ({"plaintext": PLAIN["plaintext"]}, RootMisconfigured),
        ({"plaintextCrc32c": "0"}, RootMisconfigured),
        ({}, RootMisconfigured),
        ([], RootMisconfigured),
        ("text", RootMisconfigured),
        (None, RootMisconfigured),
        (PLAIN | {"plaintext": 5}, RootMisconfigured),
        (PLAIN | {"plaintext": ["x"]}, RootMisconfigured),
        (PLAIN | {"plaintext": "*"}, RootMisconfigured),
        (PLAIN | {"plaintextCrc32c": "many"}, RootMisconfigured),
        (PLAIN | {"plaintextCrc32c": 10**30}, RootMisconfigured),
        (b"", RootMisconfigured),
        (b"{", RootMisconfigured),
        (b"\xff\xfe\x00", RootMisconfigured),
        (b"<html>a portal wants your password</html>", RootMisconfigured),
        (DEEP, RootMisconfigured),
        (json.dumps(PLAIN).encode() + b" " * MAX_ANSWER_BYTES, RootMisconfigured),
    ],
)
def test_a_decryption_is_checked(
    key: GCPKey, root: GCPRoot, body: object, kind: type[Exception] | None
) -> None:
    wrapped = root.wrap(SEALED, CONTEXT)
    key.reply(body)
    if kind is None:
        assert root.unwrap(wrapped, CONTEXT) == SEALED
    else:
        refused(lambda: root.unwrap(wrapped, CONTEXT), kind)
    key.heal()
    assert root.unwrap(wrapped, CONTEXT) == SEALED, "nothing is left of a bad answer on the connection"


@pytest.mark.parametrize("field", ["plaintext", "additional_authenticated_data"])
def test_what_comes_altered_is_not_encrypted(
    root: GCPRoot, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    """The service finds that the checksum is not that of what came."""
    root.wrap(SEALED, CONTEXT)
    encrypt = root._client.encrypt  # type: ignore[union-attr]

    def on_the_way(**request: Any) -> Any:
        return encrypt(**request | {field: b"altered on the way"})

    monkeypatch.setattr(root._client, "encrypt", on_the_way)
    error = refused(lambda: root.wrap(SEALED, CONTEXT), RootUnavailable)
    assert error.retryable  # type: ignore[attr-defined]
