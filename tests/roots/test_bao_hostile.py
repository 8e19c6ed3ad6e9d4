# SPDX-License-Identifier: Apache-2.0
"""What no OpenBao or Vault would answer: a ``bao-transit:`` root believes nothing, and fails in our own words."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import pytest

from bao_support import BLOB, CONTEXT, SEALED, answering, in_time
from bao_support import bao as bao
from bao_support import key as key
from openkcm.errors import (
    DecryptError,
    OpenKCMError,
    RootMisconfigured,
    RootUnavailable,
)
from openkcm.roots.bao.http import MAX_ANSWER_BYTES
from openkcm.testing.https import Request, Response, Server
from openkcm.testing.openbao import OpenBao, OpenBaoKey
from support import refused

_GOOD = base64.b64encode(bytes(132)).decode()
HOSTILE: list[Any] = [
    b"",
    b"garbage",
    b"\xff\xfe",
    b"[]",
    b"null",
    b"5",
    b"{}",
    b"{" * 100_000,
    b"[" * 100_000,
    b'{"data":' + b"9" * 10_000 + b"}",
    b" " * (MAX_ANSWER_BYTES + 1),
    {"data": None},
    {"data": []},
    {"data": "vault:v1:AAAA"},
    {"data": {}},
    {"data": {"ciphertext": None, "plaintext": None}},
    {"data": {"ciphertext": 5, "plaintext": 5}},
    {"data": {"ciphertext": [], "plaintext": {}}},
    {"data": {"ciphertext": "", "plaintext": ""}},
    {"data": {"ciphertext": "vault:v1:", "plaintext": "="}},
    {"data": {"ciphertext": f"vault:v0:{_GOOD}", "plaintext": "A"}},
    {"data": {"ciphertext": f"vault:v01:{_GOOD}", "plaintext": "AB=="}},
    {"data": {"ciphertext": f"vault:v-1:{_GOOD}", "plaintext": "AAAA\n"}},
    {"data": {"ciphertext": f"vault:v1:{_GOOD}\n", "plaintext": "AA AA"}},
    {"data": {"ciphertext": f"vault:v9999999999:{_GOOD}", "plaintext": "-_-_"}},
    {"data": {"ciphertext": f"VAULT:v1:{_GOOD}", "plaintext": "ÄÄÄÄ"}},
    {"data": {"ciphertext": "vault:v1:AAAA", "plaintext": "AAA"}},
    {"data": {"ciphertext": f"vault:v1:{_GOOD}{_GOOD}", "plaintext": "A" * 5}},
    {"data": {"ciphertext": f"vault:v1:{_GOOD[:-2]}B=", "plaintext": "AB="}},
    {"errors": ["permission denied"]},
]


@pytest.mark.parametrize("body", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers(body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENKCM_BAO_TOKEN", "t")
    with answering(lambda request: Response(200, body)) as root:
        in_time(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
        in_time(lambda: root.unwrap(BLOB, CONTEXT), RootMisconfigured)
        assert root.warnings() == []


@pytest.mark.parametrize("status", [200, 400, 403, 404, 500])
@pytest.mark.parametrize(
    "body",
    [{"errors": {}}, {"errors": "x"}, {"errors": [5, None, {}]}, {"errors": [["x"]]}, {"auth": 5}, b"[5]"],
)
def test_hostile_errors(status: int, body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENKCM_BAO_TOKEN", "t")
    kind = RootUnavailable if status == 500 else RootMisconfigured
    with answering(lambda request: Response(status, body)) as root:
        refused(lambda: root.wrap(SEALED, CONTEXT), kind)
        refused(lambda: root.unwrap(BLOB, CONTEXT), kind)
        refused(lambda: root.grant(), RootMisconfigured)  # type: ignore[attr-defined]


def test_a_plaintext_that_was_never_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a server that does not know associated_data: the context is inside as well."""
    monkeypatch.setenv("OPENKCM_BAO_TOKEN", "t")
    for plaintext in (b"x", SEALED, bytes(104)):
        body = {"data": {"plaintext": base64.b64encode(plaintext).decode()}}
        with answering(lambda request, body=body: Response(200, body)) as root:
            refused(lambda root=root: root.unwrap(BLOB, CONTEXT), DecryptError)


