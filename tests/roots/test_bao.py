# SPDX-License-Identifier: Apache-2.0
"""``bao-transit:`` roots on a real OpenBao server: what is wrapped, and what a customer's levers do."""

from __future__ import annotations

import base64
import itertools
import logging
import os
import threading
import time
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bao_support import CONTEXT, SEALED, names, use
from bao_support import bao as bao
from bao_support import key as key
from openkcm.errors import (
    DecryptError,
    OpenKCMError,
    RootDenied,
    RootDestroyed,
    RootDisabled,
    RootMisconfigured,
    RootThrottled,
    RootUnavailable,
)
from openkcm.roots import Grantable, Root, open_root
from openkcm.roots.bao import MAX_SEALED_BYTES, make_blob, parse_blob
from openkcm.testing.openbao import OpenBao, OpenBaoKey
from support import refused

LOGINS = ("token", "approle", "kubernetes")


def by(key: OpenBaoKey, login: str) -> Root:
    return open_root(key.uri if login == "token" else key.uri_by(login))


# ---- wrapping ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("login", LOGINS)
def test_round_trip(key: OpenBaoKey, login: str) -> None:
    root = by(key, login)
    wrapped = root.wrap(SEALED, CONTEXT)
    assert len(wrapped) == 5 + 12 + 32 + 72 + 16
    assert wrapped[:5] == b"\1\0\0\0\1"
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    assert root.wrap(SEALED, CONTEXT) != wrapped
    assert open_root(root.uri).unwrap(wrapped, CONTEXT) == SEALED
    assert root.warnings() == []
    assert root.development is False
    assert isinstance(root, Grantable)
    root.close()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_any_length_up_to_a_bound(key: OpenBaoKey) -> None:
    root = open_root(key.uri)
    for sealed in (b"", b"x", bytes(MAX_SEALED_BYTES)):
        assert root.unwrap(root.wrap(sealed, {}), {}) == sealed
    refused(lambda: root.wrap(bytes(MAX_SEALED_BYTES + 1), {}), RootMisconfigured)


def test_one_connection_serves_many_calls(key: OpenBaoKey) -> None:
    root = open_root(key.uri)
    for _ in range(5):
        use(root)
    assert key.proxy.accepted == 1
    assert key.requests == 10


@pytest.mark.parametrize("change", [{"tenant": "globex"}, {"region": "us"}, {"version": "2"}, {"x": "y"}])
def test_the_context_is_bound(key: OpenBaoKey, change: dict[str, str]) -> None:
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    refused(lambda: root.unwrap(wrapped, CONTEXT | change), DecryptError)
    refused(lambda: root.unwrap(wrapped, {}), DecryptError)


def test_the_context_is_bound_by_the_server_too(bao: OpenBao, key: OpenBaoKey) -> None:
    version, ciphertext = parse_blob(open_root(key.uri).wrap(SEALED, CONTEXT))
    body = {"ciphertext": f"vault:v{version}:{base64.b64encode(ciphertext).decode()}"}
    with pytest.raises(RuntimeError, match="message authentication failed"):
        bao.server.ask("POST", f"transit/decrypt/{key.name}", body)


def test_every_byte_counts(key: OpenBaoKey) -> None:
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    for at, bit in itertools.product(range(len(wrapped)), (0x80, 0x01)):
        altered = wrapped[:at] + bytes([wrapped[at] ^ bit]) + wrapped[at + 1 :]
        refused(lambda altered=altered: root.unwrap(altered, CONTEXT), DecryptError)
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_malformed_blobs_make_no_request(key: OpenBaoKey) -> None:
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    before = key.requests
    for wrong in (
        b"",
        b"\1",
        wrapped[: 5 + 27],
        b"\2" + wrapped[1:],
        b"\1\0\0\0\0" + wrapped[5:],
        b"\1\xff\xff\xff\xff" + wrapped[5:],
        wrapped + bytes(3 * MAX_SEALED_BYTES),
        b"vault:v1:AAAA",
    ):
        refused(lambda wrong=wrong: root.unwrap(wrong, CONTEXT), DecryptError)
    assert key.requests == before
    for wrong in (wrapped[:-1], wrapped[: 5 + 28], wrapped + b"x", b"\1\0\0\0\2" + wrapped[5:]):
        refused(lambda wrong=wrong: root.unwrap(wrong, CONTEXT), DecryptError)


