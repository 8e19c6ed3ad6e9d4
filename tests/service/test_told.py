# SPDX-License-Identifier: Apache-2.0
"""What a Gateway on the network is told of a dark tenant: why, and nothing in a root's or an operator's words."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import openkcm
from openkcm import crypto
from openkcm.core import Core
from openkcm.errors import (
    OpenKCMError,
    RootDenied,
    RootDestroyed,
    RootDisabled,
    RootMisconfigured,
    RootUnavailable,
    TenantDark,
)
from openkcm.keys import Kind
from openkcm.rpc import admin_messages, wire
from rpc_support import Site
from support import make_vault, refused, url, without_threads

RAW = "arn:aws:kms:eu-central-1:111122223333:key/7 at 10.0.0.7 said <no>; run chmod 600 /etc/acme.root"
CHIEF = "spiffe://example/operator/chief"

ANSWERS = {
    "denied": RootDenied(RAW, permission=RAW),
    "disabled": RootDisabled(RAW),
    "destroyed": RootDestroyed(RAW),
    "misconfigured": RootMisconfigured(RAW),
    "unavailable": RootUnavailable(RAW),
}


def is_harmless(text: str) -> bool:
    """Whether nothing of what a root or an operator said is in it."""
    return not any(each in text for each in ("arn:", "10.0", "<no>", "chmod", "/", ".root", "4711"))


def use(core: Core) -> object:
    """Use the tenant's keys."""
    return core.wrap_keys(core.find_service("acme", "records"), crypto.generate_keys(1), Kind.INLINE)


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    """One that has not opened a key yet, and gives a root no grace."""
    make_vault(tmp_path).close()
    with Core.open(url(tmp_path), grace=0) as core:
        yield without_threads(core)


def answering(core: Core, monkeypatch: pytest.MonkeyPatch, error: OpenKCMError) -> None:
    """Have every root say this."""

    def ask(*_: Any) -> bytes:
        raise error

    monkeypatch.setattr(core._vault, "ask_root", ask)


@pytest.mark.parametrize("answer", ANSWERS)
def test_of_a_root_only_the_kind_of_its_answer_is_told(
    core: Core, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(core)
    answering(core, monkeypatch, ANSWERS[answer])
    core.probe("acme")
    why = "has not answered for too long" if answer == "unavailable" else "refuses"
    for _ in range(3):  # the first time, and when it is repeated
        error = refused(lambda: use(core), TenantDark)
        assert RAW in str(error)
        told = wire.failure_of(error)
        assert (told.code, told.message) == ("tenant_dark", f"the root of tenant acme {why}")
        assert RAW in admin_messages.failure_of(error).message


@pytest.mark.parametrize("answer", ANSWERS)
def test_so_it_is_where_the_tenants_keys_were_not_open(
    core: Core, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(core, monkeypatch, ANSWERS[answer])
    for _ in range(3):
        with pytest.raises(OpenKCMError) as caught:
            use(core)
        assert is_harmless(wire.failure_of(caught.value).message)


def test_what_a_root_says_in_an_error_of_its_own_is_not_told() -> None:
    for error in ANSWERS.values():
        assert is_harmless(wire.failure_of(error).message)
        assert RAW in admin_messages.failure_of(error).message
    # One of a version that did not say yet what may be told.
    assert is_harmless(wire.failure_of(TenantDark(RAW)).message)


def test_of_a_kill_it_is_told_that_it_was_one(core: Core) -> None:
    use(core)
    core.kill("acme", "asked for by phone, ticket 4711")
    for _ in range(3):
        error = refused(lambda: use(core), TenantDark)
        assert "4711" in str(error)
        assert wire.failure_of(error).message == "the tenant acme was killed"


def test_a_gateway_hears_no_path_and_an_operator_does(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.issue("chief", CHIEF)
    with Core.open(site.store) as core:
        core.grant(CHIEF, "*", "*", ["administer"])
    root = tmp_path / "acme.root"
    with (
        site.serve(**{"listen.admin": "127.0.0.1:0"}) as server,
        site.connect(server.ports, deadline=30) as remote,
        openkcm.Gateway(remote) as gateway,
        openkcm.connect_admin(f"127.0.0.1:{server.ports['admin']}", tls=site.tls("chief")) as operator,
    ):
        records = gateway.service("acme", "records")
        blob = records.encrypt(b"x")
        os.chmod(root, 0o644)
        operator.probe("acme")
        error = refused(lambda: records.decrypt(blob), TenantDark)
        assert "refuses" in str(error)
        assert is_harmless(str(error))
        operator.kill("acme", "ticket 4711")
        error = refused(lambda: records.decrypt(blob), TenantDark)
        assert "was killed" in str(error)
        assert is_harmless(str(error))
        with pytest.raises(OpenKCMError, match="chmod"):
            operator.restore("acme")
        os.chmod(root, 0o600)
        operator.restore("acme")
        assert records.decrypt(blob) == b"x"
