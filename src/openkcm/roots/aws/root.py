# SPDX-License-Identifier: Apache-2.0
"""``aws-kms://ARN`` a root key in AWS KMS: bring your own key.

Invariant: the key never leaves AWS. Two permissions on one key are enough, ``kms:Encrypt`` and ``kms:Decrypt``, and no
other call is made with the key. The context is AWS's encryption context, each name with ``openkcm:`` before it, so that
it is bound to the ciphertext, stands in the customer's CloudTrail, and can be asked for by their key policy.

A wrapped blob is ``01 || CiphertextBlob`` of AWS KMS, which itself names the key and the version of its material.
Decrypt names the key as well, so that a blob that another key wrapped is refused, and the answer must name it again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from ...context import encode_context
from ...errors import DecryptError, InvalidInput, OpenKCMError, RootMisconfigured
from ..base import Grant
from .answers import ANSWERS, malformed, translate
from .clients import Connection, connect, quiet
from .uri import AWSURI, parse_aws_uri

__all__ = ["ANSWERS", "AWSRoot", "open_aws"]

FORMAT: Final = b"\x01"
CONTEXT_PREFIX: Final = "openkcm:"
PERMISSIONS: Final = ("kms:Encrypt", "kms:Decrypt")

MAX_PLAINTEXT_BYTES: Final = 4096
"""What Encrypt takes with a symmetric key (PlaintextType of the service model)."""

MAX_BLOB_BYTES: Final = 6144
"""What Decrypt takes (CiphertextType of the service model)."""

_PRINCIPAL: Final = re.compile(
    r"arn:aws(?:-[a-z]+)*:iam::[0-9]{12}:(?:root|(?:user|role)/[\x21-\x7e]{1,576})", re.ASCII
)
_ACCOUNT: Final = re.compile(r"[0-9]{12}", re.ASCII)
_SESSION: Final = re.compile(
    r"arn:(aws(?:-[a-z]+)*):sts::([0-9]{12}):assumed-role/([\w+=,.@-]{1,64})/[\w+=,.@-]{2,64}", re.ASCII
)


class AWSRoot:
    """A symmetric key in AWS KMS."""

    development = False

    def __init__(self, parsed: AWSURI) -> None:
        self._parsed = parsed
        self._connection: Connection | None = None
        self.uri = str(parsed)

    def __repr__(self) -> str:
        return f"<AWSRoot {self.uri}>"

    def wrap(self, sealed: bytes, context: Mapping[str, str]) -> bytes:
        """Have AWS KMS encrypt ``sealed`` (1 to 4096 bytes), bound to the context."""
        if not 1 <= len(sealed) <= MAX_PLAINTEXT_BYTES:
            raise InvalidInput(f"AWS KMS wraps 1 to {MAX_PLAINTEXT_BYTES} bytes")
        try:
            answer = self._call("encrypt", Plaintext=bytes(sealed), EncryptionContext=_bound(context))
        except DecryptError:
            raise malformed("Encrypt speaks of a ciphertext") from None
        return FORMAT + self._field(answer, "CiphertextBlob", MAX_BLOB_BYTES)

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        """Have AWS KMS decrypt; DecryptError for what this key did not wrap, or under another context."""
        bound = _bound(context)
        if wrapped[:1] != FORMAT or not 2 <= len(wrapped) <= 1 + MAX_BLOB_BYTES:
            raise DecryptError
        answer = self._call("decrypt", CiphertextBlob=bytes(wrapped[1:]), EncryptionContext=bound)
        return self._field(answer, "Plaintext", MAX_PLAINTEXT_BYTES)

    def grant(self, identity: str | None = None) -> Grant:
        """Say which policies must allow us what; a key policy statement first.

        Args:
            identity: an IAM principal's ARN or an account's number; else AWS STS is asked who we are, which needs no
                permission. A role's path cannot be asked for: give the ARN if the role has one.

        Raises:
            RootMisconfigured: none was given and none could be found, or it is not an identity of AWS.
        """
        ours = _principal(identity if identity is not None else self._identity(), self._parsed.partition)
        return _grant(self._parsed, ours)

    def warnings(self) -> list[str]:
        """What is weak, as far as can be told without another permission."""
        found = []
        if self._parsed.multi_region:
            found.append(
                "the root key is a multi-region key: disabling it leaves its replicas in other regions usable "
                "to whoever holds the wrapped keys"
            )
        try:
            with quiet():
                connection = self._connected()
                plain, lasting = connection.plain, connection.lasting_key()
        except Exception:  # whatever is wrong will be said where the root is used
            return found
        if plain:
            found.append(
                "AWS KMS is asked without TLS, so its answers can be forged; use an https:// endpoint"
            )
        if lasting:
            found.append("our AWS access key has no end; use a role, whose credentials expire by themselves")
        return found

    def close(self) -> None:
        """Let go of the client; its connections are closed when no other root uses it."""
        self._connection = None

    # ---- inside ----------------------------------------------------------------------------------------

    def _connected(self) -> Connection:
        held = self._connection
        if held is None or not held.usable:
            held = self._connection = connect(self._parsed)
        return held

    def _call(self, operation: str, **parameters: Any) -> dict[str, Any]:
        connection = None
        try:
            with quiet():
                connection = self._connected()
                answer = getattr(connection.client, operation)(KeyId=self._parsed.arn, **parameters)
        except OpenKCMError:
            raise
        except Exception as error:  # the SDK also raises what its parsers stumble over
            translated, renew = translate(error)
            if renew and connection is not None:
                connection.discard()
            raise translated from None
        return answer if isinstance(answer, dict) else {}

    def _field(self, answer: dict[str, Any], name: str, most: int) -> bytes:
        """A field of an answer that names our key; whatever is absent or odd is an answer of something else."""
        value = answer.get(name)
        if not isinstance(value, bytes) or not 1 <= len(value) <= most:
            raise malformed(f"no {name}")
        if answer.get("KeyId") != self._parsed.arn:
            raise malformed("another KeyId")
        return value

    def _identity(self) -> str:
        try:
            with quiet():
                client = self._connected().sts()
                try:
                    found = client.get_caller_identity()["Arn"]
                finally:
                    client.close()
        except OpenKCMError:
            raise
        except Exception as error:
            why = translate(error).error
            raise RootMisconfigured(f"who we are could not be found; give identity=, or: {why}") from None
        return str(found)


def open_aws(uri: str, *, create: bool = False) -> AWSRoot:
    """Open an ``aws-kms:`` root; AWS is asked when the key is first used. ``create`` has no effect."""
    return AWSRoot(parse_aws_uri(uri))


def _bound(context: Mapping[str, str]) -> dict[str, str]:
    encode_context(context)  # for its checks: text only, and not too long
    return {CONTEXT_PREFIX + name: value for name, value in context.items()}


# ---- what to allow ---------------------------------------------------------------------------------------


def _principal(identity: str, partition: str) -> str:
    """What a policy can name: a session of a role stands for its role, an account's number for the account."""
    if _ACCOUNT.fullmatch(identity):
        return f"arn:{partition}:iam::{identity}:root"
    session = _SESSION.fullmatch(identity)
    if session is not None:
        identity = f"arn:{session[1]}:iam::{session[2]}:role/{session[3]}"
    if not _PRINCIPAL.fullmatch(identity) or identity.split(":")[1] != partition:
        raise RootMisconfigured(
            f"an identity is the ARN of a role or user (arn:{partition}:iam::111122223333:role/NAME) or an account's "
            "number, in the key's partition"
        )
    return identity


