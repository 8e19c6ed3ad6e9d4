# SPDX-License-Identifier: Apache-2.0
"""AWS to test against: what boto3 finds there, and that nobody gets in unsigned."""

from __future__ import annotations

import datetime
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import botocore.auth
import botocore.awsrequest
import botocore.credentials
import botocore.session
import pytest
from botocore.exceptions import ClientError

from openkcm.testing import KeyCondition
from openkcm.testing.aws import ACCOUNT, AWSKMS, REGION, AWSKey
from openkcm.testing.aws.key import MAGIC
from openkcm.testing.aws.signature import Principal

CONTEXT = {"a": "1", "b": "2"}


@pytest.fixture
def provider() -> Iterator[AWSKMS]:
    with AWSKMS(tls=False) as provider:
        yield provider


@pytest.fixture
def kms(provider: AWSKMS) -> Iterator[Any]:
    client = botocore.session.Session().create_client("kms")
    yield client
    client.close()


@pytest.fixture
def sts(provider: AWSKMS) -> Iterator[Any]:
    client = botocore.session.Session().create_client("sts")
    yield client
    client.close()


@pytest.fixture
def key(provider: AWSKMS) -> AWSKey:
    return provider.make_key("customer")


def code(call: Callable[[], Any]) -> tuple[str, int]:
    with pytest.raises(ClientError) as caught:
        call()
    response = caught.value.response
    return response["Error"]["Code"], response["ResponseMetadata"]["HTTPStatusCode"]


# ---- uses ----------------------------------------------------------------------------------------------------


def test_encrypt_and_decrypt(kms: Any, key: AWSKey) -> None:
    encrypted = kms.encrypt(KeyId=key.arn, Plaintext=b"x", EncryptionContext=CONTEXT)
    assert encrypted["KeyId"] == key.arn
    assert encrypted["EncryptionAlgorithm"] == "SYMMETRIC_DEFAULT"
    assert encrypted["ResponseMetadata"]["RequestId"]
    blob = encrypted["CiphertextBlob"]
    for named in ({}, {"KeyId": key.arn}, {"KeyId": key.key_id}):
        decrypted = kms.decrypt(
            CiphertextBlob=blob, EncryptionContext=dict(reversed(CONTEXT.items())), **named
        )
        assert decrypted["Plaintext"] == b"x"
        assert decrypted["KeyId"] == key.arn
        assert (
            decrypted.get("KeyMaterialId", key.material_id()) == key.material_id()
        )  # older SDKs leave it out


def test_decrypt_refuses(kms: Any, key: AWSKey, provider: AWSKMS) -> None:
    other = provider.make_key("other")
    blob = kms.encrypt(KeyId=key.arn, Plaintext=b"x", EncryptionContext=CONTEXT)["CiphertextBlob"]

    def decrypt(blob: bytes = blob, **changes: Any) -> Any:
        return kms.decrypt(
            **{"CiphertextBlob": blob, "EncryptionContext": CONTEXT, "KeyId": key.arn, **changes}
        )

    assert decrypt()["Plaintext"] == b"x"
    assert code(lambda: decrypt(KeyId=other.arn)) == ("IncorrectKeyException", 400)
    assert code(lambda: decrypt(EncryptionContext={})) == ("InvalidCiphertextException", 400)
    assert code(lambda: decrypt(EncryptionContext={"a": "1"})) == ("InvalidCiphertextException", 400)
    assert code(lambda: decrypt(blob[:-1] + bytes([blob[-1] ^ 1]))) == ("InvalidCiphertextException", 400)
    assert code(lambda: decrypt(b"x" * 90)) == ("InvalidCiphertextException", 400)
    assert code(lambda: decrypt(blob[:20])) == ("InvalidCiphertextException", 400)
    assert code(lambda: decrypt(MAGIC + bytes(90))) == ("IncorrectKeyException", 400)
    assert code(lambda: kms.decrypt(CiphertextBlob=MAGIC + bytes(90))) == ("AccessDeniedException", 400)


