# SPDX-License-Identifier: Apache-2.0
"""``aws-kms:`` roots: who we are to AWS, what it must allow us, and what roots share and keep to themselves."""

from __future__ import annotations

import base64
import gc
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from openkcm.errors import RootDenied, RootDisabled, RootMisconfigured, RootUnavailable
from openkcm.roots import Root, open_root
from openkcm.roots.aws import AWSRoot, open_aws
from openkcm.roots.aws import clients as aws_clients
from openkcm.testing.aws import ACCOUNT, AWSKMS
from support import refused

CONTEXT = {"layer": "L2", "tenant": "acme", "region": "local", "version": "1"}
SEALED = bytes(range(72))
OTHER_ACCOUNT = "999988887777"
ARN = f"arn:aws:kms:eu-central-1:{ACCOUNT}:key/1234abcd-12ab-34cd-56ef-1234567890ab"
URI = f"aws-kms://{ARN}"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/openkcm"
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


@pytest.fixture
def provider() -> Iterator[AWSKMS]:
    with AWSKMS() as provider:
        yield provider


def use(root: Root) -> None:
    assert root.unwrap(root.wrap(SEALED, CONTEXT), CONTEXT) == SEALED


def set_environment(monkeypatch: pytest.MonkeyPatch, values: Mapping[str, str]) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)


# ---- credentials and roles -----------------------------------------------------------------------------------


