# SPDX-License-Identifier: Apache-2.0
"""Every answer of Cloud KMS over the wire, and what it is called here; test_gcp_login and _network have more."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcp_support import CONTEXT, SEALED
from gcp_support import cloud as cloud
from gcp_support import key as key
from gcp_support import root as root
from gcp_support import wrapped as wrapped
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
from openkcm.roots.gcp import ANSWERS, GCPRoot, open_gcp
from openkcm.roots.gcp import answers as gcp_answers
from openkcm.testing.gcp import GCPKMS, USE_TO_DECRYPT, USE_TO_ENCRYPT, GCPKey
from openkcm.testing.gcp import errors as gcp_errors
from support import refused

LOGIN = {name for name in ANSWERS if name.islower()}
HERE = {name for name in ANSWERS if not name.isupper() and not name.islower()}
SERVICE = ANSWERS.keys() - LOGIN - HERE


def test_the_table_has_the_rows_that_are_tested() -> None:
    assert len(ANSWERS) > 60
    assert {"KEY_DISABLED", "IAM_PERMISSION_DENIED", "TIMEOUT", "UNAVAILABLE"} <= SERVICE
    assert {"invalid_grant", "server_error"} <= LOGIN


# ---- answers of the service ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SERVICE))
def test_each_answer_to_a_decryption(key: GCPKey, root: GCPRoot, wrapped: bytes, name: str) -> None:
    key.answer(name)
    before = key.requests
    error = refused(lambda: root.unwrap(wrapped, CONTEXT), ANSWERS[name])
    login = gcp_errors.REASONS.get(name, name) == "UNAUTHENTICATED"
    assert key.requests - before == (2 if login else 1), (
        "a refused token is renewed once, nothing else is repeated"
    )
    if not isinstance(error, DecryptError):
        assert name in str(error) or f"({gcp_errors.REASONS.get(name)})" in str(error)
        assert "Test error" not in str(error)
    if isinstance(error, RootUnavailable):
        assert error.retryable is (name != "DNS")
    key.heal()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


@pytest.mark.parametrize("name", sorted(SERVICE))
def test_each_answer_to_an_encryption(key: GCPKey, root: GCPRoot, name: str) -> None:
    key.answer(name)
    kind = RootMisconfigured if ANSWERS[name] is DecryptError else ANSWERS[name]
    refused(lambda: root.wrap(SEALED, CONTEXT), kind)


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (GCPKey.disable, RootDisabled),
        (GCPKey.delete, RootDestroyed),
        (GCPKey.destroy, RootDestroyed),
        (GCPKey.deny, RootDenied),
        (GCPKey.throttle, RootThrottled),
        (GCPKey.fail, RootUnavailable),
    ],
)
def test_each_lever(
    key: GCPKey, root: GCPRoot, wrapped: bytes, act: Callable[[GCPKey], None], kind: type[Exception]
) -> None:
    act(key)
    refused(lambda: root.unwrap(wrapped, CONTEXT), kind)
    refused(lambda: root.wrap(SEALED, CONTEXT), kind)
    said_no = kind in (RootDisabled, RootDestroyed, RootDenied)
    assert (key.first_no is not None) is said_no


def test_a_key_comes_back(key: GCPKey, root: GCPRoot, wrapped: bytes) -> None:
    for act, back in ((key.disable, key.enable), (key.delete, key.enable), (key.deny, key.allow)):
        act()
        with pytest.raises(OpenKCMError):
            root.unwrap(wrapped, CONTEXT)
        back()
        assert root.unwrap(wrapped, CONTEXT) == SEALED
    key.destroy()
    key.enable()
    refused(lambda: root.unwrap(wrapped, CONTEXT), RootDestroyed)


def test_each_permission_by_itself(key: GCPKey, root: GCPRoot, wrapped: bytes) -> None:
    key.deny(USE_TO_DECRYPT)
    error = refused(lambda: root.unwrap(wrapped, CONTEXT), RootDenied)
    assert error.permission == USE_TO_DECRYPT  # type: ignore[attr-defined]
    root.wrap(SEALED, CONTEXT)
    key.deny(USE_TO_ENCRYPT)
    error = refused(lambda: root.wrap(SEALED, CONTEXT), RootDenied)
    assert error.permission == USE_TO_ENCRYPT  # type: ignore[attr-defined]
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_a_key_that_never_was_is_denied_like_googles_own(cloud: GCPKMS, key: GCPKey) -> None:
    root = open_gcp(key.uri.replace("cryptoKeys/root", "cryptoKeys/never"))
    with contextlib.closing(root):
        refused(lambda: root.wrap(SEALED, CONTEXT), RootDenied)


def test_a_key_of_another_purpose(key: GCPKey, root: GCPRoot) -> None:
    key.purpose = "ASYMMETRIC_SIGN"
    assert "ENCRYPT_DECRYPT" in str(refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured))


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429, 408, 501])
def test_http_statuses(key: GCPKey, root: GCPRoot, wrapped: bytes, status: int) -> None:
    key.fail(status)
    kind = {429: RootThrottled, 501: RootMisconfigured}.get(status, RootUnavailable)
    refused(lambda: root.unwrap(wrapped, CONTEXT), kind)


# ---- refusals in another form ---------------------------------------------------------------------------------


def error_body(status: object, message: object = "m", details: object = None) -> bytes:
    return json.dumps(
        {"error": {"code": 400, "status": status, "message": message, "details": details}}
    ).encode()


def violations(*kinds: object) -> list[object]:
    return [
        {
            "@type": "type.googleapis.com/google.rpc.PreconditionFailure",
            "violations": [{"type": kind, "subject": "s"} for kind in kinds],
        }
    ]


def info(reason: object, **metadata: object) -> list[object]:
    return [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason, "metadata": metadata}]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        # Where the details are missing, the message's own words for the state; without them, dark.
        (error_body("FAILED_PRECONDITION", "x is not enabled, current state is: DISABLED."), RootDisabled),
        (
            error_body("FAILED_PRECONDITION", "x has value DESTROYED in field crypto_key_version.state."),
            RootDestroyed,
        ),
        (error_body("FAILED_PRECONDITION", "x, current state is: ODD."), RootMisconfigured),
        (error_body("FAILED_PRECONDITION", 5), RootMisconfigured),
        (error_body("FAILED_PRECONDITION", details=violations("KEY_NEW_STATE")), RootMisconfigured),
        # Of several, one that makes the tenant dark.
        (error_body("FAILED_PRECONDITION", details=violations("TIMEOUT", "KEY_DISABLED")), RootDisabled),
        (error_body("FAILED_PRECONDITION", details=violations("KEY_X", "TIMEOUT")), RootUnavailable),
        (
            error_body("FAILED_PRECONDITION", details=violations("TIMEOUT") + info("IAM_PERMISSION_DENIED")),
            RootDenied,
        ),
        (error_body("UNAVAILABLE", details=violations("KEY_DESTROYED")), RootDestroyed),
        # A checksum that did not match on their side is nobody's no.
        (
            error_body(
                "INVALID_ARGUMENT",
                "The checksum in field ciphertext_crc32c did not match the data in field ciphertext.",
            ),
            RootUnavailable,
        ),
        (error_body("INVALID_ARGUMENT", None), DecryptError),
        (error_body("INVALID_ARGUMENT", "m", info("API_KEY_INVALID")), RootMisconfigured),
        (error_body("PERMISSION_DENIED", "m", info("A_NEW_REASON")), RootDenied),
        (error_body("A_NEW_STATUS"), RootMisconfigured),
        (error_body(None), RootMisconfigured),
        (error_body(["UNAVAILABLE"]), RootMisconfigured),
        (error_body({"UNAVAILABLE": 1}), RootMisconfigured),
        (error_body("UNAUTHENTICATED", "m", 5), RootMisconfigured),
        (error_body("NOT_FOUND", "m", [5, None, [], {"@type": 5}, {"violations": []}]), RootDestroyed),
        (error_body("ABORTED", "m", violations(5, None, ["KEY_DISABLED"], {})), RootUnavailable),
        (error_body("ABORTED", "m", info(["IAM_PERMISSION_DENIED"])), RootUnavailable),
        (
            error_body("ABORTED", "m", [{"@type": "type.googleapis.com/google.rpc.PreconditionFailure"}]),
            RootUnavailable,
        ),
        (b"", RootMisconfigured),
        (b"\xff", RootMisconfigured),
        (b"[]", RootMisconfigured),
        (b'"text"', RootMisconfigured),
        (b'{"error": "text"}', RootMisconfigured),
        (b'{"error": []}', RootMisconfigured),
        (b"<html>", RootMisconfigured),
        (b"[" * 100_000, RootMisconfigured),
    ],
)
def test_refusals_in_other_forms(
    key: GCPKey, root: GCPRoot, wrapped: bytes, body: bytes, kind: type[Exception]
) -> None:
    key.reply(body, 400)
    refused(lambda: root.unwrap(wrapped, CONTEXT), kind)


@pytest.mark.parametrize(
    ("details", "message", "permission"),
    [
        (info("IAM_PERMISSION_DENIED", permission="cloudkms.cryptoKeys.get"), "m", "cloudkms.cryptoKeys.get"),
        (None, "Permission 'cloudkms.cryptoKeyVersions.useToDecrypt' denied on x", USE_TO_DECRYPT),
        (None, "no", USE_TO_DECRYPT),
        (info("IAM_PERMISSION_DENIED", permission="ignore previous text"), "no", USE_TO_DECRYPT),
        (info("IAM_PERMISSION_DENIED", permission=["x"]), None, USE_TO_DECRYPT),
        (info("USER_PROJECT_DENIED"), "m", "serviceusage.services.use"),
        (info("SECURITY_POLICY_VIOLATED"), "m", None),
    ],
)
def test_the_permission_that_is_missing(
    key: GCPKey, root: GCPRoot, wrapped: bytes, details: object, message: object, permission: str | None
) -> None:
    key.reply(error_body("PERMISSION_DENIED", message, details), 403)
    error = refused(lambda: root.unwrap(wrapped, CONTEXT), RootDenied)
    assert error.permission == permission  # type: ignore[attr-defined]
    assert "ignore previous" not in str(error)


@pytest.mark.parametrize("status", [300, 304, 400, 401, 403, 404, 407, 409, 426, 451])
def test_a_strangers_refusal_is_neither_the_customers_nor_an_outage(
    key: GCPKey, root: GCPRoot, wrapped: bytes, status: int
) -> None:
    key.reply(b"<html>a proxy's page</html>", status, ("Content-Type", "text/html"))
    error = refused(lambda: root.unwrap(wrapped, CONTEXT), RootMisconfigured)
    assert "proxy's page" not in str(error)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(sorted(SERVICE)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["error", "status", "details", "@type", "violations", "type", "reason", "metadata"]
            )
            | st.text(max_size=4),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(
    st.sampled_from([400, 401, 403, 404, 429, 499, 500, 503]),
    _JSON,
    st.text(max_size=12) | st.none(),
    st.booleans(),
)
def test_any_refusal_is_one_of_ours(status: int, body: object, date: str | None, decrypting: bool) -> None:
    for raw in (json.dumps(body).encode(), json.dumps({"error": body}).encode()):
        found = gcp_answers.refusal(status, date, raw, decrypting=decrypting)
        assert isinstance(found, OpenKCMError)
        login = gcp_answers.login_refusal(status, date, raw)
        assert login is None or isinstance(login, (RootMisconfigured, RootUnavailable))
