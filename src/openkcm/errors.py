# SPDX-License-Identifier: Apache-2.0
"""Every error the public interface raises.

Invariant: a message says what happened and what to do next, and never holds key material, plaintext or a
provider's raw text. ``code`` is stable and meant for machines; ``retryable`` says whether the same call
can succeed later without anybody changing anything.

::

    OpenKCMError
    ├── InvalidInput (ValueError)      the caller's mistake: a wrong type, name or combination
    ├── LimitExceeded                  a size or count over a documented bound
    ├── FormatError                    bytes that are not a well-formed envelope, context or file
    ├── DecryptError                   wrong key, tag, context or commitment: one fixed message
    ├── KeyNotFound                    no such key here
    │   ├── TenantNotFound
    │   └── ServiceNotFound
    ├── AlreadyExists                  a tenant, service or vault of that name is there
    ├── KeyDisabled                    a key exists, and may not be used now
    │   ├── TenantDark                 the tenant's keys are switched off
    │   └── RootDisabled               the customer's root answered "disabled"
    ├── KeyDestroyed                   a key that was shredded; no way back
    │   └── RootDestroyed              the customer's root answered "deleted" or "pending deletion"
    ├── AccessDenied                   we are known and not allowed
    │   └── RootDenied                 the customer's root refused our identity
    ├── ConfigurationError             something here is set up wrongly
    │   ├── SealError                  the seal file is missing, unsafe or not this vault's
    │   ├── RootMisconfigured          a root URI, module, PIN or key attribute is wrong
    │   └── BackendUnavailable         OPENKCM_BACKEND asks for a backend that is not there
    ├── Unavailable                    something needed does not answer
    │   ├── RootUnavailable
    │   │   └── RootThrottled          it answers "too many requests"
    │   ├── CoreUnavailable
    │   └── StoreUnavailable           database locked, read-only, full or broken
    ├── ChannelExpired                 the session with the Core is over; a new one is agreed on by itself
    ├── SecretMemoryError              no lockable memory, or a wiped, foreign or corrupted handle
    └── InternalError                  our bug; please report it
"""

from __future__ import annotations

from typing import ClassVar


class OpenKCMError(Exception):
    """The base of every error raised on purpose.

    ``index`` is the position of the offending item when a batch failed because of one item, else None.
    """

    code: ClassVar[str] = "error"
    retryable: bool = False
    default: ClassVar[str] = "the operation failed"

    def __init__(
        self, message: str | None = None, *, index: int | None = None, retryable: bool | None = None
    ) -> None:
        super().__init__(self.default if message is None else message)
        self.index = index
        if retryable is not None:
            self.retryable = retryable


class InvalidInput(OpenKCMError, ValueError):
    """An argument has the wrong type, name or combination; nothing was done."""

    code = "invalid_input"


class LimitExceeded(OpenKCMError):
    """A size or count is over a bound of ``openkcm.limits``; nothing was done."""

    code = "limit_exceeded"


class FormatError(OpenKCMError):
    """The bytes are not a well-formed envelope (or context, or file) of a version this build knows."""

    code = "format"
    default = "not a well-formed OpenKCM envelope of a known version"


class DecryptError(OpenKCMError):
    """Wrong key, tag, context or commitment: on purpose nothing tells them apart."""

    code = "decrypt"
    default = (
        "decryption failed: the service, context, key store or data is not the one it was encrypted with"
    )


class KeyNotFound(OpenKCMError):
    """No key of that name or id is known here."""

    code = "key_not_found"


class TenantNotFound(KeyNotFound):
    """No tenant of that name is linked."""

    code = "tenant_not_found"


class ServiceNotFound(KeyNotFound):
    """The tenant has no service of that name, or the envelope names a service that is not here."""

    code = "service_not_found"


class AlreadyExists(OpenKCMError):
    """A tenant, service or vault of that name is already there; nothing was changed."""

    code = "already_exists"


class KeyDisabled(OpenKCMError):
    """The key exists and may not be used now."""

    code = "key_disabled"


class TenantDark(KeyDisabled):
    """The tenant's keys are off: an operator killed it, or its root said no.

    ``told`` is what a Gateway on the network is told in the place of the message, which has the root's own words.
    """

    code = "tenant_dark"
    told: str = "the tenant's keys are off; the Core's operators can see why"

    def __init__(
        self,
        message: str | None = None,
        *,
        told: str | None = None,
        index: int | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message, index=index, retryable=retryable)
        if told is not None:
            self.told = told


class RootDisabled(KeyDisabled):
    """The customer's root key answered that it is disabled."""

    code = "root_disabled"


class KeyDestroyed(OpenKCMError):
    """The key was shredded; what it encrypted cannot be read by anyone again."""

    code = "key_destroyed"


class RootDestroyed(KeyDestroyed):
    """The customer's root key is deleted or waits for its deletion."""

    code = "root_destroyed"


class AccessDenied(OpenKCMError):
    """The identity is known and not allowed to do this."""

    code = "access_denied"


class RootDenied(AccessDenied):
    """The customer's root refuses our identity.

    ``permission`` is the single permission that is missing, in the provider's words, where it could be told.
    """

    code = "root_denied"

    def __init__(
        self,
        message: str | None = None,
        *,
        permission: str | None = None,
        index: int | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(message, index=index, retryable=retryable)
        self.permission = permission


class ConfigurationError(OpenKCMError):
    """Something on this side is set up wrongly; the message says what."""

    code = "configuration"


class SealError(ConfigurationError):
    """The seal file is missing, readable by others, damaged, or belongs to another vault."""

    code = "seal"


class RootMisconfigured(ConfigurationError):
    """A root URI, a PKCS#11 module, a PIN or a key's attributes are wrong."""

    code = "root_misconfigured"


class BackendUnavailable(ConfigurationError):
    """OPENKCM_BACKEND names a backend that this installation does not have."""

    code = "backend_unavailable"


class Unavailable(OpenKCMError):
    """Something needed does not answer; the same call may succeed later."""

    code = "unavailable"
    retryable = True


class RootUnavailable(Unavailable):
    """The customer's root does not answer (an outage, never a refusal)."""

    code = "root_unavailable"


class RootThrottled(RootUnavailable):
    """The customer's root answers that it was asked too often; it is up, and says neither yes nor no."""

    code = "root_throttled"


class CoreUnavailable(Unavailable):
    """The Core does not answer, or was closed."""

    code = "core_unavailable"


class StoreUnavailable(Unavailable):
    """The database is locked, read-only, full or damaged; what was acknowledged before is safe."""

    code = "store_unavailable"


class ChannelExpired(OpenKCMError):
    """The Core knows no such session of this peer, or not any more; a Gateway agrees on a new one by itself."""

    code = "channel_expired"
    retryable = True
    default = "no such session, or not any more; agree on a new one"


class SecretMemoryError(OpenKCMError):
    """No lockable memory is left, or a handle was wiped, damaged or made by another process."""

    code = "secret_memory"


class InternalError(OpenKCMError):
    """A condition that cannot happen did; this is a bug of OpenKCM."""

    code = "internal"
