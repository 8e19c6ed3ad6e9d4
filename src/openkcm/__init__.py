# SPDX-License-Identifier: Apache-2.0
"""OpenKCM: customer-held keys at the speed of local encryption.

Invariant: importing this package is cheap. The errors and the vocabulary are here at once; what needs a
database or OpenSSL is imported when its name is first used.

::

    core = openkcm.Core.open("sqlite:///vault.db")
    core.link_tenant("acme", root="pkcs11:token=acme;object=root?pin-source=file:pin")
    core.create_service("acme", "payments")

    payments = openkcm.Gateway(core).service("acme", "payments")
    blob = payments.encrypt(b"4111 1111 1111 1111", context={"row": "7"})
    data = payments.decrypt(blob, context={"row": "7"})

Glossary:

root (L1)
    The customer's key in the customer's KMS or HSM. OpenKCM holds its URI and may ask it to unwrap.
tenant key (L2)
    One a tenant and region, made by the Core; rests sealed under the seal key and, around that, the root.
service key (L3)
    One a service, versioned, under the tenant key; wraps data keys and never leaves the Core.
data key (L4)
    What encrypts data: one a record by default, one a subject where a subject is named. Made by the Gateway.
seal key
    The Core's own 32 bytes, beside the vault. Neither it nor the root alone can open a tenant key.
Core
    The vault: holds tenant and service keys, and is the only part that opens a wrapped key.
Gateway
    The factory: runs beside the application, makes data keys, encrypts, asks the Core to open wrapped keys.
service
    One logical domain of a tenant ("payments"); a handle on it encrypts, and opens only its own envelopes.
subject
    One person or thing whose data key has a name, so that shredding it forgets that one alone.
context
    Associated data of the caller: not stored, not secret, and needed again to decrypt.
envelope
    What ``encrypt`` returns: a header, the wrapped data key or its id, a nonce, the ciphertext and a tag.
wrap, unwrap, rewrap
    Encrypt, decrypt or re-encrypt a key under another key.
probe, live, grace, dark
    Whether a tenant's root still says yes. A live tenant's keys may be used; in grace its root does not answer, and
    they may be used to a hard end; a dark tenant's keys are zeroed, and come back with its root's first yes.
kill, restore
    An operator's switch: a killed tenant is dark until it is restored, and its root agrees.
open-lease
    For how long a Gateway may keep a data key that was opened for it, counted from then; none by default.
identity, grant
    Who a caller over the network is, from its certificate; and what it may do with a service, which is nothing until
    an operator grants it.
shred
    Destroy a key, and with it whatever it encrypted, for good.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from .errors import (
    AccessDenied,
    AlreadyExists,
    BackendUnavailable,
    ChannelExpired,
    ConfigurationError,
    CoreUnavailable,
    DecryptError,
    FormatError,
    InternalError,
    InvalidInput,
    KeyDestroyed,
    KeyDisabled,
    KeyNotFound,
    LimitExceeded,
    OpenKCMError,
    RootDenied,
    RootDestroyed,
    RootDisabled,
    RootMisconfigured,
    RootThrottled,
    RootUnavailable,
    SealError,
    SecretMemoryError,
    ServiceNotFound,
    StoreUnavailable,
    TenantDark,
    TenantNotFound,
    Unavailable,
)
from .keys import Change, Event, KeyService, KeyState, Kind, Service, TenantState, Verb

if TYPE_CHECKING:
    from .core import (
        AuditRecord,
        Core,
        Grant,
        Grants,
        Probe,
        RevokedCertificate,
        ServiceKeyStatus,
        ServiceStatus,
        TenantStatus,
    )
    from .crypto import backend_info
    from .gateway import Column, DataKeyPolicy, Gateway, KeyStore, PoolPolicy, ServiceHandle
    from .roots import Root, open_root
    from .rpc.client.admin_client import RemoteAdmin, connect_admin
    from .rpc.client.connect import TLS, connect
    from .rpc.client.remote import RemoteCore

__version__ = "0.1.0"

__all__ = [
    "TLS",
    "AccessDenied",
    "AlreadyExists",
    "AuditRecord",
    "BackendUnavailable",
    "Change",
    "ChannelExpired",
    "Column",
    "ConfigurationError",
    "Core",
    "CoreUnavailable",
    "DataKeyPolicy",
    "DecryptError",
    "Event",
    "FormatError",
    "Gateway",
    "Grant",
    "Grants",
    "InternalError",
    "InvalidInput",
    "KeyDestroyed",
    "KeyDisabled",
    "KeyNotFound",
    "KeyService",
    "KeyState",
    "KeyStore",
    "Kind",
    "LimitExceeded",
    "OpenKCMError",
    "PoolPolicy",
    "Probe",
    "RemoteAdmin",
    "RemoteCore",
    "RevokedCertificate",
    "Root",
    "RootDenied",
    "RootDestroyed",
    "RootDisabled",
    "RootMisconfigured",
    "RootThrottled",
    "RootUnavailable",
    "SealError",
    "SecretMemoryError",
    "Service",
    "ServiceHandle",
    "ServiceKeyStatus",
    "ServiceNotFound",
    "ServiceStatus",
    "StoreUnavailable",
    "TenantDark",
    "TenantNotFound",
    "TenantState",
    "TenantStatus",
    "Unavailable",
    "Verb",
    "__version__",
    "backend_info",
    "connect",
    "connect_admin",
    "open_root",
]

_HOMES: Final = {
    **dict.fromkeys(
        (
            *("AuditRecord", "Core", "Grant", "Grants", "Probe", "RevokedCertificate"),
            *("ServiceKeyStatus", "ServiceStatus", "TenantStatus"),
        ),
        ".core",
    ),
    **dict.fromkeys(
        ("Column", "DataKeyPolicy", "Gateway", "KeyStore", "PoolPolicy", "ServiceHandle"), ".gateway"
    ),
    **dict.fromkeys(("Root", "open_root"), ".roots"),
    **dict.fromkeys(("TLS", "connect"), ".rpc.client.connect"),
    **dict.fromkeys(("RemoteAdmin", "connect_admin"), ".rpc.client.admin_client"),
    "RemoteCore": ".rpc.client.remote",
    "backend_info": ".crypto",
}
"""Where the names live that are imported on first use (PEP 562)."""


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
