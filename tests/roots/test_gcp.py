# SPDX-License-Identifier: Apache-2.0
"""The Cloud KMS root: its URI, what it binds, whose key answered, who may use it, threads and forks."""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import shlex
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcp_support import CONTEXT, NAME, SEALED
from gcp_support import cloud as cloud
from openkcm.errors import (
    DecryptError,
    RootDestroyed,
    RootDisabled,
    RootMisconfigured,
)
from openkcm.roots import Grantable, Root, open_root
from openkcm.roots.gcp import MAX_CIPHERTEXT_BYTES, GCPRoot, open_gcp, parse_blob
from openkcm.roots.gcp.uri import GCPKeyURI, endpoints, parse_gcp_uri
from openkcm.testing.gcp import GCPKMS, GCPKey, VersionState
from support import refused, run_python

OPENED: list[GCPRoot] = []


@pytest.fixture
def key(cloud: GCPKMS, request: pytest.FixtureRequest) -> Iterator[GCPKey]:
    key = cloud.make_key(f"key-{abs(hash(request.node.nodeid)) % 10**12}")
    yield key
    key.heal()
    while OPENED:
        OPENED.pop().close()


def opened(key: GCPKey) -> GCPRoot:
    root = open_gcp(key.uri)
    OPENED.append(root)
    return root


# ---- URIs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "gcp-kms:",
        "gcp-kms://",
        f"gcp-kms:{NAME}",
        f"gcp-kms:///{NAME}",
        f"gcp-kms://{NAME}/",
        f"gcp-kms://{NAME}/cryptoKeyVersions/1",
        f"gcp-kms://{NAME}/cryptoKeyVersions/",
        f"gcp-kms://{NAME}#1",
        f"gcp-kms://{NAME}\n",
        f"gcp-kms://{NAME}?",
        f"gcp-kms://{NAME}?endpoint=",
        f"gcp-kms://{NAME}?endpoint=kms.example.com",
        f"gcp-kms://{NAME}?endpoint=cloudkms.googleapis.com",
        f"gcp-kms://{NAME}?endpoint=cloudkms.europe-west4.rep.googleapis.com",
        f"gcp-kms://{NAME}?endpoint=cloudkms.europe-west3.rep.googleapis.com:443",
        f"gcp-kms://{NAME}?endpoint=https://cloudkms.europe-west3.rep.googleapis.com",
        f"gcp-kms://{NAME}?endpoint=CLOUDKMS.europe-west3.rep.googleapis.com",
        f"gcp-kms://{NAME}?endpoint=cloudkms.europe-west3.rep.googleapis.com&endpoint=x",
        f"gcp-kms://{NAME}?credentials=/etc/key.json",
        f"gcp-kms://cloudkms.googleapis.com/{NAME}",
        f"gcp-kms://user@{NAME}",
        f"GCP-KMS://{NAME}",
        f"gcp-kms://{NAME.replace('cryptoKeys', 'cryptokeys')}",
        f"gcp-kms://{NAME.replace('customer-project', 'Customer')}",
        f"gcp-kms://{NAME.replace('customer-project', '01')}",
        f"gcp-kms://{NAME.replace('customer-project', '..')}",
        f"gcp-kms://{NAME.replace('europe-west3', 'evil.example')}",
        f"gcp-kms://{NAME.replace('europe-west3', '')}",
        f"gcp-kms://{NAME.replace('openkcm', 'a%20b')}",
        f"gcp-kms://{NAME}{'x' * 60}",
        f"gcp-kms://{NAME.replace('root', 'rööt')}",
    ],
)
def test_malformed_uris(uri: str) -> None:
    error = refused(lambda: parse_gcp_uri(uri), RootMisconfigured)
    assert "/etc/key.json" not in str(error)


def test_a_pinned_version_is_refused_with_the_reason() -> None:
    error = refused(lambda: open_root(f"gcp-kms://{NAME}/cryptoKeyVersions/7"), RootMisconfigured)
    assert "cryptoKeyVersions" in str(error)
    assert "rotate" in str(error)


@pytest.mark.parametrize(
    "project", ["customer-project", "a12345", "123456789012", "example.com:customer-project"]
)
def test_projects_by_id_number_and_domain(project: str) -> None:
    uri = f"gcp-kms://{NAME.replace('customer-project', project)}"
    assert parse_gcp_uri(uri).project == project
    assert open_root(uri).uri == uri