def test_data_keys(kms: Any, key: AWSKey) -> None:
    for asked, size in (
        ({"KeySpec": "AES_256"}, 32),
        ({"KeySpec": "AES_128"}, 16),
        ({"NumberOfBytes": 7}, 7),
    ):
        made = kms.generate_data_key(KeyId=key.arn, EncryptionContext=CONTEXT, **asked)
        assert len(made["Plaintext"]) == size
        opened = kms.decrypt(CiphertextBlob=made["CiphertextBlob"], EncryptionContext=CONTEXT)
        assert opened["Plaintext"] == made["Plaintext"]
    assert code(lambda: kms.generate_data_key(KeyId=key.arn)) == ("ValidationException", 400)


def test_sizes_and_names_are_checked(kms: Any, key: AWSKey) -> None:
    assert code(lambda: kms.encrypt(KeyId=key.arn, Plaintext=bytes(4097))) == ("ValidationException", 400)
    assert code(lambda: kms.decrypt(CiphertextBlob=bytes(6145))) == ("ValidationException", 400)
    aws = {"aws:s3:arn": "x"}
    assert code(lambda: kms.encrypt(KeyId=key.arn, Plaintext=b"x", EncryptionContext=aws)) == (
        "ValidationException",
        400,
    )


def test_keys_that_are_not_there(kms: Any, provider: AWSKMS) -> None:
    def encrypt(name: str) -> tuple[str, int]:
        return code(lambda: kms.encrypt(KeyId=name, Plaintext=b"x"))

    unknown = "00000000-0000-0000-0000-000000000000"
    assert encrypt(unknown) == ("NotFoundException", 400)
    assert encrypt(f"arn:aws:kms:{REGION}:{ACCOUNT}:key/{unknown}") == ("NotFoundException", 400)
    assert encrypt(f"arn:aws:kms:{REGION}:999988887777:key/{unknown}") == ("AccessDeniedException", 400)
    assert encrypt(provider.make_key("there", region="us-east-1").arn) == ("NotFoundException", 400)
    assert encrypt("arn:aws:kms") == ("NotFoundException", 400)


# ---- levers by API -------------------------------------------------------------------------------------------


def test_a_key_is_disabled_and_enabled(kms: Any, key: AWSKey) -> None:
    def state() -> str:
        described = kms.describe_key(KeyId=key.arn)["KeyMetadata"]
        assert described["Enabled"] is (described["KeyState"] == "Enabled")
        return str(described["KeyState"])

    assert state() == "Enabled"
    blob = kms.encrypt(KeyId=key.arn, Plaintext=b"x")["CiphertextBlob"]
    kms.disable_key(KeyId=key.arn)
    assert state() == "Disabled"
    assert key.condition is KeyCondition.DISABLED
    assert code(lambda: kms.decrypt(CiphertextBlob=blob)) == ("DisabledException", 400)
    kms.enable_key(KeyId=key.arn)
    assert kms.decrypt(CiphertextBlob=blob)["Plaintext"] == b"x"


def test_a_deletion_is_scheduled_and_cancelled(kms: Any, key: AWSKey) -> None:
    assert code(lambda: kms.cancel_key_deletion(KeyId=key.arn)) == ("KMSInvalidStateException", 400)
    assert code(lambda: kms.schedule_key_deletion(KeyId=key.arn, PendingWindowInDays=6)) == (
        "ValidationException",
        400,
    )
    scheduled = kms.schedule_key_deletion(KeyId=key.arn, PendingWindowInDays=7)
    assert scheduled["KeyState"] == "PendingDeletion"
    assert scheduled["PendingWindowInDays"] == 7
    assert 6 < (scheduled["DeletionDate"].timestamp() - time.time()) / 86400 < 8
    assert "DeletionDate" in kms.describe_key(KeyId=key.arn)["KeyMetadata"]
    for refused in (
        lambda: kms.encrypt(KeyId=key.arn, Plaintext=b"x"),
        lambda: kms.enable_key(KeyId=key.arn),
        lambda: kms.disable_key(KeyId=key.arn),
        lambda: kms.schedule_key_deletion(KeyId=key.arn),
    ):
        assert code(refused) == ("KMSInvalidStateException", 400)
    assert kms.cancel_key_deletion(KeyId=key.arn)["KeyId"] == key.arn
    assert key.condition is KeyCondition.DISABLED


