# SPDX-License-Identifier: Apache-2.0
"""What Key Vault, Managed HSM and Entra ID answer, in our vocabulary.

Invariant: only an answer that says neither yes nor no (too many requests, a server's error, none at all) becomes
``RootUnavailable``; whatever is unknown, or could mean two things, makes the tenant dark. A message names the
provider's code and never repeats its text.

Key Vault says why in ``error.innererror.code``, sometimes only in its message: where the code is missing, the fixed
words of the message stand for it. Entra ID says it in an ``AADSTS`` number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from ...errors import (
    DecryptError,
    OpenKCMError,
    RootDenied,
    RootDestroyed,
    RootDisabled,
    RootMisconfigured,
    RootThrottled,
    RootUnavailable,
)

ANSWERS: Final[Mapping[str, type[OpenKCMError]]] = {
    # Key Vault and Managed HSM
    "KeyDisabled": RootDisabled,
    "KeyExpired": RootDisabled,
    "KeyNotYetValid": RootDisabled,
    "ForbiddenByRbac": RootDenied,
    "ForbiddenByPolicy": RootDenied,
    "ForbiddenByFirewall": RootDenied,
    "ForbiddenByConnection": RootDenied,
    "KeyOperationForbidden": RootDenied,
    "AccessDenied": RootDenied,
    "Forbidden": RootDenied,
    "KeyNotFound": RootDestroyed,
    "VaultNotFound": RootDestroyed,
    "ObjectIsDeletedButRecoverable": RootDestroyed,
    "ObjectIsBeingDeleted": RootDestroyed,
    "ObjectIsBeingRecovered": RootDestroyed,
    "BadParameter": DecryptError,  # asked to unwrap; asked to wrap, it is RootMisconfigured
    "Unauthorized": RootMisconfigured,
    "AKV10022": RootMisconfigured,
    "AKV10032": RootMisconfigured,
    "AKV10046": RootMisconfigured,
    "Throttled": RootThrottled,
    "InternalServerError": RootUnavailable,
    "ServiceUnavailable": RootUnavailable,
    # Entra ID
    "AADSTS7000215": RootMisconfigured,
    "AADSTS7000222": RootMisconfigured,
    "AADSTS700016": RootMisconfigured,
    "AADSTS7000229": RootMisconfigured,
    "AADSTS700024": RootMisconfigured,
    "AADSTS700027": RootMisconfigured,
    "AADSTS700082": RootMisconfigured,
    "AADSTS90002": RootMisconfigured,
    "AADSTS500011": RootMisconfigured,
    "AADSTS7000112": RootDenied,
    "AADSTS53003": RootDenied,
    # This machine and the network, by the SDK's names
    "CredentialUnavailableError": RootMisconfigured,
    "SSLCertVerificationError": RootMisconfigured,
    "ServiceRequestError": RootUnavailable,
    "ServiceRequestTimeoutError": RootUnavailable,
    "ServiceResponseError": RootUnavailable,
    "ServiceResponseTimeoutError": RootUnavailable,
}
"""What an operator looks up, and what becomes of it here."""

SAYS: Final[Mapping[str, str]] = {
    "KeyDisabled": "the root key, or the version of it that is needed, is disabled; its customer can enable it",
    "KeyExpired": "the root key's newest version has expired, so nothing new is wrapped; its customer can rotate it",
    "KeyNotYetValid": "the root key is not valid yet; its customer set a later activation date",
    "ForbiddenByRbac": "our identity has no role on the root key that allows {permission}; its customer can assign one",
    "ForbiddenByPolicy": "the vault's access policies do not give our identity {permission}",
    "ForbiddenByFirewall": "the vault's firewall does not let this machine's address in",
    "ForbiddenByConnection": "the vault takes no connections from the public network; use its private endpoint",
    "KeyOperationForbidden": "the root key's permitted operations (key_ops) do not include {permission}",
    "AccessDenied": "our identity has no role in the managed HSM that allows {permission}",
    "Forbidden": "the vault refuses us {permission}",
    "KeyNotFound": "the vault has no such key: it was deleted, or the key or version in the root's URI is wrong",
    "VaultNotFound": "there is no such vault: it was deleted, or the host in the root's URI is wrong",
    "ObjectIsDeletedButRecoverable": "the root key was deleted; its customer can still recover it",
    "ObjectIsBeingDeleted": "the root key is being deleted",
    "ObjectIsBeingRecovered": "the root key was deleted and is being recovered; wait until that is done",
    "BadParameter": "the key cannot be used this way: a vault's key must be RSA of 2048 bits or more, a managed HSM's"
    " AES of 256 bits (oct-HSM)",
    "Unauthorized": "the vault does not accept our token; check AZURE_TENANT_ID and AZURE_AUTHORITY_HOST",
    "AKV10022": "our token is for another audience than the vault; check AZURE_AUTHORITY_HOST",
    "AKV10032": "our token comes from another Entra tenant than the vault's; add ?tenant=ID to the root's URI",
    "AKV10046": "the vault cannot verify our token: it is another cloud's (check AZURE_AUTHORITY_HOST), or the vault"
    " cannot reach Entra ID for the moment",
    "Throttled": "the vault was asked too often",
    "AADSTS7000215": "Entra ID says that our client secret is wrong; set AZURE_CLIENT_SECRET to the secret's value, not"
    " to its ID",
    "AADSTS7000222": "Entra ID says that our client secret has expired; make a new one and set AZURE_CLIENT_SECRET",
    "AADSTS700016": "Entra ID knows no application AZURE_CLIENT_ID in the vault's tenant; its administrator must add it"
    " (az ad sp create --id CLIENT_ID)",
    "AADSTS7000229": "our application has no service principal in the vault's tenant; its administrator must add it"
    " (az ad sp create --id CLIENT_ID)",
    "AADSTS700024": "Entra ID says that our signed login is too old or too new: this machine's clock is off",
    "AADSTS700027": "Entra ID does not know our certificate; register the one in AZURE_CLIENT_CERTIFICATE_PATH",
    "AADSTS700082": "our login has expired; log in again (az login)",
    "AADSTS90002": "Entra ID knows no such tenant; check AZURE_TENANT_ID, or tenant= in the root's URI",
    "AADSTS500011": "the vault's Entra tenant does not know Key Vault by that audience; check AZURE_AUTHORITY_HOST",
    "AADSTS7000112": "our application is disabled in the vault's Entra tenant",
    "AADSTS53003": "a conditional access policy of the vault's Entra tenant keeps our identity out",
}
"""What happened and what to do next, where more can be said than the class does."""

_CLUES: Final = (
    (re.compile(r"not allowed on an? disabled key", re.IGNORECASE), "KeyDisabled"),
    (re.compile(r"not allowed on an? expired key", re.IGNORECASE), "KeyExpired"),
    (re.compile(r"not allowed on an? (key that is )?not[ -]yet[ -]valid", re.IGNORECASE), "KeyNotYetValid"),
    (re.compile(r"is not permitted on this key", re.IGNORECASE), "KeyOperationForbidden"),
    (re.compile(r"is not authorized and caller is not a trusted service"), "ForbiddenByFirewall"),
    (re.compile(r"public network access is disabled|private link", re.IGNORECASE), "ForbiddenByConnection"),
    (re.compile(r"^Caller is not authorized to perform action"), "ForbiddenByRbac"),
    (re.compile(r"does not have keys \w+ permission"), "ForbiddenByPolicy"),
    (re.compile(r"^Not authorized to access Microsoft\.KeyVault"), "AccessDenied"),
    (re.compile(r"^(AKV[0-9]{5})\b"), ""),
)
_BY_STATUS: Final[Mapping[int, type[OpenKCMError]]] = {
    403: RootDenied,
    408: RootUnavailable,
    429: RootThrottled,
}
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9]{0,63}", re.ASCII)
_ENTRA: Final = re.compile(r"\bAADSTS[0-9]{5,8}\b", re.ASCII)


def refusal(status: int, document: Any, permission: str, *, unwrapping: bool) -> OpenKCMError:
    """Say what an answer means that is not "done".

    Args:
        status, document: of the HTTP response; the document may be anything.
        permission: what was needed, in the provider's words.
        unwrapping: whether a key was to be unwrapped, so that a parameter that is bad is the ciphertext.
    """
    name = answer_name(document)
    kind = ANSWERS.get(name) if name else None
    if kind is None or status >= 500 or status in (408, 429):
        kind = RootUnavailable if status >= 500 else _BY_STATUS.get(status, RootMisconfigured)
    elif issubclass(kind, RootUnavailable):
        kind = RootMisconfigured  # says "wait" with a status that says "no"
    if kind is DecryptError:
        if unwrapping and status == 400:
            return DecryptError()
        kind = RootMisconfigured
    return make(kind, name, permission, fallback=_fallback(status))


def make(
    kind: type[OpenKCMError], name: str | None, permission: str | None = None, *, fallback: str
) -> OpenKCMError:
    """Make an error that says what the provider's answer means, and its name in parentheses."""
    text = SAYS.get(name, fallback) if name and ANSWERS.get(name) in (kind, DecryptError) else fallback
    message = text.format(permission=permission or "this") + (f" ({name})" if name else "")
    if kind is not RootDenied:
        return kind(message)
    missing = permission if name not in ("ForbiddenByFirewall", "ForbiddenByConnection") else None
    return RootDenied(message, permission=missing)


