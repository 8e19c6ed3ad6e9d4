# SPDX-License-Identifier: Apache-2.0
"""The errors that AWS KMS and AWS STS answer with: status, code and wording.

From the service models, the AWS KMS API Reference ("Common errors", "Decrypt"), the Developer Guide ("Key states of AWS
KMS keys", "Troubleshooting external key stores") and the AWS STS API Reference. ``{arn}`` is the key's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple


class Failure(NamedTuple):
    """One error as it goes over the wire."""

    status: int
    code: str
    message: str


_TOO_OFTEN: Final = "Rate exceeded"
_EXPIRED: Final = (
    "Signature expired: 20260101T000000Z is now earlier than 20260101T001000Z (20260101T001500Z - 5 min.)"
)
_SCOPE: Final = "Credential should be scoped to a valid region. "
_MISMATCH: Final = (
    "The request signature we calculated does not match the signature you provided. Check your AWS Secret Access Key "
    "and signing method. Consult the service documentation for details."
)
_STATE: Final = "KMSInvalidStateException"

KMS_FAILURES: Final[Mapping[str, Failure]] = {
    "DisabledException": Failure(400, "DisabledException", "{arn} is disabled."),
    "DisabledException (pending deletion)": Failure(400, "DisabledException", "{arn} is pending deletion."),
    _STATE: Failure(400, _STATE, "{arn} is in a state that nobody has documented."),
    f"{_STATE} (pending deletion)": Failure(400, _STATE, "{arn} is pending deletion."),
    f"{_STATE} (pending import)": Failure(400, _STATE, "{arn} is pending import."),
    f"{_STATE} (unavailable)": Failure(400, _STATE, "{arn} is unavailable."),
    f"{_STATE} (creating)": Failure(400, _STATE, "{arn} is creating."),
    f"{_STATE} (external key disabled)": Failure(
        400,
        _STATE,
        "The external key store proxy rejected the request because the external key is not enabled in the external key "
        "manager.",
    ),
    f"{_STATE} (external key not found)": Failure(
        400,
        _STATE,
        "The external key store proxy rejected the request because it could not find the external key.",
    ),
    f"{_STATE} (external store denied)": Failure(
        400,
        _STATE,
        "The external key store proxy denied access to the operation. Verify that the user and the external key are "
        "both authorized for this operation, and try the request again.",
    ),
    f"{_STATE} (external store authentication)": Failure(
        400,
        _STATE,
        "The external key store proxy rejected the request because it could not authenticate AWS KMS. Verify the "
        "credentials for your external key store and update if necessary.",
    ),
    f"{_STATE} (external key usage)": Failure(
        400,
        _STATE,
        "The external key store proxy rejected the request because the external key does not support the requested "
        "operation.",
    ),
    f"{_STATE} (external ciphertext)": Failure(
        400,
        _STATE,
        "The external key store proxy rejected the request because the specified ciphertext or additional "
        "authenticated data is corrupted, missing, or otherwise invalid.",
    ),
    f"{_STATE} (external store throttled)": Failure(
        400, _STATE, "The external key store proxy rejected the request due to a very high request rate."
    ),
    f"{_STATE} (external store silent)": Failure(
        400,
        _STATE,
        "AWS KMS rejected the request because the external key store proxy did not respond in time. Retry the "
        "request. If you see this error repeatedly, report it to your external key store proxy administrator.",
    ),
    "NotFoundException": Failure(400, "NotFoundException", "Key '{arn}' does not exist"),
    "NotFoundException (other region)": Failure(400, "NotFoundException", "Invalid arn us-west-2"),
    "AccessDeniedException": Failure(
        400,
        "AccessDeniedException",
        "User: {user} is not authorized to perform: {action} on resource: {arn} because no resource-based policy "
        "allows the {action} action",
    ),
    "NotAuthorized": Failure(400, "NotAuthorized", "You do not have permission to perform this action."),
    "IncorrectKeyException": Failure(
        400,
        "IncorrectKeyException",
        "The key ID in the request does not identify a CMK that can perform this operation.",
    ),
    "InvalidCiphertextException": Failure(400, "InvalidCiphertextException", ""),
    "InvalidKeyUsageException": Failure(
        400, "InvalidKeyUsageException", "{arn} key usage is SIGN_VERIFY which is not valid for {action}."
    ),
    "UnsupportedOperationException": Failure(400, "UnsupportedOperationException", ""),
    "InvalidArnException": Failure(400, "InvalidArnException", "Invalid arn"),
    "ThrottlingException": Failure(
        400,
        "ThrottlingException",
        "You have exceeded the rate at which you may call KMS. Reduce the frequency of your calls.",
    ),
    "ThrottledException": Failure(400, "ThrottledException", _TOO_OFTEN),
    "RequestThrottled": Failure(400, "RequestThrottled", _TOO_OFTEN),
    "RequestThrottledException": Failure(400, "RequestThrottledException", _TOO_OFTEN),
    "RequestLimitExceeded": Failure(503, "RequestLimitExceeded", _TOO_OFTEN),
    "TooManyRequestsException": Failure(429, "TooManyRequestsException", _TOO_OFTEN),
    "LimitExceededException": Failure(400, "LimitExceededException", _TOO_OFTEN),
    "KeyUnavailableException": Failure(500, "KeyUnavailableException", ""),
    "DependencyTimeoutException": Failure(500, "DependencyTimeoutException", ""),
    "KMSInternalException": Failure(500, "KMSInternalException", ""),
    "InternalFailure": Failure(500, "InternalFailure", ""),
    "InternalError": Failure(500, "InternalError", ""),
    "InternalServerError": Failure(500, "InternalServerError", ""),
    "ServiceUnavailable": Failure(503, "ServiceUnavailable", ""),
    "ServiceUnavailableException": Failure(503, "ServiceUnavailableException", ""),
    "RequestTimeout": Failure(400, "RequestTimeout", ""),
    "UnrecognizedClientException": Failure(
        400, "UnrecognizedClientException", "The security token included in the request is invalid."
    ),
    "ExpiredTokenException": Failure(
        400, "ExpiredTokenException", "The security token included in the request is expired"
    ),
    "InvalidSignatureException": Failure(400, "InvalidSignatureException", _MISMATCH),
    "InvalidSignatureException (clock)": Failure(400, "InvalidSignatureException", _EXPIRED),
    "InvalidSignatureException (scope)": Failure(400, "InvalidSignatureException", _SCOPE),
    "RequestExpired": Failure(400, "RequestExpired", "Request has expired."),
    "RequestTimeTooSkewed": Failure(403, "RequestTimeTooSkewed", ""),
    "IncompleteSignatureException": Failure(400, "IncompleteSignatureException", ""),
    "MissingAuthenticationTokenException": Failure(
        400, "MissingAuthenticationTokenException", "Missing Authentication Token"
    ),
    "OptInRequired": Failure(
        403, "OptInRequired", "The AWS Access Key Id needs a subscription for the service"
    ),
    "SubscriptionRequiredException": Failure(
        400, "SubscriptionRequiredException", "The AWS Access Key Id needs a subscription for the service"
    ),
    "ValidationException": Failure(400, "ValidationException", "1 validation error detected"),
    "SerializationException": Failure(400, "SerializationException", ""),
    "UnknownOperationException": Failure(400, "UnknownOperationException", ""),
}

STS_FAILURES: Final[Mapping[str, Failure]] = {
    "AccessDenied": Failure(
        403, "AccessDenied", "User: {user} is not authorized to perform: sts:AssumeRole on resource: {role}"
    ),
    "RegionDisabledException": Failure(
        403, "RegionDisabledException", "STS is not activated in this region for account:{user}."
    ),
    "IDPCommunicationError": Failure(400, "IDPCommunicationError", ""),
    "IDPRejectedClaim": Failure(403, "IDPRejectedClaim", ""),
    "InvalidIdentityToken": Failure(400, "InvalidIdentityToken", ""),
    "Throttling": Failure(400, "Throttling", _TOO_OFTEN),
    "InvalidClientTokenId": Failure(
        403, "InvalidClientTokenId", "The security token included in the request is invalid."
    ),
    "ExpiredToken": Failure(403, "ExpiredToken", "The security token included in the request is expired"),
    "SignatureDoesNotMatch": Failure(403, "SignatureDoesNotMatch", _MISMATCH),
    "SignatureDoesNotMatch (clock)": Failure(403, "SignatureDoesNotMatch", _EXPIRED),
    "SignatureDoesNotMatch (scope)": Failure(403, "SignatureDoesNotMatch", _SCOPE),
    "IncompleteSignature": Failure(400, "IncompleteSignature", ""),
    "MissingAuthenticationToken": Failure(
        403, "MissingAuthenticationToken", "Request is missing Authentication Token"
    ),
    "ValidationError": Failure(400, "ValidationError", "1 validation error detected"),
    "InvalidAction": Failure(400, "InvalidAction", "Could not find operation in the service"),
}

FAILURES: Final[Mapping[str, Failure]] = {**KMS_FAILURES, **STS_FAILURES}
"""Every error that can be had of the service, by its name here: the code, with the case in parentheses."""

# What AWS STS calls what JSON services call otherwise.
STS_CODES: Final[Mapping[str, str]] = {
    "MissingAuthenticationTokenException": "MissingAuthenticationToken",
    "IncompleteSignatureException": "IncompleteSignature",
    "UnrecognizedClientException": "InvalidClientTokenId",
    "InvalidSignatureException": "SignatureDoesNotMatch",
    "ExpiredTokenException": "ExpiredToken",
}

THROTTLES: Final = frozenset(
    name for name in FAILURES if any(word in name.lower() for word in ("throttl", "toomany", "limitexceeded"))
)
SILENCES: Final = frozenset(name for name in FAILURES if "silent" in name or "creating" in name)


def is_refusal(name: str) -> bool:
    """Whether the service says no by it, rather than failing or asking for patience."""
    return FAILURES[name].status < 500 and name not in THROTTLES | SILENCES
