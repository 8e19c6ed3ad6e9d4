# SPDX-License-Identifier: Apache-2.0
"""``aws-kms:`` roots: URIs, what is asked of AWS, what is bound, and the customer's levers."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openkcm.errors import (
    DecryptError,
    InvalidInput,
    RootDenied,
    RootDestroyed,
    RootDisabled,
    RootMisconfigured,
)
from openkcm.roots import Grantable, Root, open_root
from openkcm.roots.aws.uri import AWSURI, parse_aws_uri
from openkcm.testing.aws import ACCOUNT, AWSKMS
from support import refused

CONTEXT = {"layer": "L2", "tenant": "acme", "region": "local", "version": "1"}
SEALED = bytes(range(72))
OTHER_ACCOUNT = "999988887777"

KEY_ID = "1234abcd-12ab-34cd-56ef-1234567890ab"
ARN = f"arn:aws:kms:eu-central-1:{ACCOUNT}:key/{KEY_ID}"
URI = f"aws-kms://{ARN}"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/openkcm"


@pytest.fixture
def provider() -> Iterator[AWSKMS]:
    with AWSKMS() as provider:
        yield provider


def use(root: Root) -> None:
    assert root.unwrap(root.wrap(SEALED, CONTEXT), CONTEXT) == SEALED


# ---- URIs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        URI,
        f"aws-kms://arn:aws:kms:us-east-1:{ACCOUNT}:key/mrk-{'0f' * 16}",
        f"aws-kms://arn:aws-cn:kms:cn-north-1:{ACCOUNT}:key/{KEY_ID}",
        f"aws-kms://arn:aws-us-gov:kms:us-gov-west-1:{ACCOUNT}:key/{KEY_ID}",
        f"aws-kms://arn:aws-eusc:kms:eusc-de-east-1:{ACCOUNT}:key/{KEY_ID}",
        f"{URI}?role={ROLE}",
        f"{URI}?role=arn:aws:iam::{OTHER_ACCOUNT}:role/a/path/with%21/name+=,.@-_",
        f"{URI}?role={ROLE}&external-id=Tenant:acme/7+=,.@-_",
        f"aws-kms://arn:aws-cn:kms:cn-north-1:{ACCOUNT}:key/{KEY_ID}?role=arn:aws-cn:iam::{ACCOUNT}:role/x",
    ],
)
def test_uris(uri: str) -> None:
    root = open_root(uri)
    assert root.uri == uri
    assert isinstance(root, Grantable)
    assert not root.development
    assert str(parse_aws_uri(uri)) == uri


@pytest.mark.parametrize(
    "uri",
    [
        "aws-kms:",
        "aws-kms://",
        "aws-kms:" + ARN,
        "aws-kms:/" + ARN,
        "aws-kms:///" + ARN,
        f"aws-kms://{KEY_ID}",
        f"aws-kms://key/{KEY_ID}",
        URI + "\n",
        URI + "/",
        URI + "#x",
        URI + "?",
        URI + "?role=",
        URI + "?role",
        f"{URI}?role={ROLE}&",
        f"{URI}?role={ROLE}&role={ROLE}",
        f"{URI}?role={ROLE}&external-id=",
        f"{URI}?role={ROLE}&external-id=x",
        f"{URI}?role={ROLE}&external-id=a%20b",
        f"{URI}?role={ROLE}&external-id=%ff%ff",
        f"{URI}?external-id=id-7",
        f"{URI}?profile=prod",
        f"{URI}?secret=hunter2",
        f"{URI}?role=arn:aws:iam::{ACCOUNT}:user/openkcm",
        f"{URI}?role=arn:aws:iam::{ACCOUNT}:role/",
        f"{URI}?role=arn:aws:iam::1:role/x",
        f"{URI}?role=arn:aws-cn:iam::{ACCOUNT}:role/x",
        f"{URI}?role={ROLE} ",
        URI.upper(),
        URI.replace("abcd", "ABCD"),
        URI.replace(KEY_ID, KEY_ID[:-1]),
        URI.replace(KEY_ID, "mrk-" + KEY_ID),
        URI.replace("key/", "Key/"),
        URI.replace(ACCOUNT, "11112222333"),
        URI.replace("eu-central-1", ""),
        URI.replace("eu-central-1", "eu-central"),
        URI.replace("eu-central-1", "cn-north-1"),
        URI.replace("arn:aws:", "arn:aws-cn:"),
        URI.replace("arn:aws:", "arn:aws-xx:"),
        URI.replace(":kms:", ":s3:"),
        URI.replace("1234abcd", "１２３４abcd"),
    ],
)
def test_malformed_uris(uri: str) -> None:
    error = refused(lambda: open_root(uri), RootMisconfigured)
    assert "hunter2" not in str(error)


@pytest.mark.parametrize(
    "name", ["alias/ours", f"arn:aws:kms:eu-central-1:{ACCOUNT}:alias/ours", "alias/aws/ebs"]
)
def test_an_alias_is_refused_with_the_reason(name: str) -> None:
    message = str(refused(lambda: open_root(f"aws-kms://{name}"), RootMisconfigured))
    assert "another key" in message
    assert "describe-key" in message


@given(
    st.uuids(),
    st.booleans(),
    st.sampled_from(["eu-central-1", "us-east-1", "ap-southeast-4", "mx-central-1"]),
    st.from_regex(r"[0-9]{12}", fullmatch=True),
    st.none() | st.from_regex(r"([!-~]{1,9}/)?[A-Za-z0-9_+=,.@-]{1,64}", fullmatch=True),
    st.none() | st.from_regex(r"[A-Za-z0-9_+=,.@:/-]{2,40}", fullmatch=True),
)
def test_serialising_and_parsing_is_the_identity(
    key: Any, multi: bool, region: str, account: str, role: str | None, external_id: str | None
) -> None:
    uri = AWSURI(
        "aws",
        region,
        account,
        f"mrk-{key.hex}" if multi else str(key),
        None if role is None else f"arn:aws:iam::{account}:role/{role}",
        None if role is None else external_id,
    )
    assert parse_aws_uri(str(uri)) == uri
    assert str(parse_aws_uri(str(uri))) == str(uri)


# ---- wrapping ------------------------------------------------------------------------------------------------


def test_what_is_asked_of_aws(provider: AWSKMS, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two operations on the key by its ARN, with the context under our prefix, and nothing else."""
    key = provider.make_key("root")
    asked: list[tuple[str | None, Any]] = []
    handle = provider._handle

    def record(request: Any) -> Any:
        asked.append((request.headers.get("x-amz-target"), request.json()))
        return handle(request)

    monkeypatch.setattr(provider._server, "_handle", record)
    # The handler's class holds the function that it was made with.
    monkeypatch.setattr(provider._server._server, "RequestHandlerClass", provider._server._handler())  # type: ignore[union-attr]
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    root.unwrap(wrapped, CONTEXT)
    assert root.warnings() == []
    bound = {f"openkcm:{name}": value for name, value in CONTEXT.items()}
    assert asked == [
        (
            "TrentService.Encrypt",
            {
                "KeyId": key.arn,
                "Plaintext": base64.b64encode(SEALED).decode(),
                "EncryptionContext": bound,
            },
        ),
        (
            "TrentService.Decrypt",
            {
                "KeyId": key.arn,
                "CiphertextBlob": base64.b64encode(wrapped[1:]).decode(),
                "EncryptionContext": bound,
            },
        ),
    ]
    assert key.requests == 2