def test_a_server_that_ignores_associated_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vault before 1.13."""
    monkeypatch.setenv("OPENKCM_BAO_TOKEN", "t")
    kept: dict[str, str] = {}

    def handle(request: Request) -> Response:
        if "/encrypt/" in request.path:
            kept["plaintext"] = request.json()["plaintext"]
            size = len(base64.b64decode(kept["plaintext"])) + 28
            return Response(
                200, {"data": {"ciphertext": f"vault:v1:{base64.b64encode(bytes(size)).decode()}"}}
            )
        return Response(200, {"data": kept})

    with answering(handle) as root:
        wrapped = root.wrap(SEALED, CONTEXT)
        assert root.unwrap(wrapped, CONTEXT) == SEALED
        refused(lambda: root.unwrap(wrapped, CONTEXT | {"tenant": "globex"}), DecryptError)


@pytest.mark.parametrize(
    "auth",
    [
        None,
        [],
        {},
        {"client_token": None},
        {"client_token": 5},
        {"client_token": ""},
        {"client_token": "a\r\nX-Evil: 1"},
        {"client_token": "ä"},
        {"client_token": "x" * 20_000},
    ],
)
def test_hostile_logins(auth: Any, bao: OpenBao) -> None:
    for login in ("login=approle&", "login=kubernetes&role=r&"):
        with answering(lambda request: Response(200, {"auth": auth}), login) as root:
            error = refused(lambda root=root: root.wrap(SEALED, CONTEXT), RootMisconfigured)
            assert "Evil" not in str(error)


@pytest.mark.parametrize("lease", [None, "x", -1, 0, True, 2**80, 1.5, math.inf, [], {}])
def test_hostile_leases(lease: Any, bao: OpenBao) -> None:
    def handle(request: Request) -> Response:
        if request.path.endswith("/login"):
            body = {"auth": {"client_token": "t", "lease_duration": lease, "renewable": lease}}
            return Response(200, json.dumps(body).encode())
        return Response(400, {"errors": ["encryption key not found"]})

    with answering(handle, "login=approle&") as root:
        for _ in range(3):
            with pytest.raises(OpenKCMError, match="no such Transit key"):
                root.unwrap(BLOB, CONTEXT)


@pytest.mark.parametrize(
    "told",
    [
        {"policies": 5, "path": 5, "meta": 5, "display_name": 5},
        {"display_name": "x; rm -rf /"},
        {"display_name": ""},
        {"path": "auth/../../login", "meta": {"role": "r"}},
        {"path": "auth/x y/login", "meta": {"role_name": "r"}},
        {"path": "auth/approle/login", "meta": {"role_name": "$(id)"}},
    ],
)
def test_hostile_identities(told: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be pasted into a shell holds nothing that a server made up."""
    monkeypatch.setenv("OPENKCM_BAO_TOKEN", "t")
    with answering(lambda request: Response(200, {"data": told})) as root:
        refused(lambda: root.grant(), RootMisconfigured)  # type: ignore[attr-defined]
    told = {"policies": ["ours", "$(id)", "a b", "default", "root", 5], "display_name": "us"}
    with answering(lambda request: Response(200, {"data": told})) as root:
        assert "$(id)" not in root.grant().text  # type: ignore[attr-defined]
    told |= {"path": "auth/approle/login", "meta": {"role_name": "core"}}
    with answering(lambda request: Response(200, {"data": told})) as root:
        text = root.grant().text  # type: ignore[attr-defined]
        assert "$(id)" not in text
        assert "# This replaces the role's policies" in text  # for we cannot name them all


def test_a_redirect_is_not_followed(bao: OpenBao, key: OpenBaoKey) -> None:
    """Or the token would go wherever a standby, or whoever answers in its place, points."""
    seen: list[Request] = []

    def take(request: Request) -> Response:
        seen.append(request)
        return Response(200, {})

    thief = Server(take)
    try:
        for status, kind in ((307, RootUnavailable), (302, RootMisconfigured), (301, RootMisconfigured)):
            location = (("Location", f"{thief.url}/v1/transit/decrypt/key"),)
            with answering(lambda request, s=status, at=location: Response(s, {}, at)) as root:  # type: ignore[misc]
                refused(lambda root=root: root.unwrap(BLOB, CONTEXT), kind)
    finally:
        thief.close()
    assert seen == []


def test_an_answer_in_an_encoding_that_was_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENKCM_BAO_TOKEN", "t")
    seen: list[str] = []

    def handle(request: Request) -> Response:
        seen.append(request.headers["accept-encoding"])
        return Response(200, b"\x1f\x8b" + bytes(40), (("Content-Encoding", "gzip"),))

    with answering(handle) as root:
        refused(lambda: root.unwrap(BLOB, CONTEXT), RootMisconfigured)
    assert set(seen) == {"identity"}
