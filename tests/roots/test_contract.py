# SPDX-License-Identifier: Apache-2.0
"""One suite over every root: the same cases, the same answers, from wrapping to the Core's states."""

from __future__ import annotations

import itertools
import os
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import openkcm
from openkcm.errors import AlreadyExists, DecryptError, RootDenied, TenantDark, TenantNotFound
from openkcm.keys import TenantState
from openkcm.roots import Grantable, Root, open_root
from openkcm.testing import FakeProvider
from providers import OFFERS, Offer, give_back, levers, pull, started
from support import refused, url, without_threads

CONTEXT = {"layer": "L2", "tenant": "acme", "region": "local", "version": "1"}
SEALED = bytes(range(72))
_numbers = itertools.count(1)


@dataclass
class Case:
    """A provider, a key of it with its levers, and the key's root."""

    name: str
    offer: Offer
    provider: FakeProvider
    key: Any
    root: Root


@pytest.fixture(scope="module")
def provider(request: pytest.FixtureRequest) -> Iterator[tuple[str, FakeProvider]]:
    """One provider after the other, each started once."""
    with started(request.param) as provider:
        yield request.param, provider


@pytest.fixture
def case(provider: tuple[str, FakeProvider]) -> Iterator[Case]:
    name, running = provider
    key = OFFERS[name].make_key(running, f"key-{next(_numbers)}")
    root = open_root(key.uri)
    yield Case(name, OFFERS[name], running, key, root)
    root.close()
    if not isinstance(key.condition, str) or key.condition != "destroyed":
        give_back(key)


every = pytest.mark.parametrize("provider", list(OFFERS), indirect=True)


def with_levers(which: str) -> pytest.MarkDecorator:
    pairs = levers(which)
    return pytest.mark.parametrize(
        ("provider", "lever"), pairs, indirect=["provider"], ids=["-".join(pair) for pair in pairs]
    )


# ---- wrapping ------------------------------------------------------------------------------------------------


@every
def test_round_trip(case: Case) -> None:
    wrapped = case.root.wrap(SEALED, CONTEXT)
    assert case.root.unwrap(wrapped, CONTEXT) == SEALED
    assert (case.root.wrap(SEALED, CONTEXT) == wrapped) is case.offer.deterministic
    assert SEALED not in wrapped
    assert SEALED[:16] not in wrapped
    assert case.root.development is case.offer.development
    assert isinstance(case.root.warnings(), list)


@every
def test_the_uri_finds_the_same_root(case: Case) -> None:
    wrapped = case.root.wrap(SEALED, CONTEXT)
    again = open_root(case.root.uri)
    assert again.uri == case.root.uri
    assert again.unwrap(wrapped, CONTEXT) == SEALED
    again.close()


@every
def test_the_context_is_bound(case: Case) -> None:
    wrapped = case.root.wrap(SEALED, CONTEXT)
    for change in (
        {"tenant": "globex"},
        {"region": "us"},
        {"version": "2"},
        {"layer": "L3"},
        {"more": "than before"},
    ):
        refused(lambda change=change: case.root.unwrap(wrapped, CONTEXT | change), DecryptError)  # type: ignore[misc]
    refused(lambda: case.root.unwrap(wrapped, {}), DecryptError)
    assert case.root.unwrap(wrapped, dict(reversed(CONTEXT.items()))) == SEALED


@every
def test_every_byte_counts(case: Case) -> None:
    wrapped = case.root.wrap(SEALED, CONTEXT)
    for at in range(len(wrapped)):
        altered = wrapped[:at] + bytes([wrapped[at] ^ 0x80]) + wrapped[at + 1 :]
        refused(lambda altered=altered: case.root.unwrap(altered, CONTEXT), DecryptError)  # type: ignore[misc]
    for wrong in (b"", wrapped[:-1], wrapped[:5], wrapped + b"x", os.urandom(len(wrapped))):
        refused(lambda wrong=wrong: case.root.unwrap(wrong, CONTEXT), DecryptError)  # type: ignore[misc]
    assert case.root.unwrap(wrapped, CONTEXT) == SEALED


