# SPDX-License-Identifier: Apache-2.0
"""Azure roots: wrapping by versions, the context, hostile answers, threads and forks, against a vault on loopback."""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
import uuid

import pytest

from azure_support import CONTEXT, SEALED, VERSION, names, use
from azure_support import either_key as either_key
from azure_support import provider as provider
from azure_support import root as root
from azure_support import running as running
from openkcm.errors import DecryptError, RootDenied, RootDestroyed, RootDisabled, RootMisconfigured
from openkcm.roots import Root, open_root
from openkcm.roots.azure import parse_blob
from openkcm.testing import FakeKey
from openkcm.testing.azure import AzureKey, AzureKeyVault
from openkcm.testing.https import Response
from support import refused

# ---- wrapping ---------------------------------------------------------------------------------------------


def test_round_trip(key: AzureKey, root: Root) -> None:
    wrapped = use(root)
    algorithm, version, ciphertext = parse_blob(wrapped)
    assert (algorithm, version) == (2 if key.managed_hsm else 1, key.versions[0].name)
    assert len(ciphertext) == (112 if key.managed_hsm else 384)
    assert SEALED not in wrapped
    assert root.uri == key.uri
    assert root.development is False
    assert root.warnings() == []
    assert repr(root) == f"<AzureRoot {key.uri}>"
    assert isinstance(key, FakeKey)
    again = open_root(root.uri)
    assert again.unwrap(wrapped, CONTEXT) == SEALED
    again.close()


def test_each_call_asks_the_vault_once(key: AzureKey, root: Root) -> None:
    wrapped = use(root)
    before = key.requests
    root.unwrap(wrapped, CONTEXT)
    assert key.requests == before + 1
    root.wrap(SEALED, CONTEXT)
    assert key.requests == before + 2


def test_the_newest_version_wraps_and_older_ones_open(key: AzureKey, root: Root) -> None:
    old = use(root)
    key.rotate()
    new = use(root)
    assert [parse_blob(each)[1] for each in (old, new)] == [each.name for each in key.versions]
    assert root.unwrap(old, CONTEXT) == SEALED
    key.versions[0].enabled = False
    refused(lambda: root.unwrap(old, CONTEXT), RootDisabled)
    assert root.unwrap(new, CONTEXT) == SEALED


def test_a_pinned_version_is_the_only_one(key: AzureKey, root: Root) -> None:
    pinned = open_root(f"{key.uri}/{key.versions[0].name}")
    old = use(pinned)
    key.rotate()
    assert parse_blob(use(pinned))[1] == key.versions[0].name
    assert root.unwrap(old, CONTEXT) == SEALED
    requests = key.requests
    refused(lambda: pinned.unwrap(root.wrap(SEALED, CONTEXT), CONTEXT), DecryptError)
    assert key.requests == requests + 1  # to wrap
    key.delete()
    refused(lambda: pinned.unwrap(old, CONTEXT), RootDestroyed)
    pinned.close()


def test_a_version_that_never_was(key: AzureKey) -> None:
    pinned = open_root(f"{key.uri}/{VERSION}")
    assert "version" in str(refused(lambda: pinned.wrap(SEALED, CONTEXT), RootDestroyed))
    pinned.close()


@pytest.mark.parametrize("change", [{"tenant": "globex"}, {"version": "2"}, {"x": "y"}, None])
def test_the_context_is_bound(root: Root, change: dict[str, str] | None) -> None:
    wrapped = root.wrap(SEALED, CONTEXT)
    refused(lambda: root.unwrap(wrapped, CONTEXT | change if change else {}), DecryptError)


def test_every_byte_counts(root: Root) -> None:
    wrapped = root.wrap(SEALED, CONTEXT)
    for at in range(len(wrapped)):
        altered = wrapped[:at] + bytes([wrapped[at] ^ 0x80]) + wrapped[at + 1 :]
        refused(lambda altered=altered: root.unwrap(altered, CONTEXT), DecryptError)
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_malformed_blobs_reach_no_vault(key: AzureKey, root: Root) -> None:
    wrapped = root.wrap(SEALED, CONTEXT)
    before = key.requests
    other = 1 if key.managed_hsm else 2
    wrong = [b"", wrapped[:1], wrapped[:18], wrapped[:-1], wrapped + b"x", wrapped * 9, b"\x02" + wrapped[1:]]
    wrong += [wrapped[:1] + bytes([each]) + wrapped[2:] for each in (0, other, 3, 255)]
    for blob in [*wrong, bytes(len(wrapped))]:
        refused(lambda blob=blob: root.unwrap(blob, CONTEXT), DecryptError)
    assert key.requests == before