def test_permissions_and_first_no(kms: Any, key: AWSKey) -> None:
    key.deny("kms:Encrypt", "kms:DescribeKey")
    before = time.monotonic()
    assert code(lambda: kms.encrypt(KeyId=key.arn, Plaintext=b"x")) == ("AccessDeniedException", 400)
    assert key.first_no is not None
    assert before <= key.first_no <= time.monotonic()
    assert code(lambda: kms.describe_key(KeyId=key.arn)) == ("AccessDeniedException", 400)
    kms.generate_data_key(KeyId=key.arn, KeySpec="AES_256")
    key.allow()
    assert key.first_no is None


def test_a_destroyed_key(kms: Any, key: AWSKey) -> None:
    key.destroy()
    assert code(lambda: kms.encrypt(KeyId=key.arn, Plaintext=b"x")) == ("NotFoundException", 400)
    assert code(lambda: kms.describe_key(KeyId=key.arn)) == ("NotFoundException", 400)


def test_an_error_that_aws_does_not_have(key: AWSKey) -> None:
    with pytest.raises(ValueError, match="DisabledException"):
        key.answer("Nonsense")


def test_multi_region_keys(kms: Any, provider: AWSKMS) -> None:
    described = kms.describe_key(KeyId=provider.make_key("both", multi_region=True).arn)["KeyMetadata"]
    assert described["MultiRegionConfiguration"]["MultiRegionKeyType"] == "PRIMARY"


# ---- roles ---------------------------------------------------------------------------------------------------


def test_who_we_are(sts: Any, provider: AWSKMS) -> None:
    answer = sts.get_caller_identity()
    assert answer["Account"] == ACCOUNT
    assert answer["Arn"] == f"arn:aws:sts::{ACCOUNT}:assumed-role/openkcm-core/core"


def test_a_session_of_a_role_may_use_its_key_alone(sts: Any, kms: Any, provider: AWSKMS) -> None:
    key = provider.make_key("root", account="999988887777", role="byok", external_id="id-7")
    assert key.role is not None

    def assume(**more: str) -> Any:
        return sts.assume_role(RoleArn=key.role, RoleSessionName="tests", **more)

    assert code(assume) == ("AccessDenied", 403)
    assert code(lambda: assume(ExternalId="id-8")) == ("AccessDenied", 403)
    made = assume(ExternalId="id-7")
    assert made["AssumedRoleUser"]["Arn"] == "arn:aws:sts::999988887777:assumed-role/byok/tests"
    given = made["Credentials"]
    assert 3500 < (given["Expiration"] - datetime.datetime.now(datetime.UTC)).total_seconds() <= 3600
    client = botocore.session.Session().create_client(
        "kms",
        aws_access_key_id=given["AccessKeyId"],
        aws_secret_access_key=given["SecretAccessKey"],
        aws_session_token=given["SessionToken"],
    )
    client.encrypt(KeyId=key.arn, Plaintext=b"x")
    assert code(lambda: kms.encrypt(KeyId=key.arn, Plaintext=b"x")) == ("AccessDeniedException", 400)
    provider.expire()
    assert code(lambda: client.encrypt(KeyId=key.arn, Plaintext=b"x")) == ("ExpiredTokenException", 400)
    client.close()


def test_a_session_needs_a_name(sts: Any, provider: AWSKMS) -> None:
    role = provider.make_key("root", role="byok").role
    assert code(lambda: sts.assume_role(RoleArn=role, RoleSessionName="a b")) == ("ValidationError", 400)


# ---- signatures ----------------------------------------------------------------------------------------------