@every
def test_another_key_does_not_open_it(case: Case) -> None:
    other = open_root(case.offer.make_key(case.provider, f"other-{next(_numbers)}").uri)
    refused(lambda: other.unwrap(case.root.wrap(SEALED, CONTEXT), CONTEXT), DecryptError)
    assert other.unwrap(other.wrap(SEALED, CONTEXT), CONTEXT) == SEALED
    other.close()


@pytest.mark.parametrize(
    "provider", [name for name, offer in OFFERS.items() if offer.versions], indirect=True
)
def test_what_older_versions_wrapped_opens(case: Case) -> None:
    wrapped = case.root.wrap(SEALED, CONTEXT)
    case.key.rotate()
    assert case.root.unwrap(wrapped, CONTEXT) == SEALED
    newer = case.root.wrap(SEALED, CONTEXT)
    assert newer != wrapped
    assert case.root.unwrap(newer, CONTEXT) == SEALED


@every
def test_eight_threads(case: Case) -> None:
    wrapped = case.root.wrap(SEALED, CONTEXT)
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                assert case.root.unwrap(wrapped, CONTEXT) == SEALED
                assert case.root.unwrap(case.root.wrap(SEALED, CONTEXT), CONTEXT) == SEALED
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


@every
def test_forked_children(case: Case) -> None:
    wrapped = case.root.wrap(SEALED, CONTEXT)
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                assert case.root.unwrap(wrapped, CONTEXT) == SEALED
                assert case.root.unwrap(case.root.wrap(SEALED, CONTEXT), CONTEXT) == SEALED
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert case.root.unwrap(wrapped, CONTEXT) == SEALED


@every
def test_closing_lets_go_and_use_comes_back(case: Case) -> None:
    wrapped = case.root.wrap(SEALED, CONTEXT)
    case.root.close()
    assert case.root.unwrap(wrapped, CONTEXT) == SEALED


@every
def test_what_to_allow(case: Case) -> None:
    assert isinstance(case.root, Grantable)
    granted = case.root.grant()
    assert granted.text.strip()
    assert granted.form
    assert granted.permissions


# ---- answers -------------------------------------------------------------------------------------------------


@with_levers("no")
def test_a_no_has_its_own_class_and_an_end(case: Case, lever: str) -> None:
    wrapped = case.root.wrap(SEALED, CONTEXT)
    pull(case.key, lever)
    refused(lambda: case.root.unwrap(wrapped, CONTEXT), case.offer.no[lever])
    give_back(case.key)
    assert case.root.unwrap(wrapped, CONTEXT) == SEALED


@with_levers("final")
def test_what_is_destroyed_is_gone(case: Case, lever: str) -> None:
    wrapped = case.root.wrap(SEALED, CONTEXT)
    pull(case.key, lever)
    refused(lambda: case.root.unwrap(wrapped, CONTEXT), case.offer.final[lever])
    case.key.condition = "destroyed"


@with_levers("silence")
def test_silence_is_no_answer(case: Case, lever: str) -> None:
    wrapped = case.root.wrap(SEALED, CONTEXT)
    pull(case.key, lever)
    refused(lambda: case.root.unwrap(wrapped, CONTEXT), case.offer.silence[lever])
    give_back(case.key)
    assert case.root.unwrap(wrapped, CONTEXT) == SEALED


# ---- through the Core ----------------------------------------------------------------------------------------


@pytest.fixture
def core(tmp_path: Path) -> Iterator[openkcm.Core]:
    """A Core that asks roots only when it is told to."""
    with openkcm.Core.open(url(tmp_path)) as core:
        yield without_threads(core)


def link(core: openkcm.Core, case: Case) -> tuple[openkcm.ServiceHandle, bytes]:
    """A service of a tenant on the case's root, and an envelope of it."""
    core.link_tenant("acme", root=case.key.uri)
    core.create_service("acme", "records")
    service = openkcm.Gateway(core).service("acme", "records")
    blob = service.encrypt(b"record")
    assert service.decrypt(blob) == b"record"
    return service, blob


def acts(core: openkcm.Core) -> Counter[str]:
    return Counter(each.act for each in core.audit_records() if each.act.startswith("root-"))