def test_renewed_credentials_are_found_without_a_restart(
    provider: AWSKMS, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = open_root(provider.make_key("root").uri)
    use(root)
    provider.expire()
    assert "expired" in str(refused(lambda: use(root), RootMisconfigured))
    renewed = provider.renew()
    assert "access key" in str(refused(lambda: use(root), RootMisconfigured))
    set_environment(monkeypatch, renewed)
    use(root)


@pytest.mark.parametrize("role", [None, "byok"])
def test_a_credentials_file_that_is_written_anew_is_read_anew(
    provider: AWSKMS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, role: str | None
) -> None:
    def write() -> None:
        us = provider.us
        (tmp_path / "credentials").write_text(
            f"[default]\naws_access_key_id = {us.access_key}\naws_secret_access_key = {us.secret}\n"
            f"aws_session_token = {us.token}\n"
        )

    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    write()
    root = open_root(provider.make_key("root", role=role).uri)
    use(root)
    provider.renew()
    refused(lambda: use(root), RootMisconfigured)
    write()
    use(root)


def test_credentials_from_a_profile(
    provider: AWSKMS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A profile that assumes a role from another profile, as the SDK does it; its clients keep our times."""
    key = provider.make_key("root", role="byok", external_id="id-7")
    us = provider.us
    (tmp_path / "config").write_text(
        f"[profile us]\naws_access_key_id = {us.access_key}\naws_secret_access_key = {us.secret}\n"
        f"aws_session_token = {us.token}\n"
        f"[profile customer]\nrole_arn = {key.role}\nsource_profile = us\nexternal_id = id-7\n"
    )
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    set_environment(monkeypatch, {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_PROFILE": "customer"})
    root = open_root(URI.replace(ARN, key.arn))
    use(root)
    assert provider.assumed == 1
    key.deny("sts:AssumeRole")
    again = open_root(f"aws-kms://{key.arn}")
    use(again)
    root.close()
    again.close()
    gc.collect()
    error = refused(lambda: use(again), RootDenied)
    assert isinstance(error, RootDenied)
    assert error.permission == "sts:AssumeRole"


def test_a_role_is_assumed_once_for_many_roots(provider: AWSKMS) -> None:
    keys = [provider.make_key(name, account=OTHER_ACCOUNT, role="byok") for name in ("one", "two")]
    roots = [open_root(key.uri) for key in keys]
    for root in roots:
        use(root)
    assert provider.assumed == 1
    refused(lambda: use(open_root(f"aws-kms://{keys[0].arn}")), RootDenied)


def test_the_external_id_is_needed(provider: AWSKMS) -> None:
    key = provider.make_key("root", account=OTHER_ACCOUNT, role="byok", external_id="id-7")
    use(open_root(key.uri))
    for other in (key.uri.replace("&external-id=id-7", ""), key.uri.replace("id-7", "id-8")):
        error = refused(lambda other=other: use(open_root(other)), RootDenied)
        assert isinstance(error, RootDenied)
        assert error.permission == "sts:AssumeRole"
        assert "trust policy" in str(error)


def test_a_role_is_assumed_again_before_its_session_ends(provider: AWSKMS) -> None:
    provider.session_seconds = 14 * 60  # the SDK renews in the last quarter of an hour
    key = provider.make_key("root", role="byok")
    root = open_root(key.uri)
    use(root)
    before = provider.assumed
    use(root)
    assert provider.assumed > before
    provider.session_seconds = 3600
    use(root)
    after = provider.assumed
    use(root)
    assert provider.assumed == after


def test_a_role_whose_trust_is_withdrawn(provider: AWSKMS, caplog: pytest.LogCaptureFixture) -> None:
    """What a session may, it may to its end: the key's own levers act at once, a trust policy with the next session."""
    key = provider.make_key("root", role="byok")
    root = open_root(key.uri)
    use(root)
    key.deny("sts:AssumeRole")
    use(root)
    key.disable()
    refused(lambda: use(root), RootDisabled)
    key.enable()
    provider.session_seconds = 300
    key.allow()
    second = open_root(key.uri + "&external-id=another-session")
    use(second)
    key.deny("sts:AssumeRole")
    refused(lambda: use(second), RootDenied)


def test_sts_that_does_not_answer(provider: AWSKMS, monkeypatch: pytest.MonkeyPatch) -> None:
    key = provider.make_key("root", role="byok")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "https://127.0.0.1:1")
    error = refused(lambda: use(open_root(key.uri)), RootUnavailable)
    assert key.requests == 0
    assert "127.0.0.1" in str(error)


def test_expired_credentials_cannot_assume_a_role(provider: AWSKMS) -> None:
    root = open_root(provider.make_key("root", role="byok").uri)
    provider.expire()
    assert "expired" in str(refused(lambda: use(root), RootMisconfigured))


# ---- grants --------------------------------------------------------------------------------------------------


def documents(text: str) -> list[Any]:
    """The JSON documents in a grant, with sentences between them."""
    decoder, found = json.JSONDecoder(), []
    while (start := text.find("{")) >= 0:
        document, end = decoder.raw_decode(text[start:])
        found.append(document)
        text = text[start + end :]
    return found


def test_a_grant_in_one_account(provider: AWSKMS) -> None:
    root = open_aws(provider.make_key("root").uri)
    grant = root.grant()
    ours = f"arn:aws:iam::{ACCOUNT}:role/openkcm-core"
    assert (grant.form, grant.identity, grant.permissions) == (
        "key policy statement",
        ours,
        ("kms:Encrypt", "kms:Decrypt"),
    )
    assert json.loads(grant.text) == {
        "Sid": "OpenKCM",
        "Effect": "Allow",
        "Principal": {"AWS": ours},
        "Action": ["kms:Encrypt", "kms:Decrypt"],
        "Resource": "*",
        "Condition": {"Null": {"kms:EncryptionContext:openkcm:layer": "false"}},
    }


def test_a_grant_across_accounts() -> None:
    root = open_aws(URI)
    ours = f"arn:aws:iam::{OTHER_ACCOUNT}:user/a/path/us"
    grant = root.grant(ours)
    statement, policy = documents(grant.text)
    assert statement["Principal"] == {"AWS": ours}
    assert policy["Statement"] == [
        {"Effect": "Allow", "Action": ["kms:Encrypt", "kms:Decrypt"], "Resource": ARN}
    ]
    assert "another account" in grant.text


def test_a_grant_by_a_role(provider: AWSKMS) -> None:
    key = provider.make_key("root", account=OTHER_ACCOUNT, role="byok", external_id="id-7")
    grant = open_aws(key.uri).grant()
    ours = f"arn:aws:iam::{ACCOUNT}:role/openkcm-core"
    statement, trust, policy = documents(grant.text)
    assert grant.permissions == ("kms:Encrypt", "kms:Decrypt", "sts:AssumeRole")
    assert grant.identity == key.role
    assert statement["Principal"] == {"AWS": key.role}
    assert trust["Statement"] == [
        {
            "Effect": "Allow",
            "Principal": {"AWS": ours},
            "Action": "sts:AssumeRole",
            "Condition": {"StringEquals": {"sts:ExternalId": "id-7"}},
        }
    ]
    assert policy["Statement"] == [{"Effect": "Allow", "Action": "sts:AssumeRole", "Resource": key.role}]


@pytest.mark.parametrize(
    ("given_identity", "principal"),
    [
        (ROLE, ROLE),
        (ACCOUNT, f"arn:aws:iam::{ACCOUNT}:root"),
        (f"arn:aws:sts::{ACCOUNT}:assumed-role/openkcm/i-0abc", ROLE),
        (f"arn:aws:iam::{ACCOUNT}:root", f"arn:aws:iam::{ACCOUNT}:root"),
    ],
)
def test_who_is_granted(given_identity: str, principal: str) -> None:
    assert open_aws(URI).grant(given_identity).identity == principal


@pytest.mark.parametrize(
    "identity",
    [
        "",
        "me",
        "*",
        f"arn:aws:sts::{ACCOUNT}:federated-user/x",
        f"arn:aws-cn:iam::{ACCOUNT}:role/x",
        ROLE + "\n",
    ],
)
def test_what_is_no_identity(identity: str) -> None:
    refused(lambda: open_aws(URI).grant(identity), RootMisconfigured)


def test_an_identity_that_cannot_be_found(provider: AWSKMS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", "https://127.0.0.1:1")
    assert "identity=" in str(refused(lambda: open_aws(URI).grant(), RootMisconfigured))
    for name in CREDENTIALS:
        monkeypatch.delenv(name)
    refused(lambda: open_aws(URI).grant(), RootMisconfigured)
    open_aws(URI).grant(ROLE)


# ---- warnings ------------------------------------------------------------------------------------------------


def test_what_is_weak(provider: AWSKMS, monkeypatch: pytest.MonkeyPatch) -> None:
    root = open_aws(provider.make_key("root").uri)
    assert root.warnings() == []
    monkeypatch.delenv("AWS_SESSION_TOKEN")
    assert ["no end" in each for each in open_aws(URI).warnings()] == [True]
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", "http://127.0.0.1:1")
    assert ["TLS" in each for each in open_aws(URI).warnings()] == [True, False]
    monkeypatch.setenv("AWS_PROFILE", "there-is-none")
    assert open_aws(URI).warnings() == []


# ---- clients -------------------------------------------------------------------------------------------------


def connection(root: Root) -> aws_clients.Connection:
    assert isinstance(root, AWSRoot)
    assert root._connection is not None
    return root._connection


def test_roots_share_a_client_and_the_last_closes_it(
    provider: AWSKMS, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (open_root(provider.make_key(name).uri) for name in ("one", "two"))
    use(one)
    use(two)
    shared = connection(one)
    assert connection(two) is shared
    closed: list[int] = []
    close = shared.client.close
    monkeypatch.setattr(shared.client, "close", lambda: (closed.append(1), close()))
    del shared
    one.close()
    use(two)
    assert not closed
    two.close()
    gc.collect()
    assert closed == [1]
    use(one)


def test_another_environment_is_another_client(provider: AWSKMS, monkeypatch: pytest.MonkeyPatch) -> None:
    one = open_root(provider.make_key("one").uri)
    use(one)
    with AWSKMS() as elsewhere:
        two = open_root(elsewhere.make_key("two").uri)
        use(two)
        assert connection(one) is not connection(two)
    use(one)


def test_eight_threads(provider: AWSKMS) -> None:
    roots = [
        open_root(provider.make_key(str(number), role="byok" if number % 2 else None).uri)
        for number in range(4)
    ]
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                for root in roots:
                    use(root)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert provider.assumed == 1


def test_a_forked_child_makes_its_own_client(provider: AWSKMS) -> None:
    roots = [open_root(provider.make_key(name, role=name or None).uri) for name in ("", "byok")]
    wrapped = [root.wrap(SEALED, CONTEXT) for root in roots]
    before = [connection(root) for root in roots]
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with aws_clients._lock:
            held.set()
            release.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for root, blob, old in zip(roots, wrapped, before, strict=True):
                assert root.unwrap(blob, CONTEXT) == SEALED
                assert connection(root) is not old
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    release.set()
    holder.join(60)
    assert os.waitpid(pid, 0)[1] == 0
    for root, blob, old in zip(roots, wrapped, before, strict=True):
        assert root.unwrap(blob, CONTEXT) == SEALED
        assert connection(root) is old


def test_without_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    root = open_root(URI.replace("1234abcd", "00000000"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "botocore"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "botocore", None)
    assert "openkcm[aws]" in str(refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured))
    assert root.warnings() == []


# ---- what is not told ----------------------------------------------------------------------------------------


def test_nothing_secret_is_logged_or_shown(provider: AWSKMS, caplog: pytest.LogCaptureFixture) -> None:
    key = provider.make_key("root", role="byok")
    with caplog.at_level(logging.DEBUG):
        root = open_root(key.uri)
        use(root)
        key.deny("kms:Decrypt")
        error = refused(lambda: use(root), RootDenied)
        open_aws(key.uri).grant()
        root.warnings()
    sessions = list(provider._principals.values())
    assert len(sessions) == 2
    secrets = [part for each in sessions for part in (each.secret, each.token, each.access_key)]
    secrets += [base64.b64encode(SEALED).decode(), repr(SEALED)]
    shown = (
        caplog.text
        + repr(root)
        + str(vars(root))
        + repr(connection(root))
        + str(error)
        + repr(key)
        + repr(sessions)
    )
    assert [secret for secret in secrets if secret in shown] == []
    assert "Signature:" not in caplog.text


def test_an_applications_own_debugging_stays(provider: AWSKMS, caplog: pytest.LogCaptureFixture) -> None:
    import botocore.session

    key = provider.make_key("root")
    use(open_root(key.uri))
    client = botocore.session.Session().create_client("kms")
    with caplog.at_level(logging.DEBUG, "botocore"):
        client.describe_key(KeyId=key.arn)
    client.close()
    assert "Response body" in caplog.text
