# SPDX-License-Identifier: Apache-2.0
"""Errors as Cloud KMS sends them: a ``google.rpc.Status`` as JSON, with its details.

The forms are those of google/rpc/status.proto, error_details.proto and google/api/error_reason.proto, of Cloud KMS's
documentation of key states, and of its error reference for external keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ..https import Response

CODES: Final[Mapping[str, int]] = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ABORTED": 409,
    "ALREADY_EXISTS": 409,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNKNOWN": 500,
    "INTERNAL": 500,
    "DATA_LOSS": 500,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""google.rpc.Code, and the HTTP status that stands for each."""

REASONS: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        (
            "IAM_PERMISSION_DENIED",
            "SECURITY_POLICY_VIOLATED",
            "ORG_RESTRICTION_VIOLATION",
            "RESOURCE_USAGE_RESTRICTION_VIOLATED",
            "USER_PROJECT_DENIED",
            "SERVICE_DISABLED",
            "BILLING_DISABLED",
            "CONSUMER_SUSPENDED",
            "CONSUMER_INVALID",
            "GCP_SUSPENDED",
            "ACCESS_TOKEN_SCOPE_INSUFFICIENT",
        ),
        "PERMISSION_DENIED",
    ),
    **dict.fromkeys(
        (
            "ACCESS_TOKEN_EXPIRED",
            "ACCESS_TOKEN_TYPE_UNSUPPORTED",
            "ACCOUNT_STATE_INVALID",
            "CREDENTIALS_MISSING",
        ),
        "UNAUTHENTICATED",
    ),
    "API_KEY_INVALID": "INVALID_ARGUMENT",
    "RATE_LIMIT_EXCEEDED": "RESOURCE_EXHAUSTED",
    "RESOURCE_QUOTA_EXCEEDED": "RESOURCE_EXHAUSTED",
}
"""Reasons of an ErrorInfo, and the status each comes with."""

EXTERNAL: Final = (
    "EXTERNAL_PERMISSION_DENIED",
    "EXTERNAL_NOT_FOUND",
    "EXTERNAL_KEY_URI_INVALID",
    "EXTERNAL_KEY_HOST_NOT_WHITELISTED",
    "DNS",
    "EXTERNAL_RESOURCE_EXHAUSTED",
    "UNREACHABLE_NETWORK",
    "OVERLOADED_EKM",
    "TIMEOUT",
    "REQUEST_CANCELLED",
    "TLS_CERT",
    "UNEXPECTED_RESPONSE",
    "EXTERNAL_SERVER_ERROR",
    "EXTERNAL_NOT_IMPLEMENTED",
    "UNEXPECTED_ERROR",
    "DECRYPTION_FAILED",
)
"""Error domains of Cloud EKM: the type of the second violation."""


def status(name: str, message: str, *details: dict[str, Any]) -> Response:
    """An answer with this status."""
    error: dict[str, Any] = {"code": CODES[name], "message": message, "status": name}
    if details:
        error["details"] = list(details)
    return Response(CODES[name], {"error": error})


def error_info(reason: str, domain: str = "googleapis.com", **metadata: str) -> dict[str, Any]:
    """An ErrorInfo."""
    return {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        "reason": reason,
        "domain": domain,
        "metadata": metadata,
    }


def precondition(*violations: tuple[str, str]) -> dict[str, Any]:
    """A PreconditionFailure with these violations: (type, subject)."""
    return {
        "@type": "type.googleapis.com/google.rpc.PreconditionFailure",
        "violations": [{"type": kind, "subject": subject} for kind, subject in violations],
    }


def not_enabled(version: str, state: str) -> Response:
    """What the use of a version in another state than ENABLED is answered with."""
    return status(
        "FAILED_PRECONDITION",
        f"{version} is not enabled, current state is: {state}.",
        precondition((f"KEY_{state}", version)),
    )


def denied(permission: str, resource: str) -> Response:
    """What a caller without a permission is told, also of a resource that is not there."""
    return status(
        "PERMISSION_DENIED",
        f"Permission '{permission}' denied on resource '{resource}' (or it may not exist).",
        error_info("IAM_PERMISSION_DENIED", "iam.googleapis.com", permission=permission, resource=resource),
    )


def not_decrypted(why: str) -> Response:
    """What a ciphertext that is not this key's, or was altered, is answered with."""
    return status("INVALID_ARGUMENT", f"Decryption failed: {why}")


def named(name: str, version: str) -> Response:
    """An answer by Google's name of an error; ValueError if the service has none of that name."""
    if name in CODES:
        return status(name, "Test error.")
    if name in REASONS:
        info = error_info(name, consumer="projects/123456789012", service="cloudkms.googleapis.com")
        return status(REASONS[name], "Test error.", info)
    if name in EXTERNAL:
        # The first violation tells of the key's state; its type is not documented.
        details = precondition(("KEY_STATE", version), (name, version))
        code = "INVALID_ARGUMENT" if name == "DECRYPTION_FAILED" else "FAILED_PRECONDITION"
        return status(code, "Test error.", details)
    if name.startswith("KEY_"):
        return not_enabled(version, name.removeprefix("KEY_"))
    if name == "VPC_SERVICE_CONTROLS":
        return status("PERMISSION_DENIED", "Request is prohibited by policy.", precondition((name, "uid")))
    raise ValueError(f"Cloud KMS answers with no error {name}")


def failed(code: int) -> Response:
    """An error of the service itself, by its HTTP status."""
    if code == 502:  # Google's front end, not the service
        return Response(
            502,
            b"<!DOCTYPE html><title>Error 502 (Server Error)!!1</title>",
            (("Content-Type", "text/html"),),
        )
    for name, known in CODES.items():
        if known == code and name not in ("UNKNOWN", "DATA_LOSS"):
            details = (error_info("RATE_LIMIT_EXCEEDED"),) if code == 429 else ()
            return status(name, "The service is currently unavailable.", *details)
    return Response(code, {"error": {"code": code, "message": "Test error.", "status": "UNKNOWN"}})
