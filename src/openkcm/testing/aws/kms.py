# SPDX-License-Identifier: Apache-2.0
"""AWS KMS and AWS STS to test against: boto3 speaks to them as to the real ones.

Written from the service models kms-2014-11-01 (JSON 1.1) and sts-2011-06-15 (Query), the AWS KMS Developer Guide and
the API References. Signatures are verified, keys really encrypt, and a key's state and permissions bind.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import secrets
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, NoReturn

from ..base import FakeProvider, KeyCondition
from ..https import Request, Response, Server
from .errors import FAILURES, KMS_FAILURES, STS_CODES, STS_FAILURES, Failure, is_refusal
from .key import AWSKey
from .signature import Principal, Unauthenticated, authenticate
from .wire import (
    MAX_CIPHERTEXT_BYTES,
    MAX_PLAINTEXT_BYTES,
    Refused,
    answer,
    answer_failure,
    answer_xml,
    answer_xml_failure,
    invalid,
    read_blob,
    read_context,
    read_form,
    read_parameters,
    show_blob,
    xml,
)

__all__ = ["AWSKMS", "AWSKey"]

ACCOUNT: Final = "111122223333"
REGION: Final = "eu-central-1"
OUR_ROLE: Final = "openkcm-core"
SESSION_SECONDS: Final = 3600

_CREDENTIALS: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_USES: Final = frozenset({"Encrypt", "Decrypt", "GenerateDataKey"})
_DATA_KEYS: Final = {"AES_256": 32, "AES_128": 16}
_SESSION_NAME: Final = re.compile(r"[\w+=,.@-]{2,64}", re.ASCII)
_NO_SUCH: Final = (
    "User: {user} is not authorized to perform: {action} on this resource because the resource does not exist in this "
    "Region, no resource-based policies allow access, or a resource-based policy explicitly denies access"
)


class _Call(NamedTuple):
    """One request, authenticated."""

    operation: str
    parameters: Mapping[str, Any]
    principal: Principal
    region: str

    def refused(self, failure: Failure, *, key: AWSKey | None = None, role: str | None = None) -> Refused:
        """The refusal, with the names filled in."""
        message = failure.message.format(
            arn=key.arn if key is not None else "",
            user=self.principal.arn,
            action=f"kms:{self.operation}",
            role=role or (key.role if key is not None else None) or "",
        )
        return Refused(failure._replace(message=message))


class AWSKMS(FakeProvider):
    """AWS KMS and AWS STS on one port.

    We are a session of the role ``openkcm-core`` in ``account``, and a key is in that account unless another is named.
    ``clock_offset`` is how many seconds the service's clock is ahead of this machine's, ``assumed`` how often a role
    was assumed, and ``session_seconds`` for how long.
    """

    permissions = ("kms:Encrypt", "kms:Decrypt")

    def __init__(self, *, tls: bool = True, account: str = ACCOUNT, region: str = REGION) -> None:
        super().__init__()
        self.tls = tls
        self.account = account
        self.region = region
        self.clock_offset = 0.0
        self.session_seconds = SESSION_SECONDS
        self.assumed = 0
        self.keys: dict[str, AWSKey] = {}
        self.us = self._ourselves()
        self._principals = {self.us.access_key: self.us}
        self._server: Server | None = None

    # ---- a provider --------------------------------------------------------------------------------------

    def start(self) -> None:
        self._server = Server(self._handle, tls=self.tls)

    def stop(self) -> None:
        server, self._server = self._server, None
        for key in self.keys.values():
            key.heal()
        if server is not None:
            server.close()

    @property
    def url(self) -> str:
        """Where the service listens."""
        if self._server is None:
            raise RuntimeError("the provider is not started; use it in a with block")
        return self._server.url

    def settings(self) -> Mapping[str, str]:
        outside = os.environ.get("NO_PROXY") or os.environ.get("no_proxy")
        settings = {
            "AWS_ENDPOINT_URL_KMS": self.url,
            "AWS_ENDPOINT_URL_STS": self.url,
            "AWS_ACCESS_KEY_ID": self.us.access_key,
            "AWS_SECRET_ACCESS_KEY": self.us.secret,
            "AWS_SESSION_TOKEN": self.us.token,
            "AWS_DEFAULT_REGION": self.region,
            # Nothing of the machine's own configuration.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": f"{outside},127.0.0.1" if outside else "127.0.0.1",
        }
        if self._server is not None and self._server.authority is not None:
            settings["AWS_CA_BUNDLE"] = str(self._server.authority)
        return settings

    def make_key(
        self,
        name: str,
        *,
        account: str | None = None,
        region: str | None = None,
        multi_region: bool = False,
        role: str | None = None,
        external_id: str | None = None,
    ) -> AWSKey:
        """Make a customer's key.

        Args:
            name: a description.
            account, region: where, else in ours.
            multi_region: whether it is a multi-region key.
            role: the name of a role in the key's account that alone may use the key, and that we may assume.
            external_id: what the role's trust policy asks for.
        """
        account, region = account or self.account, region or self.region
        key_id = f"mrk-{uuid.uuid4().hex}" if multi_region else str(uuid.uuid4())
        arn = f"arn:aws:kms:{region}:{account}:key/{key_id}"
        uri, role_arn = f"aws-kms://{arn}", None
        if role is not None:
            role_arn = f"arn:aws:iam::{account}:role/{role}"
            uri += f"?role={role_arn}" + (f"&external-id={external_id}" if external_id else "")
        key = AWSKey(
            name, uri, arn=arn, account=account, region=region, role=role_arn, external_id=external_id
        )
        self.keys[arn] = key
        return key

    def expire(self) -> None:
        """Let every credential that was given out expire."""
        past = self._now() - datetime.timedelta(seconds=1)
        self._principals = {
            name: dataclasses.replace(each, expires=past) for name, each in self._principals.items()
        }

    def renew(self) -> Mapping[str, str]:
        """Give us new credentials; those that there were are unknown from now.

        Returns:
            The environment variables that hold the new ones.
        """
        self.us = self._ourselves()
        self._principals = {self.us.access_key: self.us}
        return {name: value for name, value in self.settings().items() if name in _CREDENTIALS}

    def _ourselves(self) -> Principal:
        return Principal.session_of(f"arn:aws:iam::{self.account}:role/{OUR_ROLE}", "core")

    # ---- requests ----------------------------------------------------------------------------------------

    def _now(self) -> datetime.datetime:
        return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=self.clock_offset)

    def _handle(self, request: Request) -> Response:
        self._check_running()
        target = request.headers.get("x-amz-target")
        if request.method != "POST" or request.path != "/" or request.query:
            return answer_failure(Failure(404, "UnknownOperationException", ""))
        if target is None:
            return self._handle_sts(request)
        try:
            principal, region = authenticate(request, "kms", self._principals, self._now())
            service, _, operation = target.partition(".")
            serve = self._operations().get(operation) if service == "TrentService" else None
            if serve is None:
                raise Refused(KMS_FAILURES["UnknownOperationException"])
            return answer(serve(_Call(operation, read_parameters(request), principal, region)))
        except Unauthenticated as error:
            return answer_failure(Failure(400, error.code, error.message))
        except Refused as error:
            return answer_failure(error.failure)

    def _check_running(self) -> None:
        if self._server is None:
            raise ConnectionAbortedError("stopped, and with it the connections that were open")

    def _operations(self) -> Mapping[str, Callable[[_Call], dict[str, Any] | None]]:
        return {
            "Encrypt": self._encrypt,
            "Decrypt": self._decrypt,
            "GenerateDataKey": self._generate_data_key,
            "DescribeKey": self._describe_key,
            "EnableKey": self._enable_key,
            "DisableKey": self._disable_key,
            "ScheduleKeyDeletion": self._schedule_key_deletion,
            "CancelKeyDeletion": self._cancel_key_deletion,
        }

    # ---- uses of a key -----------------------------------------------------------------------------------

    def _encrypt(self, call: _Call) -> dict[str, Any]:
        plaintext = read_blob(call.parameters, "Plaintext", MAX_PLAINTEXT_BYTES)
        context = read_context(call.parameters)
        key = self._use(call, self._find(call))
        return {
            "CiphertextBlob": show_blob(key.encrypt(plaintext, context)),
            "KeyId": key.arn,
            "EncryptionAlgorithm": "SYMMETRIC_DEFAULT",
        }

    def _decrypt(self, call: _Call) -> dict[str, Any]:
        blob = read_blob(call.parameters, "CiphertextBlob", MAX_CIPHERTEXT_BYTES)
        context = read_context(call.parameters)
        if "KeyId" in call.parameters:
            found = self._find(call)
        else:
            found = next((key for key in list(self.keys.values()) if key.wrapped(blob)), None) or _unknown(
                call
            )
        key = self._use(call, found)
        plaintext, version = key.decrypt(blob, context)
        return {
            "KeyId": key.arn,
            "Plaintext": show_blob(plaintext),
            "EncryptionAlgorithm": "SYMMETRIC_DEFAULT",
            "KeyMaterialId": key.material_id(version),
        }

    def _generate_data_key(self, call: _Call) -> dict[str, Any]:
        spec, count = call.parameters.get("KeySpec"), call.parameters.get("NumberOfBytes")
        size = _DATA_KEYS.get(spec) if isinstance(spec, str) else count
        if (spec is None) == (count is None) or not isinstance(size, int) or not 1 <= size <= 1024:
            raise Refused(
                Failure(400, "ValidationException", "Please specify either number of bytes or key spec.")
            )
        context = read_context(call.parameters)
        key = self._use(call, self._find(call))
        plaintext = secrets.token_bytes(size)
        return {
            "CiphertextBlob": show_blob(key.encrypt(plaintext, context)),
            "Plaintext": show_blob(plaintext),
            "KeyId": key.arn,
            "KeyMaterialId": key.material_id(),
        }

    def _use(self, call: _Call, key: AWSKey) -> AWSKey:
        """Let a request use a key, or answer with the key's fault or state."""
        status = key.meet()
        self._check_running()
        if status is not None:
            raise call.refused(_outage(status), key=key)
        name = key.answering
        if name is not None and not (key.role is not None and name in STS_FAILURES):
            if is_refusal(name):
                key.say_no()
            raise call.refused(FAILURES[name], key=key)
        self._authorize(call, key)
        if key.condition is KeyCondition.DISABLED:
            key.say_no()
            raise call.refused(KMS_FAILURES["DisabledException"], key=key)
        if key.condition is KeyCondition.PENDING_DELETION:
            key.say_no()
            raise call.refused(KMS_FAILURES["KMSInvalidStateException (pending deletion)"], key=key)
        return key

    def _authorize(self, call: _Call, key: AWSKey) -> None:
        allowed = key.may(f"kms:{call.operation}")
        if call.operation in _USES:
            allowed = allowed and call.principal.role == (key.role or self.us.role)
        if allowed and key.condition is not KeyCondition.DESTROYED:
            return
        key.say_no()
        if not allowed:
            raise call.refused(KMS_FAILURES["AccessDeniedException"], key=key)
        if call.principal.account == key.account:
            raise call.refused(KMS_FAILURES["NotFoundException"], key=key)
        _unknown(call)

    def _find(self, call: _Call) -> AWSKey:
        named = call.parameters.get("KeyId")
        if not isinstance(named, str) or not 1 <= len(named) <= 2048:
            raise invalid("Value at 'keyId' failed to satisfy constraint: Member must not be null")
        arn = named
        if not named.startswith("arn:"):
            arn = f"arn:aws:kms:{call.region}:{call.principal.account}:key/{named}"
        parts = arn.split(":")
        if len(parts) != 6 or parts[3] != call.region:
            raise Refused(
                Failure(400, "NotFoundException", f"Invalid arn {parts[3] if len(parts) > 3 else ''}")
            )
        key = self.keys.get(arn)
        if key is None and parts[4] == call.principal.account:
            raise Refused(Failure(400, "NotFoundException", f"Key '{arn}' does not exist"))
        return key or _unknown(call)

    # ---- the customer's levers, by API -------------------------------------------------------------------

    def _manage(self, call: _Call, *, pending: bool | None = None) -> AWSKey:
        """Find a key for its customer; ``pending`` says whether it must wait for its deletion, or must not."""
        key = self._find(call)
        self._authorize(call, key)
        if pending is not None and pending != (key.condition is KeyCondition.PENDING_DELETION):
            word = "is not pending deletion." if pending else "is pending deletion."
            raise Refused(Failure(400, "KMSInvalidStateException", f"{key.arn} {word}"))
        return key

    def _describe_key(self, call: _Call) -> dict[str, Any]:
        return {"KeyMetadata": self._manage(call).metadata()}

    def _enable_key(self, call: _Call) -> None:
        self._manage(call, pending=False).enable()

    def _disable_key(self, call: _Call) -> None:
        self._manage(call, pending=False).disable()

    def _schedule_key_deletion(self, call: _Call) -> dict[str, Any]:
        window = call.parameters.get("PendingWindowInDays", 30)
        if not isinstance(window, int) or not 7 <= window <= 30:
            raise invalid("Value at 'pendingWindowInDays' failed to satisfy constraint: 7 to 30")
        key = self._manage(call, pending=False)
        key.window = window
        key.delete()
        return {
            "KeyId": key.arn,
            "DeletionDate": key.deletion_date(),
            "KeyState": "PendingDeletion",
            "PendingWindowInDays": window,
        }

    def _cancel_key_deletion(self, call: _Call) -> dict[str, Any]:
        key = self._manage(call, pending=True)
        key.disable()  # as with AWS, its owner enables it in a second step
        return {"KeyId": key.arn}

    # ---- AWS STS -----------------------------------------------------------------------------------------

    def _handle_sts(self, request: Request) -> Response:
        form = read_form(request)
        action = form.get("Action", "")
        try:
            principal, region = authenticate(request, "sts", self._principals, self._now())
            if action == "GetCallerIdentity":
                return answer_xml(
                    action, xml(Arn=principal.arn, UserId=principal.user_id, Account=principal.account)
                )
            if action == "AssumeRole":
                return answer_xml(action, self._assume_role(_Call(action, form, principal, region)))
            raise Refused(STS_FAILURES["InvalidAction"])
        except Unauthenticated as error:
            return answer_xml_failure(Failure(403, STS_CODES[error.code], error.message))
        except Refused as error:
            return answer_xml_failure(error.failure)

    def _assume_role(self, call: _Call) -> str:
        role, session = str(call.parameters.get("RoleArn")), str(call.parameters.get("RoleSessionName"))
        if not _SESSION_NAME.fullmatch(session):
            raise Refused(STS_FAILURES["ValidationError"])
        trusting = [key for key in list(self.keys.values()) if key.role == role]
        for key in trusting:
            name = key.answering
            if name is not None and name in STS_FAILURES:
                if is_refusal(name):
                    key.say_no()
                raise call.refused(STS_FAILURES[name], key=key)
        asked = call.parameters.get("ExternalId")
        willing = [key for key in trusting if key.may("sts:AssumeRole") and key.external_id in (None, asked)]
        if not willing or call.principal.role != self.us.role:
            for key in trusting:
                key.say_no()
            raise call.refused(STS_FAILURES["AccessDenied"], role=role)
        self.assumed += 1
        expires = self._now() + datetime.timedelta(seconds=self.session_seconds)
        made = Principal.session_of(role, session, expires)
        self._principals = {**self._principals, made.access_key: made}
        user = xml(AssumedRoleId=made.user_id, Arn=made.arn)
        given = xml(
            AccessKeyId=made.access_key,
            SecretAccessKey=made.secret,
            SessionToken=made.token,
            Expiration=f"{expires:%Y-%m-%dT%H:%M:%SZ}",
        )
        return f"<AssumedRoleUser>{user}</AssumedRoleUser><Credentials>{given}</Credentials>"


def _unknown(call: _Call) -> NoReturn:
    """What AWS says of another account's key, be it that there is none or that it is not for us."""
    raise call.refused(Failure(400, "AccessDeniedException", _NO_SUCH))


def _outage(status: int) -> Failure:
    if status == 429:
        return KMS_FAILURES["ThrottlingException"]
    name = "ServiceUnavailableException" if status == 503 else "KMSInternalException"
    return KMS_FAILURES[name]._replace(status=status)
