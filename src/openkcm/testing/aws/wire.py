# SPDX-License-Identifier: Apache-2.0
"""Requests and answers of AWS KMS (JSON 1.1) and AWS STS (Query, XML) as they go over the wire."""

from __future__ import annotations

import base64
import binascii
import uuid
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import parse_qs
from xml.sax.saxutils import escape

from ..https import Request, Response
from .errors import KMS_FAILURES, Failure

JSON: Final = "application/x-amz-json-1.1"
NAMESPACE: Final = "https://sts.amazonaws.com/doc/2011-06-15/"

MAX_PLAINTEXT_BYTES: Final = 4096
MAX_CIPHERTEXT_BYTES: Final = 6144


class Refused(Exception):
    """An error to answer with."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.code)
        self.failure = failure


def invalid(message: str) -> Refused:
    """What AWS says to parameters that break the model."""
    return Refused(Failure(400, "ValidationException", f"1 validation error detected: {message}"))


# ---- requests --------------------------------------------------------------------------------------------


def read_parameters(request: Request) -> dict[str, Any]:
    """The parameters of a JSON request."""
    try:
        parameters = request.json()
    except ValueError:
        raise Refused(KMS_FAILURES["SerializationException"]) from None
    if not isinstance(parameters, dict):
        raise Refused(KMS_FAILURES["SerializationException"])
    return parameters


def read_form(request: Request) -> dict[str, str]:
    """The parameters of a Query request."""
    try:
        return {name: values[-1] for name, values in parse_qs(request.body.decode()).items()}
    except UnicodeDecodeError:
        return {}


def read_blob(parameters: Mapping[str, Any], name: str, most: int) -> bytes:
    """A blob of 1 to ``most`` bytes."""
    value = parameters.get(name)
    what = name[0].lower() + name[1:]
    if value is None:
        raise invalid(f"Value null at '{what}' failed to satisfy constraint: Member must not be null")
    try:
        decoded = base64.b64decode(value, validate=True)
    except (TypeError, binascii.Error, ValueError):
        raise Refused(KMS_FAILURES["SerializationException"]) from None
    if not 1 <= len(decoded) <= most:
        bound = "greater than or equal to 1" if not decoded else f"less than or equal to {most}"
        raise invalid(f"Value at '{what}' failed to satisfy constraint: Member must have length {bound}")
    return decoded


def read_context(parameters: Mapping[str, Any]) -> dict[str, str]:
    """The encryption context; names that begin with ``aws:`` are AWS's own."""
    context = parameters.get("EncryptionContext", {})
    if not isinstance(context, dict) or not all(isinstance(value, str) for value in context.values()):
        raise Refused(KMS_FAILURES["SerializationException"])
    if any(not name or name.startswith("aws:") for name in context):
        raise Refused(Failure(400, "ValidationException", "Invalid EncryptionContext"))
    return context


# ---- answers ---------------------------------------------------------------------------------------------


def show_blob(value: bytes) -> str:
    """A blob in a JSON answer."""
    return base64.b64encode(value).decode()


def answer(result: Mapping[str, Any] | None) -> Response:
    """A JSON answer; one without a result has no body."""
    return Response(200, b"" if result is None else dict(result), _headers(JSON))


def answer_failure(failure: Failure) -> Response:
    """A JSON error."""
    body = {"__type": failure.code}
    if failure.message:
        body["Message" if failure.code == "AccessDeniedException" else "message"] = failure.message
    return Response(failure.status, body, _headers(JSON))


def answer_xml(action: str, result: str) -> Response:
    """A Query answer."""
    number = uuid.uuid4()
    body = (
        f'<{action}Response xmlns="{NAMESPACE}"><{action}Result>{result}</{action}Result>'
        f"<ResponseMetadata><RequestId>{number}</RequestId></ResponseMetadata></{action}Response>"
    )
    return Response(200, body.encode(), _headers("text/xml"))


def answer_xml_failure(failure: Failure) -> Response:
    """A Query error."""
    kind = "Sender" if failure.status < 500 else "Receiver"
    body = (
        f'<ErrorResponse xmlns="{NAMESPACE}"><Error><Type>{kind}</Type><Code>{failure.code}</Code>'
        f"<Message>{escape(failure.message)}</Message></Error><RequestId>{uuid.uuid4()}</RequestId></ErrorResponse>"
    )
    return Response(failure.status, body.encode(), _headers("text/xml"))


def xml(**fields: str) -> str:
    """Fields of an XML structure, in order."""
    return "".join(f"<{name}>{escape(value)}</{name}>" for name, value in fields.items())


def _headers(kind: str) -> tuple[tuple[str, str], ...]:
    return (
        ("x-amzn-RequestId", str(uuid.uuid4())),
        ("Content-Type", kind),
        ("Cache-Control", "no-cache, no-store, must-revalidate, private"),
        ("Expires", "0"),
        ("Pragma", "no-cache"),
    )