def test_google_serves_a_location_at_hosts_of_its_own() -> None:
    for host in endpoints("europe-west3"):
        assert host.endswith(".googleapis.com")
        uri = f"gcp-kms://{NAME}?endpoint={host}"
        assert open_root(uri).uri == uri
    assert endpoints("global") == ()
    everywhere = NAME.replace("europe-west3", "global")
    refused(
        lambda: parse_gcp_uri(f"gcp-kms://{everywhere}?endpoint=global-cloudkms.googleapis.com"),
        RootMisconfigured,
    )


_IDS = st.from_regex(r"[A-Za-z0-9_-]{1,63}", fullmatch=True)


@given(
    st.from_regex(r"[a-z][a-z0-9-]{4,28}[a-z0-9]", fullmatch=True),
    st.from_regex(r"[a-z]{2,12}-[a-z]{4,9}[0-9]", fullmatch=True),
    _IDS,
    _IDS,
    st.sampled_from([None, 0, 1, 2]),
)
def test_serialising_and_parsing_is_the_identity(
    project: str, location: str, ring: str, name: str, endpoint: int | None
) -> None:
    host = None if endpoint is None else endpoints(location)[endpoint]
    uri = GCPKeyURI(project, location, ring, name, host)
    assert parse_gcp_uri(str(uri)) == uri
    assert str(parse_gcp_uri(str(uri))) == str(uri)


@given(st.text(max_size=40))
def test_any_text_is_a_uri_or_refused(text: str) -> None:
    for uri in (text, f"gcp-kms://{text}", f"gcp-kms://{NAME}?{text}", f"gcp-kms://{NAME}{text}"):
        with contextlib.suppress(RootMisconfigured):
            assert str(parse_gcp_uri(uri)) == uri


def test_without_the_sdk() -> None:
    code = f"""
import sys
sys.modules["google_crc32c"] = None
from openkcm.errors import RootMisconfigured
from openkcm.roots import open_root
try:
    open_root("gcp-kms://{NAME}")
except RootMisconfigured as error:
    print(error)
"""
    assert "openkcm[gcp]" in run_python(code).stdout


def test_importing_the_module_imports_no_sdk() -> None:
    code = "import sys, openkcm.roots.gcp, openkcm.testing.gcp; print({'google', 'requests', 'grpc'} & {*sys.modules})"
    assert run_python(code).stdout == "set()\n"


# ---- wrapping --------------------------------------------------------------------------------------------


def test_round_trip(key: GCPKey) -> None:
    root = opened(key)
    assert isinstance(root, Root)
    assert isinstance(root, Grantable)
    assert not root.development
    wrapped = root.wrap(SEALED, CONTEXT)
    assert wrapped[0] == 1
    assert len(wrapped) < 256
    assert SEALED not in wrapped
    assert root.wrap(SEALED, CONTEXT) != wrapped
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    again = opened(key)
    assert again.uri == root.uri == key.uri
    assert again.unwrap(wrapped, CONTEXT) == SEALED
    assert key.requests == 4, "one request a call"


@pytest.mark.parametrize(
    "other", [{}, {"tenant": "acme"}, CONTEXT | {"tenant": "evil"}, CONTEXT | {"more": ""}]
)
def test_the_context_is_bound(key: GCPKey, other: dict[str, str]) -> None:
    root = opened(key)
    refused(lambda: root.unwrap(root.wrap(SEALED, CONTEXT), other), DecryptError)
    refused(lambda: root.unwrap(root.wrap(SEALED, other), CONTEXT), DecryptError)