@with_levers("no")
def test_a_no_is_dark_and_comes_back(case: Case, core: openkcm.Core, lever: str) -> None:
    service, blob = link(core, case)
    pull(case.key, lever)
    for _ in range(3):
        found = core.probe("acme")
        assert found.state is TenantState.DARK
        assert found.reason
    assert not core._vault.ring.is_open("acme")
    refused(lambda: service.decrypt(blob), TenantDark)
    refused(lambda: service.encrypt(b"more"), TenantDark)
    give_back(case.key)
    assert core.probe("acme").state is TenantState.LIVE
    assert service.decrypt(blob) == b"record"
    assert acts(core) == {"root-dark": 1, "root-live": 1}


@with_levers("final")
def test_a_destroyed_key_is_dark_for_good(case: Case, core: openkcm.Core, lever: str) -> None:
    service, blob = link(core, case)
    pull(case.key, lever)
    assert core.probe("acme").state is TenantState.DARK
    refused(lambda: service.decrypt(blob), TenantDark)
    assert acts(core) == {"root-dark": 1}
    case.key.condition = "destroyed"


@with_levers("silence")
def test_silence_is_served_through_grace_and_a_no_ends_it(case: Case, core: openkcm.Core, lever: str) -> None:
    service, blob = link(core, case)
    pull(case.key, lever)
    assert core.probe("acme").state is TenantState.GRACE
    assert service.decrypt(blob) == b"record"
    give_back(case.key)
    pull(case.key, "disable")
    assert core.probe("acme").state is TenantState.DARK
    refused(lambda: service.decrypt(blob), TenantDark)
    assert acts(core) == {"root-grace": 1, "root-dark": 1}


@every
def test_another_plaintext_is_dark(case: Case, core: openkcm.Core) -> None:
    service, blob = link(core, case)
    case.key.lie()
    assert core.probe("acme").state is TenantState.DARK
    refused(lambda: service.decrypt(blob), TenantDark)
    case.key.heal()
    assert core.probe("acme").state is TenantState.LIVE
    assert service.decrypt(blob) == b"record"


@every
def test_a_blob_altered_in_the_store_is_refused(case: Case, core: openkcm.Core, tmp_path: Path) -> None:
    import sqlite3

    _, blob = link(core, case)
    core.close()
    with sqlite3.connect(tmp_path / "vault.db") as connection:
        (wrapped,) = connection.execute("SELECT wrapped FROM tenant_keys").fetchone()
        altered = wrapped[:-1] + bytes([wrapped[-1] ^ 1])
        connection.execute("UPDATE tenant_keys SET wrapped = ?", (altered,))
    connection.close()
    with openkcm.Core.open(url(tmp_path)) as fresh, openkcm.Gateway(fresh) as gateway:
        refused(lambda: gateway.service("acme", "records").decrypt(blob), DecryptError)
        assert fresh.probe("acme").state is TenantState.DARK


@pytest.mark.parametrize(
    "provider", [name for name, offer in OFFERS.items() if offer.permissions], indirect=True
)
def test_linking_names_the_one_permission_that_is_missing(case: Case, core: openkcm.Core) -> None:
    assert case.offer.permissions is not None
    for permission in case.offer.permissions:
        case.key.deny(permission)
        error = refused(lambda: core.link_tenant("acme", root=case.key.uri), RootDenied)
        assert isinstance(error, RootDenied)
        named = permission.replace("KEY", case.key.name)
        assert error.permission == named
        assert named in str(error)
        refused(lambda: core.status("acme"), TenantNotFound)
        case.key.allow()
    link(core, case)
    refused(lambda: core.link_tenant("acme", root=case.key.uri), AlreadyExists)


@every
def test_a_tenant_moves_from_and_to_it(case: Case, core: openkcm.Core, tmp_path: Path) -> None:
    service, blob = link(core, case)
    core.replace_root("acme", f"local:{tmp_path / 'another.root'}")
    pull(case.key, "disable")
    assert core.probe("acme").state is TenantState.LIVE
    assert service.decrypt(blob) == b"record"
    give_back(case.key)
    core.replace_root("acme", case.key.uri)
    (tmp_path / "another.root").unlink()
    assert core.probe("acme").state is TenantState.LIVE
    assert service.decrypt(blob) == b"record"
    assert core.rotate_tenant("acme") == 2
    assert service.decrypt(blob) == b"record"