def test_another_key_does_not_open_it(provider: AzureKeyVault, root: Root) -> None:
    wrapped = root.wrap(SEALED, CONTEXT)
    for make in (provider.make_key, provider.make_hsm_key):
        other = open_root(make(f"other-{next(names)}").uri)
        refused(lambda other=other: other.unwrap(wrapped, CONTEXT), DecryptError)
        other.close()


def test_a_key_made_anew_under_the_same_name(provider: AzureKeyVault, key: AzureKey, root: Root) -> None:
    """The old versions are not the new key's: not a deleted key, and not one that opens."""
    wrapped = use(root)
    (provider.make_hsm_key if key.managed_hsm else provider.make_key)(key.name)
    refused(lambda: root.unwrap(wrapped, CONTEXT), DecryptError)
    use(root)


def test_what_a_customer_can_do(key: AzureKey, root: Root) -> None:
    wrapped = use(root)
    for act, answer in (
        (key.disable, RootDisabled),
        (key.delete, RootDestroyed),
        (key.destroy, RootDestroyed),
        (key.deny, RootDenied),
    ):
        act()
        started = time.monotonic()
        refused(lambda: root.unwrap(wrapped, CONTEXT), answer)
        refused(lambda: root.wrap(SEALED, CONTEXT), answer)
        assert key.first_no is not None
        assert key.first_no >= started
        key.enable()
        key.allow()
        assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_permissions_one_by_one(key: AzureKey, root: Root) -> None:
    wrapped = use(root)
    wrap, unwrap, read = key.permissions
    key.deny(wrap)
    error = refused(lambda: root.wrap(SEALED, CONTEXT), RootDenied)
    assert isinstance(error, RootDenied)
    assert error.permission == wrap
    assert wrap in str(error)
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    key.deny(unwrap)
    error = refused(lambda: root.unwrap(wrapped, CONTEXT), RootDenied)
    assert isinstance(error, RootDenied)
    assert error.permission == unwrap
    root.wrap(SEALED, CONTEXT)
    key.deny(read)
    use(root)
    assert root.warnings() == []


def test_permissions_by_access_policies() -> None:
    with AzureKeyVault(access_policies=True) as provider:
        key = provider.make_key("root")
        root = open_root(key.uri)
        wrapped = use(root)
        key.deny("unwrapKey")
        error = refused(lambda: root.unwrap(wrapped, CONTEXT), RootDenied)
        assert "ForbiddenByPolicy" in str(error)
        assert provider.permissions == ("wrapKey", "unwrapKey")
        root.close()


def test_operations_that_the_key_does_not_permit(key: AzureKey, root: Root) -> None:
    wrapped = use(root)
    key.operations = ("wrapKey",)
    assert "KeyOperationForbidden" in str(refused(lambda: root.unwrap(wrapped, CONTEXT), RootDenied))


def test_outside_its_dates_a_key_still_unwraps(key: AzureKey, root: Root) -> None:
    wrapped = use(root)
    key.versions[0].expires = time.time() - 1
    assert "KeyExpired" in str(refused(lambda: root.wrap(SEALED, CONTEXT), RootDisabled))
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    assert "expires" in root.warnings()[0]
    key.versions[0].expires, key.versions[0].not_before = None, time.time() + 60
    assert "KeyNotYetValid" in str(refused(lambda: root.wrap(SEALED, CONTEXT), RootDisabled))
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_a_lying_vault(key: AzureKey, root: Root) -> None:
    wrapped = use(root)
    key.lie()
    refused(lambda: root.unwrap(wrapped, CONTEXT), DecryptError)
    key.heal()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


# ---- what a vault answers is not trusted ------------------------------------------------------------------

HOSTILE = [
    (b"", "application/json"),
    (b"{", "application/json"),
    (b"null", "application/json"),
    (b"[]", "application/json"),
    (b"7", "application/json"),
    (b"{}", "application/json"),
    (b"[" * 100_000, "application/json"),
    (b"\xff\xfe", "application/json"),
    (b'{"kid": 1, "value": 2}', "application/json"),
    (b'{"kid": null, "value": "AAAA"}', "application/json"),
    (b'{"kid": "KID", "value": null}', "application/json"),
    (b'{"kid": "KID", "value": "a+b/"}', "application/json"),
    (b'{"kid": "KID", "value": "A"}', "application/json"),
    (b'{"kid": "KID", "value": "AB"}', "application/json"),
    (b'{"kid": "KID", "value": "AAAA="}', "application/json"),
    (b'{"kid": "KID", "value": "\\u00e4"}', "application/json"),
    (b'{"kid": "OTHER", "value": "AAAA"}', "application/json"),
    (b'{"kid": "https://x/keys/root", "value": "AAAA"}', "application/json"),
    (b"<html>", "text/html"),
    (b"<xml", "application/xml"),
    (b"\x89PNG", "image/png"),
    (b"{}", ""),
]