def test_every_byte_of_a_blob_counts(key: GCPKey) -> None:
    key.rotate()
    root = opened(key)
    wrapped = root.wrap(SEALED, CONTEXT)
    for at in range(len(wrapped)):
        altered = wrapped[:at] + bytes((wrapped[at] ^ 1,)) + wrapped[at + 1 :]
        refused(lambda altered=altered: root.unwrap(altered, CONTEXT), DecryptError)
    for wrong in (wrapped[:-1], wrapped + b"x", b"\x01" + os.urandom(len(wrapped) - 1)):
        refused(lambda wrong=wrong: root.unwrap(wrong, CONTEXT), DecryptError)
    assert root.unwrap(wrapped, CONTEXT) == SEALED


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\x01",
        b"\x00" + bytes(80),
        b"\x02" + bytes(80),
        b"\x01" + bytes(27),
        bytes(MAX_CIPHERTEXT_BYTES),
    ],
)
def test_malformed_blobs_are_not_sent(key: GCPKey, blob: bytes) -> None:
    root = opened(key)
    refused(lambda: root.unwrap(blob, CONTEXT), DecryptError)
    refused(lambda: parse_blob(b"\x01" + bytes(MAX_CIPHERTEXT_BYTES + 1)), DecryptError)
    assert key.requests == 0
    assert len(parse_blob(b"\x01" + bytes(MAX_CIPHERTEXT_BYTES))) == MAX_CIPHERTEXT_BYTES


def test_another_key_does_not_open_it(cloud: GCPKMS, key: GCPKey) -> None:
    other = opened(cloud.make_key("another"))
    refused(lambda: other.unwrap(opened(key).wrap(SEALED, CONTEXT), CONTEXT), DecryptError)


@pytest.mark.parametrize("length", [0, 8 * 1024])
def test_what_no_protection_level_takes(key: GCPKey, length: int) -> None:
    refused(lambda: opened(key).wrap(bytes(length), CONTEXT), RootMisconfigured)
    assert key.requests == 0


def test_a_rotated_key_opens_what_it_wrapped_before(key: GCPKey) -> None:
    root = opened(key)
    first = root.wrap(SEALED, CONTEXT)
    key.rotate()
    second = root.wrap(SEALED, CONTEXT)
    assert root.unwrap(first, CONTEXT) == root.unwrap(second, CONTEXT) == SEALED
    key.move(1, VersionState.DISABLED)
    refused(lambda: root.unwrap(first, CONTEXT), RootDisabled)
    assert root.unwrap(second, CONTEXT) == SEALED
    key.move(1, VersionState.DESTROYED)
    refused(lambda: root.unwrap(first, CONTEXT), RootDestroyed)
    key.move(2, VersionState.DISABLED)
    refused(lambda: root.wrap(SEALED, CONTEXT), RootDisabled)


def test_a_lie_is_returned_for_the_core_to_find(key: GCPKey) -> None:
    root = opened(key)
    wrapped = root.wrap(SEALED, CONTEXT)
    key.lie()
    assert root.unwrap(wrapped, CONTEXT) != SEALED


# ---- grants and warnings -----------------------------------------------------------------------------------


def test_what_to_grant(cloud: GCPKMS, key: GCPKey) -> None:
    grant = opened(key).grant()
    assert grant.form == "gcloud command"
    assert grant.permissions == cloud.permissions
    assert grant.identity == f"serviceAccount:{cloud.core.email}"
    assert shlex.split(grant.text) == [
        *("gcloud", "kms", "keys", "add-iam-policy-binding", key.name, "--keyring", "openkcm"),
        *("--location", "europe-west3", "--project", "customer-project"),
        *("--member", f"serviceAccount:{cloud.core.email}"),
        *("--role", "roles/cloudkms.cryptoKeyEncrypterDecrypter"),
    ]
    assert key.requests == 0, "what to grant is told without the key"


@pytest.mark.parametrize(
    ("identity", "member"),
    [
        ("kcm@p.iam.gserviceaccount.com", "serviceAccount:kcm@p.iam.gserviceaccount.com"),
        ("ann@example.com", "user:ann@example.com"),
        ("group:kcm@example.com", "group:kcm@example.com"),
        (
            "serviceAccount:proj.svc.id.goog@x.example[ns/app]",
            "serviceAccount:proj.svc.id.goog@x.example[ns/app]",
        ),
        ("principal://iam.googleapis.com/x/subject/a'b", "principal://iam.googleapis.com/x/subject/a'b"),
        ("principalSet://iam.googleapis.com/x/*", "principalSet://iam.googleapis.com/x/*"),
    ],
)
def test_what_to_grant_to_somebody_named(key: GCPKey, identity: str, member: str) -> None:
    grant = opened(key).grant(identity)
    assert grant.identity == member
    assert shlex.split(grant.text)[-3] == member