def send(
    provider: AWSKMS, change: Callable[[dict[str, str]], None], *, us: Principal | None = None, **scope: str
) -> str:
    """Sign DescribeKey as botocore does, change its headers, send it, and return the error's code."""
    us = us or provider.us
    request = botocore.awsrequest.AWSRequest(
        "POST",
        provider.url + "/",
        data=json.dumps({"KeyId": next(iter(provider.keys))}).encode(),
        headers={"X-Amz-Target": "TrentService.DescribeKey", "Content-Type": "application/x-amz-json-1.1"},
    )
    credentials = botocore.credentials.Credentials(us.access_key, us.secret, us.token)
    service, region = scope.get("service", "kms"), scope.get("region", REGION)
    botocore.auth.SigV4Auth(credentials, service, region).add_auth(request)
    headers = dict(request.headers.items())
    change(headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(provider.url + "/", request.data, headers)) as answer:
            assert answer.status == 200
            return ""
    except urllib.error.HTTPError as error:
        with error:
            return str(json.loads(error.read())["__type"])


def edit(name: str, change: Callable[[str], str]) -> Callable[[dict[str, str]], None]:
    def apply(headers: dict[str, str]) -> None:
        headers[name] = change(headers[name])

    return apply


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (lambda headers: None, ""),
        (lambda headers: headers.pop("Authorization"), "MissingAuthenticationTokenException"),
        (edit("Authorization", lambda value: "Bearer x"), "IncompleteSignatureException"),
        (edit("Authorization", lambda value: value[:-1]), "IncompleteSignatureException"),
        (edit("Authorization", lambda value: value[:-4] + "0000"), "InvalidSignatureException"),
        (edit("Authorization", lambda value: value.replace("host;", "")), "InvalidSignatureException"),
        (edit("X-Amz-Date", lambda value: value[:-3] + "00Z"), "InvalidSignatureException"),
        (edit("X-Amz-Date", lambda value: "19990101T000000Z"), "InvalidSignatureException"),
        (lambda headers: headers.pop("X-Amz-Date"), "IncompleteSignatureException"),
        (lambda headers: headers.pop("X-Amz-Security-Token"), "UnrecognizedClientException"),
        (edit("X-Amz-Security-Token", lambda value: "x"), "UnrecognizedClientException"),
        (edit("X-Amz-Target", lambda value: "TrentService.DisableKey"), "InvalidSignatureException"),
    ],
)
def test_signatures_are_verified(
    provider: AWSKMS, key: AWSKey, change: Callable[[dict[str, str]], None], answer: str
) -> None:
    assert send(provider, change) == answer
    assert key.condition is KeyCondition.ENABLED


def test_keys_and_scopes_are_verified(provider: AWSKMS, key: AWSKey) -> None:
    stranger = Principal.session_of(provider.us.role, "core")
    assert send(provider, lambda headers: None, us=stranger) == "UnrecognizedClientException"
    assert send(provider, lambda headers: None, service="sts") == "InvalidSignatureException"
    assert send(provider, lambda headers: None, region="us-east-1") == "NotFoundException"


def test_the_clock_is_the_services(provider: AWSKMS, kms: Any, key: AWSKey) -> None:
    for ahead in (299, -299):
        provider.clock_offset = ahead
        kms.describe_key(KeyId=key.arn)
    for ahead, word in ((320, "expired"), (-320, "not yet current")):
        provider.clock_offset = ahead
        with pytest.raises(ClientError, match=f"InvalidSignatureException.*{word}"):
            kms.describe_key(KeyId=key.arn)


# ---- as a provider -------------------------------------------------------------------------------------------


def test_the_environment_is_put_back() -> None:
    before = dict(os.environ)
    provider = AWSKMS()
    with pytest.raises(RuntimeError, match="with block"):
        provider.settings()
    with provider:
        assert os.environ["AWS_ENDPOINT_URL_KMS"].startswith("https://127.0.0.1:")
        assert os.environ["NO_PROXY"].endswith("127.0.0.1")
    assert dict(os.environ) == before
    provider.stop()