def test_the_context_is_bound(provider: AWSKMS) -> None:
    root = open_root(provider.make_key("root").uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    for change in ({"tenant": "globex"}, {"region": "us"}, {"version": "2"}, {"layer": "L3"}, {"x": "y"}):
        refused(lambda change=change: root.unwrap(wrapped, CONTEXT | change), DecryptError)
    refused(lambda: root.unwrap(wrapped, {}), DecryptError)
    assert root.unwrap(root.wrap(SEALED, {}), {}) == SEALED
    refused(lambda: root.wrap(SEALED, {"tenant": 7}), InvalidInput)  # type: ignore[dict-item]
    refused(lambda: root.unwrap(wrapped, {"tenant": "\ud800"}), InvalidInput)


def test_every_byte_counts(provider: AWSKMS) -> None:
    root = open_root(provider.make_key("root").uri)
    wrapped = root.wrap(b"short", CONTEXT)
    for at in range(len(wrapped)):
        altered = wrapped[:at] + bytes([wrapped[at] ^ 0x40]) + wrapped[at + 1 :]
        refused(lambda altered=altered: root.unwrap(altered, CONTEXT), DecryptError)
    for wrong in (wrapped[:-1], wrapped[:5], wrapped + b"x", b"\x01" + os.urandom(90)):
        refused(lambda wrong=wrong: root.unwrap(wrong, CONTEXT), DecryptError)
    assert root.unwrap(wrapped, CONTEXT) == b"short"


def test_malformed_blobs_are_not_sent(provider: AWSKMS) -> None:
    key = provider.make_key("root")
    root = open_root(key.uri)
    for wrong in (b"", b"\x01", b"\x02" + bytes(90), b"\x00" + bytes(90), b"\x01" + bytes(6145)):
        refused(lambda wrong=wrong: root.unwrap(wrong, CONTEXT), DecryptError)
    for size in (0, 4097):
        refused(lambda size=size: root.wrap(bytes(size), CONTEXT), InvalidInput)
    assert key.requests == 0
    assert root.unwrap(root.wrap(bytes(4096), CONTEXT), CONTEXT) == bytes(4096)


def test_another_key_does_not_open_it(provider: AWSKMS) -> None:
    one, two = (open_root(provider.make_key(name).uri) for name in ("one", "two"))
    refused(lambda: two.unwrap(one.wrap(SEALED, CONTEXT), CONTEXT), DecryptError)


def test_rotated_material_still_opens(provider: AWSKMS) -> None:
    key = provider.make_key("root")
    root = open_root(key.uri)
    before = root.wrap(SEALED, CONTEXT)
    key.rotate()
    assert root.unwrap(before, CONTEXT) == SEALED
    use(root)


def test_keys_of_several_regions_behind_one_endpoint(provider: AWSKMS) -> None:
    use(open_root(provider.make_key("here").uri))
    use(open_root(provider.make_key("there", region="us-west-2").uri))
    root = open_root(provider.make_key("both", multi_region=True).uri)
    use(root)
    assert ["multi-region" in warning for warning in root.warnings()] == [True]


def test_a_lie_comes_through_and_is_not_ours_to_see(provider: AWSKMS) -> None:
    """What was unwrapped is checked by its user, who knows what it should be."""
    key = provider.make_key("root")
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    key.lie()
    assert root.unwrap(wrapped, CONTEXT) != SEALED
    key.heal()
    assert root.unwrap(wrapped, CONTEXT) == SEALED


# ---- the customer's levers -----------------------------------------------------------------------------------


def test_levers(provider: AWSKMS) -> None:
    key = provider.make_key("root")
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    for lever, answer in (
        (key.disable, RootDisabled),
        (key.delete, RootDestroyed),
        (key.deny, RootDenied),
        (key.destroy, RootDestroyed),
    ):
        lever()
        assert key.first_no is None
        refused(lambda: root.unwrap(wrapped, CONTEXT), answer)
        refused(lambda: root.wrap(SEALED, CONTEXT), answer)
        assert key.first_no is not None
        key.enable()
        key.allow()
        assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_permissions_are_missed_one_by_one(provider: AWSKMS) -> None:
    key = provider.make_key("root")
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    key.deny("kms:Encrypt")
    error = refused(lambda: root.wrap(SEALED, CONTEXT), RootDenied)
    assert isinstance(error, RootDenied)
    assert error.permission == "kms:Encrypt"
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    key.deny("kms:Decrypt")
    error = refused(lambda: root.unwrap(wrapped, CONTEXT), RootDenied)
    assert isinstance(error, RootDenied)
    assert error.permission == "kms:Decrypt"
    root.wrap(SEALED, CONTEXT)


def test_a_key_of_another_account_that_is_not_there_is_denied(provider: AWSKMS) -> None:
    """AWS does not tell strangers whether there is such a key."""
    key = provider.make_key("root", account=OTHER_ACCOUNT)
    use(open_root(key.uri))
    key.destroy()
    refused(lambda: use(open_root(key.uri)), RootDenied)
    nowhere = URI.replace(ACCOUNT, OTHER_ACCOUNT)
    assert "none in that account" in str(refused(lambda: use(open_root(nowhere)), RootDenied))
    refused(lambda: use(open_root(URI)), RootDestroyed)