@pytest.mark.parametrize(("body", "kind"), HOSTILE)
def test_nonsense(provider: AzureKeyVault, key: AzureKey, root: Root, body: bytes, kind: str) -> None:
    wrapped = use(root)
    base = f"https://{provider.host(managed_hsm=key.managed_hsm)}/keys/"
    for text, name in (("KID", f"{key.name}/{key.versions[0].name}"), ("OTHER", f"other/{VERSION}")):
        body = body.replace(text.encode(), f"{base}{name}".encode())
    provider.raw_answer = Response(200, body, (("Content-Type", kind),))
    refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
    refused(lambda: root.unwrap(wrapped, CONTEXT), RootMisconfigured)
    assert root.warnings() == []


def test_an_answer_for_another_version(provider: AzureKeyVault, key: AzureKey, root: Root) -> None:
    wrapped = use(root)
    kid = f"https://{provider.host(managed_hsm=key.managed_hsm)}/keys/{key.name}/{uuid.uuid4().hex}"
    provider.raw_answer = Response(200, {"kid": kid, "value": "A" * 140})
    refused(lambda: root.unwrap(wrapped, CONTEXT), RootMisconfigured)
    pinned = open_root(f"{key.uri}/{key.versions[0].name}")
    refused(lambda: pinned.wrap(SEALED, CONTEXT), RootMisconfigured)
    pinned.close()


@pytest.mark.parametrize("status", [201, 204, 301, 302, 307, 308])
def test_nothing_is_followed_elsewhere(
    provider: AzureKeyVault, key: AzureKey, root: Root, status: int
) -> None:
    wrapped = use(root)
    elsewhere = provider.make_key(f"elsewhere-{next(names)}")
    place = f"https://{provider.host(managed_hsm=False)}/keys/{elsewhere.name}//wrapkey?api-version=7.4"
    provider.raw_answer = Response(status, b"", (("Location", place),))
    refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
    refused(lambda: root.unwrap(wrapped, CONTEXT), RootMisconfigured)
    assert elsewhere.requests == 0


# ---- threads, forks, logs ---------------------------------------------------------------------------------


def test_eight_threads(key: AzureKey, root: Root) -> None:
    wrapped = root.wrap(SEALED, CONTEXT)
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                assert root.unwrap(wrapped, CONTEXT) == SEALED
                use(root)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_forked_children(root: Root) -> None:
    wrapped = use(root)
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                assert root.unwrap(wrapped, CONTEXT) == SEALED
                use(root)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_closing_lets_go_and_use_comes_back(provider: AzureKeyVault, root: Root) -> None:
    wrapped = use(root)
    given = provider.entra.tokens_given
    root.close()
    root.close()
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    assert provider.entra.tokens_given == given + 1


def test_closing_while_others_work(root: Root) -> None:
    wrapped = use(root)
    stop = threading.Event()
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                assert root.unwrap(wrapped, CONTEXT) == SEALED
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        root.close()
        time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_nothing_secret_is_shown(
    provider: AzureKeyVault, key: AzureKey, root: Root, caplog: pytest.LogCaptureFixture
) -> None:
    tokens: list[str] = []
    sign = provider.entra.sign
    provider.entra.sign = lambda *of: tokens.append(sign(*of)) or tokens[-1]  # type: ignore[method-assign]
    shown = []
    with caplog.at_level(logging.DEBUG):
        wrapped = use(root)
        for act in (key.disable, key.deny, key.delete, key.throttle):
            act()
            with pytest.raises(Exception) as caught:
                root.unwrap(wrapped, CONTEXT)
            shown.append("".join(traceback.format_exception(caught.value)))
    provider.entra.sign = sign  # type: ignore[method-assign]
    shown += [repr(root), str(vars(root)), repr(key), repr(provider.entra)]
    shown += [record.getMessage() for record in caplog.records]
    assert tokens
    for secret in (*tokens, tokens[0].rpartition(".")[2], provider.entra.secret, SEALED.hex(), str(SEALED)):
        assert not any(secret in text for text in shown)


def test_a_service_on_the_port_of_another_is_not_met_with_its_tenant(provider: AzureKeyVault) -> None:
    """The SDK keeps the challenge of each host and port; the system gives out a port again."""
    key = provider.make_key(f"root-{next(names)}")
    with_old = open_root(key.uri)
    use(with_old)
    with_old.close()
    before, provider.vault_tenant = provider.vault_tenant, str(uuid.uuid4())
    provider.entra.tenants.insert(0, provider.vault_tenant)
    try:
        provider.forget_challenges()  # as its start does
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AZURE_TENANT_ID", provider.vault_tenant)
            root = open_root(key.uri)
            use(root)
            root.close()
    finally:
        provider.vault_tenant = before
        provider.entra.tenants.pop(0)
        provider.forget_challenges()