@given(st.binary(max_size=400) | st.binary(min_size=28, max_size=400).map(lambda rest: b"\1\0\0\0\7" + rest))
def test_a_blob_has_one_meaning(blob: bytes) -> None:
    try:
        parts = parse_blob(blob)
    except DecryptError:
        return
    assert make_blob(*parts) == blob


def test_another_key_does_not_open_it(bao: OpenBao, key: OpenBaoKey) -> None:
    other = bao.make_key(next(names))
    wrapped = open_root(key.uri).wrap(SEALED, CONTEXT)
    refused(lambda: open_root(other.uri).unwrap(wrapped, CONTEXT), DecryptError)


def test_rotation_keeps_older_versions(key: OpenBaoKey) -> None:
    root = open_root(key.uri)
    old = root.wrap(SEALED, CONTEXT)
    key.rotate()
    new = root.wrap(SEALED, CONTEXT)
    assert (old[4], new[4]) == (1, 2)
    assert root.unwrap(old, CONTEXT) == root.unwrap(new, CONTEXT) == SEALED
    refused(lambda: root.unwrap(new[:4] + b"\1" + new[5:], CONTEXT), DecryptError)


# ---- the customer's levers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("login", LOGINS)
def test_soft_deletion_and_back(key: OpenBaoKey, login: str) -> None:
    root = by(key, login)
    wrapped = root.wrap(SEALED, CONTEXT)
    key.disable()
    started = time.monotonic()
    assert key.first_no is None
    refused(lambda: root.unwrap(wrapped, CONTEXT), RootDisabled)
    assert key.first_no is not None
    assert started - 0.1 < key.first_no < time.monotonic()
    refused(lambda: root.wrap(SEALED, CONTEXT), RootDisabled)
    key.enable()
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    assert key.first_no is None


def test_a_raised_minimum_version(key: OpenBaoKey) -> None:
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    key.raise_minimum_version()
    error = refused(lambda: root.unwrap(wrapped, CONTEXT), RootDisabled)
    assert "min_decryption_version" in str(error)
    use(root)
    key.enable()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


@pytest.mark.parametrize("login", LOGINS)
def test_deletion(bao: OpenBao, key: OpenBaoKey, login: str) -> None:
    root = by(key, login)
    wrapped = root.wrap(SEALED, CONTEXT)
    key.delete()
    refused(lambda: root.unwrap(wrapped, CONTEXT), RootDestroyed)
    # Encrypting with a key that is not there is to make one, which our policy does not allow: 403 all the same.
    refused(lambda: root.wrap(SEALED, CONTEXT), RootDestroyed)
    with pytest.raises(RuntimeError, match="no way back"):
        key.enable()
    bao.server.ask("POST", f"transit/keys/{key.name}")
    refused(lambda: root.unwrap(wrapped, CONTEXT), DecryptError)