@pytest.mark.parametrize(
    "identity", ["", "kcm", "allUsers", "user:", "a b@c.de", "user:a@b; rm -rf /", "x:y@z.de"]
)
def test_what_is_no_identity(key: GCPKey, identity: str) -> None:
    refused(lambda: opened(key).grant(identity), RootMisconfigured)


def test_no_warnings_of_a_key_that_is_as_it_should_be(key: GCPKey) -> None:
    assert opened(key).warnings() == []
    assert key.requests == 0


def test_a_key_in_our_own_project_is_warned_of(key: GCPKey) -> None:
    root = open_gcp(key.uri.replace("customer-project", "openkcm"))
    OPENED.append(root)
    assert ["our own service account" in warning for warning in root.warnings()] == [True]


# ---- threads, forks, closing -------------------------------------------------------------------------------


def test_eight_threads(key: GCPKey) -> None:
    root = opened(key)
    wrapped = opened(key).wrap(SEALED, CONTEXT)
    wrong: list[BaseException] = []
    start = threading.Barrier(8)

    def work() -> None:
        try:
            start.wait(10)
            for _ in range(10):
                assert root.unwrap(wrapped, CONTEXT) == SEALED
                assert root.unwrap(root.wrap(SEALED, {"a": "b"}), {"a": "b"}) == SEALED
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def in_child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def test_a_forked_child(key: GCPKey) -> None:
    root = opened(key)
    wrapped = root.wrap(SEALED, CONTEXT)
    before = root._client

    def work() -> None:
        assert root._client is None
        assert root.unwrap(wrapped, CONTEXT) == SEALED
        assert root._client is not before

    assert [in_child(work) for _ in range(3)] == [0, 0, 0]
    assert root._client is before
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_a_child_of_a_parent_that_holds_the_lock(key: GCPKey) -> None:
    root = opened(key)
    wrapped = root.wrap(SEALED, CONTEXT)

    def work() -> None:
        assert root.unwrap(wrapped, CONTEXT) == SEALED
        root.close()

    with root._lock:
        assert in_child(work) == 0


def test_closing_lets_go_and_use_comes_back(key: GCPKey) -> None:
    root = opened(key)
    wrapped = root.wrap(SEALED, CONTEXT)
    root.close()
    root.close()
    assert root._client is None
    assert root.unwrap(wrapped, CONTEXT) == SEALED


# ---- what is not said ----------------------------------------------------------------------------------------


class _Everything(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(f"{record.name} {record.getMessage()} {record.__dict__}")


def test_nothing_secret_is_logged_or_shown(
    cloud: GCPKMS, key: GCPKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[str] = []
    who = cloud.login.who

    def listen(request: Any) -> Any:
        tokens.append(request.headers["authorization"].split()[1])
        return who(request)

    monkeypatch.setattr(cloud.login, "who", listen)
    handler = _Everything()
    loggers = [logging.getLogger(name) for name in ("", "google", "urllib3", "requests")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.addHandler(handler)
    try:
        root = opened(key)
        wrapped = root.wrap(SEALED, CONTEXT)
        assert root.unwrap(wrapped, CONTEXT) == SEALED
        errors = [refused(lambda: root.unwrap(wrapped, {}), DecryptError)]
        key.disable()
        errors.append(refused(lambda: root.unwrap(wrapped, CONTEXT), RootDisabled))
        key.enable()
        key.reply({"error": {"message": "SECRET-TEXT", "status": "NEW"}}, 400)
        errors.append(refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured))
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
    assert handler.said, "the loggers are listened to"
    everything = "\n".join([*handler.said, *map(repr, errors), *map(str, errors), repr(root), repr(key)])
    assert "SECRET-TEXT" not in everything
    for secret in (*tokens, base64.b64encode(SEALED).decode(), SEALED.hex(), repr(SEALED)):
        assert secret not in everything
    assert len(tokens) >= 2


def test_other_users_of_the_sdk_still_log(key: GCPKey) -> None:
    opened(key).wrap(SEALED, CONTEXT)
    handler = _Everything()
    logger = logging.getLogger("google.auth.transport.requests")
    logger.addHandler(handler)
    logger.warning("theirs")
    logger.removeHandler(handler)
    assert len(handler.said) == 1