def _grant(root: AWSURI, ours: str) -> Grant:
    """The key policy statement, and what must be allowed besides it where accounts differ or a role is assumed."""
    user = root.role or ours
    parts = [_json(_statement(user))]
    if _account(user) != root.account:
        parts += [
            f"The key is in another account, so a policy of {user} must allow it too:",
            _json(_policy({"Effect": "Allow", "Action": list(PERMISSIONS), "Resource": root.arn})),
        ]
    permissions: tuple[str, ...] = PERMISSIONS
    if root.role is not None:
        permissions = (*PERMISSIONS, "sts:AssumeRole")
        trust: dict[str, Any] = {"Effect": "Allow", "Principal": {"AWS": ours}, "Action": "sts:AssumeRole"}
        if root.external_id is not None:
            trust["Condition"] = {"StringEquals": {"sts:ExternalId": root.external_id}}
        parts += [f"The trust policy of {root.role} must let us assume it:", _json(_policy(trust))]
        if _account(ours) != _account(root.role):
            parts += [
                f"The role is in another account, so a policy of {ours} must allow it too:",
                _json(_policy({"Effect": "Allow", "Action": "sts:AssumeRole", "Resource": root.role})),
            ]
    return Grant("key policy statement", "\n\n".join(parts), permissions, user)


def _statement(principal: str) -> dict[str, Any]:
    return {
        "Sid": "OpenKCM",
        "Effect": "Allow",
        "Principal": {"AWS": principal},
        "Action": list(PERMISSIONS),
        "Resource": "*",
        "Condition": {"Null": {f"kms:EncryptionContext:{CONTEXT_PREFIX}layer": "false"}},
    }


def _policy(statement: dict[str, Any]) -> dict[str, Any]:
    return {"Version": "2012-10-17", "Statement": [statement]}


def _account(arn: str) -> str:
    return arn.split(":")[4]


def _json(document: dict[str, Any]) -> str:
    return json.dumps(document, indent=2)
