# SPDX-License-Identifier: Apache-2.0
"""What AWS and its SDK answer, over the wire where there is one, and what becomes of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.exceptions
import pytest
from botocore.exceptions import ClientError

from openkcm.errors import (
    DecryptError,
    OpenKCMError,
    RootDenied,
    RootMisconfigured,
    RootThrottled,
    RootUnavailable,
)
from openkcm.roots import Root, open_root
from openkcm.roots.aws import ANSWERS
from openkcm.roots.aws.answers import ROWS, translate
from openkcm.testing.aws import ACCOUNT, AWSKMS
from openkcm.testing.aws.errors import FAILURES, KMS_FAILURES, STS_FAILURES, is_refusal
from support import refused

CONTEXT = {"layer": "L2", "tenant": "acme", "region": "local", "version": "1"}
SEALED = bytes(range(72))
ARN = f"arn:aws:kms:eu-central-1:{ACCOUNT}:key/1234abcd-12ab-34cd-56ef-1234567890ab"
URI = f"aws-kms://{ARN}"
BLOB = b"\x01" + bytes(120)
LONGEST_SECONDS = 8.0
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")


@pytest.fixture
def provider() -> Iterator[AWSKMS]:
    with AWSKMS() as provider:
        yield provider


def unwrap(root: Root) -> bytes:
    return root.unwrap(BLOB, CONTEXT)


# ---- the table -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(KMS_FAILURES))
def test_what_kms_answers(provider: AWSKMS, name: str) -> None:
    key = provider.make_key("root")
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    key.answer(name)
    error = refused(lambda: root.unwrap(wrapped, CONTEXT), ANSWERS[name])
    assert key.requests == 2
    assert (key.first_no is not None) is is_refusal(name)
    if ANSWERS[name] is not DecryptError:
        assert FAILURES[name].code in str(error)
    assert "nobody has documented" not in str(error)
    key.heal()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


@pytest.mark.parametrize("name", sorted(STS_FAILURES))
def test_what_sts_answers(provider: AWSKMS, name: str) -> None:
    key = provider.make_key("root", role="byok")
    root = open_root(key.uri)
    key.answer(name)
    error = refused(lambda: root.wrap(SEALED, CONTEXT), ANSWERS[name])
    assert key.requests == 0
    assert FAILURES[name].code in str(error)
    if isinstance(error, RootDenied):
        assert error.permission == "sts:AssumeRole"
    key.heal()
    root.wrap(SEALED, CONTEXT)


def test_encrypt_cannot_fail_to_decrypt(provider: AWSKMS) -> None:
    key = provider.make_key("root")
    key.answer("InvalidCiphertextException")
    refused(lambda: open_root(key.uri).wrap(SEALED, CONTEXT), RootMisconfigured)


SDK = {
    "EndpointConnectionError": {
        "endpoint_url": "https://user:hunter2@kms.example/x?hunter2",
        "error": "hunter2",
    },
    "ConnectTimeoutError": {"endpoint_url": "https://kms.example", "error": "hunter2"},
    "ReadTimeoutError": {"endpoint_url": "https://kms.example", "error": "hunter2"},
    "ConnectionClosedError": {"endpoint_url": "https://kms.example"},
    "ProxyConnectionError": {"proxy_url": "https://user:hunter2@proxy"},
    "HTTPClientError": {"error": "hunter2"},
    "ResponseStreamingError": {"error": "hunter2"},
    "IncompleteReadError": {"actual_bytes": 1, "expected_bytes": 2},
    "SSLError": {"endpoint_url": "https://kms.example", "error": "hunter2"},
    "NoCredentialsError": {},
    "PartialCredentialsError": {"provider": "hunter2", "cred_var": "hunter2"},
    "CredentialRetrievalError": {"provider": "hunter2", "error_msg": "hunter2"},
    "MetadataRetrievalError": {"error_msg": "hunter2"},
    "TokenRetrievalError": {"provider": "hunter2", "error_msg": "hunter2"},
    "UnauthorizedSSOTokenError": {},
    "SSOTokenLoadError": {"error_msg": "hunter2"},
    "ProfileNotFound": {"profile": "hunter2"},
    "InfiniteLoopConfigError": {"source_profile": "hunter2", "visited_profiles": "hunter2"},
    "InvalidConfigError": {"error_msg": "hunter2"},
    "ConfigParseError": {"path": "hunter2"},
    "ConfigNotFound": {"path": "hunter2"},
    "NoRegionError": {},
    "InvalidRegionError": {"region_name": "hunter2"},
    "UnknownEndpointError": {"service_name": "hunter2", "region_name": "hunter2"},
    "EndpointProviderError": {"msg": "hunter2"},
    "InvalidProxiesConfigError": {"error": "hunter2"},
    "MissingDependencyException": {"msg": "hunter2"},
    "ParamValidationError": {"report": "hunter2"},
}


@pytest.mark.parametrize("name", sorted(SDK))
def test_what_the_sdk_raises(name: str) -> None:
    error = getattr(botocore.exceptions, name)(**SDK[name])
    translated = translate(error).error
    assert type(translated) is ANSWERS[name]
    assert name in str(translated)
    assert "hunter2" not in str(translated)


def test_every_row_is_tested() -> None:
    special = {"EndpointConnectionError (name does not resolve)", "SSLError (connection lost)"}
    assert set(ANSWERS) == set(FAILURES) | set(SDK) | special
    assert not set(FAILURES) & set(SDK)
    for name, row in ROWS.items():
        assert issubclass(row.kind, OpenKCMError)
        assert row.words or row.kind is DecryptError, name


def client_error(code: Any, message: Any = "", status: int = 400, operation: str = "Decrypt") -> ClientError:
    return ClientError(
        {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}},
        operation,
    )


@pytest.mark.parametrize(
    ("code", "status", "answer"),
    [
        ("SomethingNew", 400, RootMisconfigured),
        ("SomethingNew", 403, RootMisconfigured),
        ("SomethingNew", 500, RootUnavailable),
        ("SomethingNew", 599, RootUnavailable),
        ("SomethingNew", 429, RootThrottled),
        ("302", 302, RootMisconfigured),
        ("", 503, RootUnavailable),
        ("", 400, RootMisconfigured),
        (None, 400, RootMisconfigured),
        ("disabledexception", 400, RootMisconfigured),
    ],
)
def test_unknown_codes(code: Any, status: int, answer: type[OpenKCMError]) -> None:
    assert type(translate(client_error(code, status=status)).error) is answer


def test_codes_are_shown_only_if_they_look_like_one() -> None:
    for code in ("\x1b[31mred", "a b", "A" * 65, "<html>", 'x"'):
        message = str(translate(client_error(code)).error)
        assert code not in message
        assert "unknown answer" in message
    assert "(SomethingNew)" in str(translate(client_error("SomethingNew")).error)


def test_the_permission_is_the_one_that_aws_names() -> None:
    told = "User: arn:aws:sts::1:assumed-role/a/b is not authorized to perform: kms:GenerateDataKey on resource: x"
    for message, operation, permission in (
        (told, "Decrypt", "kms:GenerateDataKey"),
        ("not authorized to perform: s3:GetObject", "Decrypt", "kms:Decrypt"),
        (None, "Encrypt", "kms:Encrypt"),
        ("", "AssumeRoleWithWebIdentity", "sts:AssumeRoleWithWebIdentity"),
        ("", "Other", None),
    ):
        error = translate(client_error("AccessDeniedException", message, operation=operation)).error
        assert isinstance(error, RootDenied)
        assert error.permission == permission


@pytest.mark.parametrize(
    "response", [{}, {"Error": {}}, {"Error": {"Code": 5, "Message": 5}}, {"Error": {"Code": ["x"]}}]
)
def test_responses_of_another_shape(response: Any) -> None:
    assert type(translate(ClientError(response, "Decrypt")).error) is RootMisconfigured


def test_what_no_sdk_should_raise() -> None:
    for error in (KeyError("hunter2"), TypeError("hunter2"), RecursionError("hunter2")):
        translated = translate(error).error
        assert type(translated) is RootMisconfigured
        assert "hunter2" not in str(translated)


# ---- one attempt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["legacy", "standard", "adaptive"])
def test_one_attempt_whatever_the_environment_says(
    provider: AWSKMS, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("AWS_RETRY_MODE", mode)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "9")
    key = provider.make_key("root")
    root = open_root(key.uri)
    key.fail(503)
    error = refused(lambda: root.wrap(SEALED, CONTEXT), RootUnavailable)
    assert error.retryable  # type: ignore[attr-defined]
    key.fail(500)
    refused(lambda: root.wrap(SEALED, CONTEXT), RootUnavailable)
    key.throttle()
    refused(lambda: root.wrap(SEALED, CONTEXT), RootThrottled)
    assert key.requests == 3


def test_a_black_hole_ends(provider: AWSKMS) -> None:
    key = provider.make_key("root")
    root = open_root(key.uri)
    root.wrap(SEALED, CONTEXT)
    key.black_hole()
    started = time.monotonic()
    assert "127.0.0.1" in str(refused(lambda: root.wrap(SEALED, CONTEXT), RootUnavailable))
    assert time.monotonic() - started < LONGEST_SECONDS
    assert key.requests == 2
    key.heal()
    root.wrap(SEALED, CONTEXT)


# ---- our side --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [3600.0, -3600.0])
@pytest.mark.parametrize("role", [None, "byok"])
def test_a_clock_that_is_off(provider: AWSKMS, ahead: float, role: str | None) -> None:
    root = open_root(provider.make_key("root", role=role).uri)
    provider.clock_offset = ahead
    assert "clock" in str(refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured))
    provider.clock_offset = 0
    root.wrap(SEALED, CONTEXT)


def test_a_wrong_secret(provider: AWSKMS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    message = str(refused(lambda: unwrap(open_root(URI)), RootMisconfigured))
    assert "InvalidSignatureException" in message
    assert "secret access key" in message


def test_no_credentials_and_then_some(provider: AWSKMS, monkeypatch: pytest.MonkeyPatch) -> None:
    root = open_root(provider.make_key("root").uri)
    with monkeypatch.context() as without:
        for name in CREDENTIALS:
            without.delenv(name)
        assert "NoCredentialsError" in str(refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured))
        with_role = open_root(root.uri + f"?role=arn:aws:iam::{ACCOUNT}:role/x")
        assert "NoCredentialsError" in str(
            refused(lambda: with_role.wrap(SEALED, CONTEXT), RootMisconfigured)
        )
    root.wrap(SEALED, CONTEXT)


def test_half_of_the_credentials(provider: AWSKMS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "PartialCredentialsError" in str(refused(lambda: unwrap(open_root(URI)), RootMisconfigured))


LOOP = """
[profile p]
role_arn = arn:aws:iam::1:role/x
source_profile = q
[profile q]
role_arn = arn:aws:iam::1:role/x
source_profile = p
"""
NO_LOGIN = """
[profile p]
sso_start_url = https://sso.openkcm.invalid
sso_region = us-east-1
sso_account_id = 111122223333
sso_role_name = x
"""


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("[profile other]\nregion = us-east-1\n", "ProfileNotFound"),
        ("[profile p]\ncredential_process = false\n", "CredentialRetrievalError"),
        (
            "[profile p]\nrole_arn = arn:aws:iam::1:role/x\nsource_profile = q\n[profile q]\n",
            "InvalidConfigError",
        ),
        (
            LOOP,
            "InfiniteLoopConfigError",
        ),
        (
            NO_LOGIN,
            "",
        ),
        ("[profile p\n", "ConfigParseError"),
    ],
)
def test_a_wrong_configuration(
    provider: AWSKMS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: str, name: str
) -> None:
    for each in CREDENTIALS:
        monkeypatch.delenv(each)
    (tmp_path / "config").write_text(config)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "p")
    assert name in str(refused(lambda: unwrap(open_root(URI)), RootMisconfigured))
