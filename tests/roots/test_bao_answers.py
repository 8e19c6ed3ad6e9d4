# SPDX-License-Identifier: Apache-2.0
"""Every answer of the server to a ``bao-transit:`` root, over the wire."""

from __future__ import annotations

from typing import Any

import pytest

from bao_support import BLOB, CONTEXT, SEALED, answering
from bao_support import bao as bao
from bao_support import key as key
from openkcm.errors import (
    DecryptError,
    OpenKCMError,
    RootDenied,
    RootMisconfigured,
    RootThrottled,
    RootUnavailable,
)
from openkcm.roots import open_root
from openkcm.roots.bao import ANSWERS
from openkcm.testing.https import Request, Response
from openkcm.testing.openbao import REPLIES, OpenBao, OpenBaoKey
from support import refused


@pytest.mark.parametrize("name", [name for name, reply in REPLIES.items() if not reply.at_login])
def test_each_answer_of_the_server(key: OpenBaoKey, name: str) -> None:
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    key.answer(name)
    error = refused(lambda: root.unwrap(wrapped, CONTEXT), ANSWERS[name])
    assert isinstance(error, OpenKCMError)
    assert name.split("xx")[0] in str(error) or ANSWERS[name] is DecryptError
    assert (key.first_no is not None) is REPLIES[name].is_no
    # What cannot be said of encrypting is no answer to it.
    kind = RootMisconfigured if ANSWERS[name] is DecryptError else ANSWERS[name]
    refused(lambda: root.wrap(SEALED, CONTEXT), kind)
    key.heal()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


@pytest.mark.parametrize("login", ["approle", "kubernetes"])
@pytest.mark.parametrize("name", [name for name, reply in REPLIES.items() if reply.at_login])
def test_each_answer_to_a_login(bao: OpenBao, key: OpenBaoKey, name: str, login: str) -> None:
    bao.make_secret_id()  # one that was refused is not tried again
    root = open_root(key.uri_by(login))
    key.answer(name)
    refused(lambda: root.wrap(SEALED, CONTEXT), ANSWERS[name])
    key.heal()
    bao.make_secret_id()
    assert root.unwrap(root.wrap(SEALED, CONTEXT), CONTEXT) == SEALED


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, RootMisconfigured),
        (401, RootMisconfigured),
        (402, RootMisconfigured),
        (404, RootMisconfigured),
        (405, RootMisconfigured),
        (500, RootUnavailable),
        (502, RootUnavailable),
        (503, RootUnavailable),
        (504, RootUnavailable),
        (599, RootUnavailable),
        (429, RootThrottled),
        (301, RootMisconfigured),
        (302, RootMisconfigured),
        (204, RootMisconfigured),
    ],
)
@pytest.mark.parametrize("body", [{"errors": ["something new"]}, {"errors": []}, b"<html>", b""])
def test_answers_that_nobody_knows(
    status: int, kind: type[OpenKCMError], body: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENKCM_BAO_TOKEN", "t")
    with answering(lambda request: Response(status, b"" if status == 204 else body)) as root:
        error = refused(lambda: root.unwrap(BLOB, CONTEXT), kind)
        assert "something new" not in str(error)
        assert str(status) in str(error)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ({"errors": ["something new"]}, RootDenied),
        ({"errors": []}, RootMisconfigured),
        (b"<html>", RootMisconfigured),
    ],
)
def test_a_refusal_in_other_words_or_by_another(
    body: Any, kind: type[OpenKCMError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server itself says no in its own form; a proxy on the way does not."""
    monkeypatch.setenv("OPENKCM_BAO_TOKEN", "t")
    with answering(lambda request: Response(403, body)) as root:
        refused(lambda: root.unwrap(BLOB, CONTEXT), kind)


def test_a_refusal_stays_one_if_nothing_more_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Denied is not unreachable, even if the server fails to say whether the token is at fault."""
    monkeypatch.setenv("OPENKCM_BAO_TOKEN", "t")

    def handle(request: Request) -> Response:
        if request.path.startswith("/v1/transit"):
            return Response(403, {"errors": ["1 error occurred:\n\t* permission denied\n\n"]})
        return Response(503, {"errors": ["internal error"]})

    with answering(handle) as root:
        error = refused(lambda: root.unwrap(BLOB, CONTEXT), RootDenied)
        assert error.permission == "update on transit/decrypt/key"  # type: ignore[attr-defined]
        refused(lambda: root.wrap(SEALED, CONTEXT), RootDenied)
