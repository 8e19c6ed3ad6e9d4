# SPDX-License-Identifier: Apache-2.0
"""What a root of trust is, and how a URI finds its provider.

Invariant: a provider binds the context it is given to what it wraps, or the sealed plaintext carries it; none
drops it. What it wraps is sealed under the Core's seal key already, so a provider never sees a tenant key.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Final, Protocol, cast, runtime_checkable

from ..errors import RootMisconfigured

ENTRY_POINTS: Final = "openkcm.roots"
"""Third parties add a provider as an entry point of this group: scheme -> callable(uri, *, create) -> Root."""

_BUILT_IN: Final = {
    "aws-kms": ".aws:open_aws",
    "azure-kms": ".azure:open_azure",
    "bao-transit": ".bao:open_bao",
    "gcp-kms": ".gcp:open_gcp",
    "local": ".local:open_local",
    "pkcs11": ".pkcs11:open_pkcs11",
}
_SCHEME: Final = re.compile(r"([a-z][a-z0-9+.-]*):", re.ASCII)


CONNECT_SECONDS: Final = 2.0
"""How long a provider may take to accept a connection."""

ANSWER_SECONDS: Final = 3.0
"""How long a provider may take to answer one request; then it counts as unreachable."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a customer must allow so that their root key can be used, in the provider's own form.

    ``form`` names what ``text`` is ("key policy statement", "role assignment"), ``permissions`` are the single
    permissions in the provider's words, ``identity`` is who they are given to, None where there is no such thing.
    """

    form: str
    text: str
    permissions: tuple[str, ...]
    identity: str | None


@runtime_checkable
class Grantable(Protocol):
    """A root that knows what its customer must allow; an ability beyond ``Root``."""

    def grant(self, identity: str | None = None) -> Grant:
        """Say what to allow, and to whom; ``identity`` in the place of the one that is found by asking.

        Raises:
            RootMisconfigured: no identity was given and none could be found.
        """


@runtime_checkable
class Switchable(Protocol):
    """A root that can play its customer: switch the key off and on again; an ability beyond ``Root``."""

    def switch_off(self) -> None:
        """Make the root refuse from now on; idempotent."""

    def switch_on(self) -> None:
        """Take ``switch_off`` back; idempotent."""


@runtime_checkable
class Root(Protocol):
    """A customer's root key: L1.

    ``uri`` holds no secret. ``development`` marks a root that must not guard real data.

    A root makes one attempt a call, within ``CONNECT_SECONDS`` and ``ANSWER_SECONDS``, and is safe for threads and in
    forked children. Retries are the Core's: an SDK's own are switched off.
    """

    uri: str
    development: bool

    def wrap(self, sealed: bytes, context: Mapping[str, str]) -> bytes:
        """Encrypt ``sealed`` (72 bytes of ciphertext) and bind the context.

        Raises:
            RootUnavailable (RootThrottled), RootDisabled, RootDenied, RootDestroyed, RootMisconfigured.
        """

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        """Return what ``wrap`` was given.

        Raises:
            DecryptError: not this root's ciphertext, altered, or bound to another context.
            RootUnavailable (RootThrottled), RootDisabled, RootDenied, RootDestroyed, RootMisconfigured.
        """

    def warnings(self) -> list[str]:
        """What is weak about this root, in words for an operator."""

    def close(self) -> None:
        """Let go of sessions and files."""


def open_root(uri: str, *, create: bool = False) -> Root:
    """Find a root by its URI; no key is used yet.

    Args:
        uri: for example ``pkcs11:token=...;object=...`` or ``local:PATH``.
        create: make the key where the provider can (``local:`` only).

    Raises:
        RootMisconfigured: an unknown scheme, a malformed URI, or a provider that is not installed.
    """
    match = _SCHEME.match(str(uri))
    if match is None:
        raise RootMisconfigured("a root is a URI such as pkcs11:token=...;object=... or local:PATH")
    return _provider(match[1])(uri, create=create)


def _provider(scheme: str) -> Callable[..., Root]:
    if scheme in _BUILT_IN:
        module, name = _BUILT_IN[scheme].split(":")
        return cast("Callable[..., Root]", getattr(importlib.import_module(module, __package__), name))
    for point in entry_points(group=ENTRY_POINTS, name=scheme):
        return cast("Callable[..., Root]", point.load())
    known = ", ".join(f"{name}:" for name in sorted(_BUILT_IN))
    raise RootMisconfigured(f"no provider for {scheme}: roots is installed; built in are {known}")