def answer_name(document: Any) -> str | None:
    """Return the name of Key Vault's error: one that is known if there is one, else whatever it is called."""
    error = document.get("error") if isinstance(document, dict) else None
    if not isinstance(error, dict):
        return None
    inner = error.get("innererror", error.get("innerError"))
    message = error.get("message")
    names = [
        _named(inner.get("code")) if isinstance(inner, dict) else None,
        _clue(message) if isinstance(message, str) else None,
        _named(error.get("code")),
    ]
    found = [name for name in names if name]
    return next((name for name in found if name in ANSWERS), found[0] if found else None)


def entra_name(error: BaseException) -> str | None:
    """Return the AADSTS number in what Entra ID said: one that is known if there is one."""
    found = [name for each in causes(error) for name in _ENTRA.findall(str(each))]
    return next((name for name in found if name in ANSWERS), found[0] if found else None)


def causes(error: BaseException) -> Iterator[BaseException]:
    """Walk an error and everything that it was made from, in the ways that the SDK's layers keep it."""
    waiting, seen = [error], set[int]()
    while waiting and len(seen) < 64:
        each = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        kept = (getattr(each, name, None) for name in ("inner_exception", "reason"))  # azure-core, urllib3
        further = (each.__cause__, each.__context__, *kept, *each.args[:1])
        waiting += [more for more in further if isinstance(more, BaseException)]


def _named(value: Any) -> str | None:
    return value if isinstance(value, str) and _NAME.fullmatch(value) else None


def _clue(message: str) -> str | None:
    for pattern, name in _CLUES:
        match = pattern.search(message)
        if match:
            return name or match[1]
    return None


def _fallback(status: int) -> str:
    if status >= 500:
        return f"the vault fails (HTTP {status})"
    if status == 429:
        return "the vault was asked too often"
    if status == 403:
        return "the vault refuses us {permission}"
    if status == 404:
        return "there is no Key Vault at the root's host (HTTP 404); check it, and what lies in between"
    return f"the vault answers what it should not (HTTP {status}); check the root's URI, and what lies in between"