def test_no_request_of_ours_makes_a_key(
    bao: OpenBao, key: OpenBaoKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even with a token that may do anything."""
    monkeypatch.delenv("OPENKCM_BAO_TOKEN_FILE")
    monkeypatch.setenv("BAO_TOKEN", bao.server.root_token)
    root = open_root(key.uri)
    use(root)
    key.delete()
    refused(lambda: root.wrap(SEALED, CONTEXT), RootDestroyed)
    keys = bao.server.ask("LIST", "transit/keys")["data"]["keys"]
    assert key.name not in keys


@pytest.mark.parametrize("login", LOGINS)
def test_each_permission_that_is_missing_is_named(bao: OpenBao, key: OpenBaoKey, login: str) -> None:
    root = by(key, login)
    wrapped = root.wrap(SEALED, CONTEXT)
    to_wrap, to_unwrap = key.permissions
    assert bao.permissions == tuple(permission.replace(key.name, "KEY") for permission in key.permissions)

    key.deny(to_unwrap)
    error = refused(lambda: root.unwrap(wrapped, CONTEXT), RootDenied)
    assert error.permission == to_unwrap == f"update on transit/decrypt/{key.name}"  # type: ignore[attr-defined]
    assert to_unwrap in str(error)
    again = root.wrap(SEALED, CONTEXT)

    key.deny(to_wrap)
    error = refused(lambda: root.wrap(SEALED, CONTEXT), RootDenied)
    assert error.permission == to_wrap == f"update on transit/encrypt/{key.name}"  # type: ignore[attr-defined]
    assert root.unwrap(again, CONTEXT) == SEALED

    key.deny()
    refused(lambda: root.wrap(SEALED, CONTEXT), RootDenied)
    refused(lambda: root.unwrap(again, CONTEXT), RootDenied)
    key.allow()
    assert root.unwrap(again, CONTEXT) == SEALED


def test_throttled(key: OpenBaoKey) -> None:
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    key.throttle()
    error = refused(lambda: root.unwrap(wrapped, CONTEXT), RootThrottled)
    assert error.retryable is True  # type: ignore[attr-defined]
    refused(lambda: root.wrap(SEALED, CONTEXT), RootThrottled)
    key.heal()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_sealed_and_unsealed(bao: OpenBao, key: OpenBaoKey) -> None:
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    bao.seal()
    try:
        error = refused(lambda: root.unwrap(wrapped, CONTEXT), RootUnavailable)
        assert error.retryable is False  # type: ignore[attr-defined]
        refused(lambda: open_root(key.uri_by("approle")).wrap(SEALED, CONTEXT), RootUnavailable)
    finally:
        bao.unseal()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_a_lying_server_is_not_believed(key: OpenBaoKey) -> None:
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    key.lie()
    assert root.unwrap(wrapped, CONTEXT) not in (SEALED, b"")
    key.heal()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


# ---- keys, mounts and namespaces that are others than the URI means -----------------------------------------


@pytest.mark.parametrize("kind", ["chacha20-poly1305", "xchacha20-poly1305"])
def test_other_key_types_that_bind(bao: OpenBao, kind: str) -> None:
    key = bao.make_key_of(next(names), kind)
    use(open_root(key.uri))
    key.close()


@pytest.mark.parametrize("kind", ["rsa-2048", "ecdsa-p256", "ed25519"])
def test_key_types_that_do_not_bind(bao: OpenBao, kind: str) -> None:
    key = bao.make_key_of(next(names), kind)
    refused(lambda: open_root(key.uri).wrap(SEALED, CONTEXT), RootMisconfigured)
    blob = b"\1\0\0\0\1" + bytes(132)
    assert "aes256-gcm96" in str(refused(lambda: open_root(key.uri).unwrap(blob, CONTEXT), RootMisconfigured))
    key.close()


@pytest.mark.parametrize("convergent", [False, True])
def test_derived_keys(bao: OpenBao, convergent: bool) -> None:
    key = bao.make_key_of(next(names), "aes256-gcm96", derived=True, convergent_encryption=convergent)
    refused(lambda: open_root(key.uri).wrap(SEALED, CONTEXT), RootMisconfigured)
    key.close()


def test_what_is_mounted_elsewhere(bao: OpenBao, key: OpenBaoKey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENKCM_BAO_TOKEN_FILE")
    monkeypatch.setenv("VAULT_TOKEN", bao.server.root_token)
    bao.server.ask("POST", "sys/mounts/other/pki", {"type": "pki"})
    for mount in ("nothing", "other/pki", "auth/approle"):
        root = open_root(key.uri.replace("/transit/", f"/{mount}/"))
        refused(lambda root=root: root.wrap(SEALED, CONTEXT), RootMisconfigured)
        refused(lambda root=root: root.unwrap(b"\1\0\0\0\1" + bytes(132), CONTEXT), RootMisconfigured)


def test_namespaces(bao: OpenBao, key: OpenBaoKey, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ask = bao.server.ask
    ask("POST", "sys/namespaces/team")
    ask("POST", "sys/mounts/keys/transit", {"type": "transit"}, namespace="team")
    ask("POST", "keys/transit/keys/root", namespace="team")
    root = open_root(key.uri.replace(f"/transit/{key.name}", "/keys/transit/root?namespace=team"))
    policy = root.grant("openkcm").text.partition("<<'EOF'\n")[2].partition("EOF")[0]  # type: ignore[attr-defined]
    ask("PUT", "sys/policies/acl/mine", {"policy": policy}, namespace="team")
    made = ask("POST", "auth/token/create", {"policies": ["mine"]}, namespace="team")
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(made["auth"]["client_token"])
    monkeypatch.setenv("OPENKCM_BAO_TOKEN_FILE", str(token))
    wrapped = root.wrap(SEALED, CONTEXT)
    assert root.unwrap(wrapped, CONTEXT) == SEALED

    # The variable stands in for the parameter, and the parameter counts more.
    bare = open_root(root.uri.replace("?namespace=team", ""))
    refused(lambda: bare.unwrap(wrapped, CONTEXT), RootDenied)
    monkeypatch.setenv("BAO_NAMESPACE", "team")
    assert bare.unwrap(wrapped, CONTEXT) == SEALED
    monkeypatch.setenv("BAO_NAMESPACE", "none")
    refused(lambda: bare.unwrap(wrapped, CONTEXT), RootMisconfigured)
    assert root.unwrap(wrapped, CONTEXT) == SEALED

    unlock = ask("POST", "sys/namespaces/api-lock/lock/team")["data"]["unlock_key"]
    error = refused(lambda: root.unwrap(wrapped, CONTEXT), RootDisabled)  # 503, and yet no outage
    assert "locked" in str(error)
    ask("POST", "sys/namespaces/api-lock/unlock/team", {"unlock_key": unlock})
    assert root.unwrap(wrapped, CONTEXT) == SEALED


# ---- threads, forks, secrets --------------------------------------------------------------------------------


def test_eight_threads_log_in_once(bao: OpenBao, key: OpenBaoKey) -> None:
    root = open_root(key.uri_by("approle"))
    before = sum(event.path == "auth/approle/login" for event in bao.server.events())
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                use(root)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    logins = [event for event in bao.server.events() if event.path == "auth/approle/login"][before:]
    assert [event.kind for event in logins] == ["request", "response"]


def test_a_forked_child_has_connections_and_a_token_of_its_own(bao: OpenBao, key: OpenBaoKey) -> None:
    root = open_root(key.uri_by("approle"))
    wrapped = root.wrap(SEALED, CONTEXT)
    accepted = key.proxy.accepted
    pids = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                for _ in range(3):
                    assert root.unwrap(wrapped, CONTEXT) == SEALED
                use(root)
                root.close()
                use(root)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        pids.append(pid)
    for _ in range(10):
        assert root.unwrap(wrapped, CONTEXT) == SEALED
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    assert key.proxy.accepted == accepted + 6


def test_nothing_secret_is_shown(bao: OpenBao, key: OpenBaoKey, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shown = []
    for login in LOGINS:
        root = by(key, login)
        wrapped = root.wrap(SEALED, CONTEXT)
        for lever in (key.disable, key.enable, key.deny, key.allow, key.fail, key.heal, key.proxy.cut):
            lever()
            try:
                root.unwrap(wrapped, CONTEXT)
            except OpenKCMError as error:
                shown += ["".join(traceback.format_exception(error)), repr(error)]
                assert error.__context__ is None or isinstance(error.__context__, OpenKCMError)
        shown += [
            repr(root),
            root.uri,
            repr(vars(root)),
            repr(root.grant()),
            repr(root._place().login._token),
        ]  # type: ignore[attr-defined]
    secrets = [bao.file(name).read_text().strip() for name in ("token", "role-id", "secret-id", "jwt")]
    secrets += [bao.server.root_token, root._place().login._token.value]  # type: ignore[attr-defined]
    everything = "\n".join(shown) + caplog.text
    assert "/v1/transit/decrypt" in caplog.text  # so the library's own lines were seen
    for secret in secrets:
        assert len(secret) > 20
        assert secret not in everything
