# SPDX-License-Identifier: Apache-2.0
"""Wrapping, opening and moving data keys (L4): what a Gateway asks a Core for all day.

Invariant: a service key is used where it lies; a shredded data key is not even tried; and a key that was dropped
between look-up and use is looked up again, so that who is dark is told so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from .. import crypto
from ..crypto import SecretKeys
from ..errors import (
    DecryptError,
    InvalidInput,
    KeyDestroyed,
    LimitExceeded,
    OpenKCMError,
    SecretMemoryError,
    StoreUnavailable,
)
from ..keys import Kind, OpenedKeys, Service, WrappedKeys
from ..limits import MAX_KEYS_PER_CALL, WRAPPED_KEY_BYTES
from .keyring import ServiceKey
from .tombstones import Tombstones
from .vault import OVERTAKEN, Vault

T = TypeVar("T")

_TRIES: Final = 8


class DataKeys:
    """The data keys of every service, seen from the Core."""

    def __init__(self, vault: Vault, tombstones: Tombstones) -> None:
        self._vault = vault
        self._tombstones = tombstones

    def wrap(self, service: Service, keys: SecretKeys, kind: Kind, ids: bytes = b"") -> WrappedKeys:
        """As ``Core.wrap_keys``."""
        if type(kind) is not Kind:
            raise InvalidInput(f"a kind is an openkcm.Kind, not {type(kind).__name__}")

        def wrap(held: ServiceKey) -> WrappedKeys:
            wrapped = crypto.wrap_many(held.key, keys, held.aad(kind), ids)
            return WrappedKeys(kind, held.version, wrapped, ids)

        return self._with_key(service, None, wrap)

    def unwrap(self, service: Service, wrapped: WrappedKeys) -> OpenedKeys:
        """As ``Core.unwrap_keys``."""
        blobs, failures = self._without_shredded(service, wrapped)

        def unwrap(held: ServiceKey) -> tuple[SecretKeys, list[int]]:
            return crypto.unwrap_many(held.key, blobs, held.aad(wrapped.kind), wrapped.ids)

        try:
            keys, failed = self._with_key(service, wrapped.version, unwrap)
        except (DecryptError, KeyDestroyed) as error:
            return crypto.generate_keys(len(wrapped)), _every(wrapped, error, failures), 0.0
        # Looked up after the use: 0 if the tenant was dropped meanwhile.
        return keys, _errors(failed, failures), self._vault.ring.lease(service.service_id)

    def rewrap(
        self, service: Service, wrapped: WrappedKeys
    ) -> tuple[WrappedKeys, Mapping[int, OpenKCMError]]:
        """As ``Core.rewrap_keys``."""
        blobs, failures = self._without_shredded(service, wrapped)

        def rewrap(old: ServiceKey) -> tuple[WrappedKeys, list[int]]:
            new = self._vault.active_key(service)
            moved, failed = crypto.rewrap_many(
                old.key, new.key, blobs, old.aad(wrapped.kind), new.aad(wrapped.kind), wrapped.ids
            )
            return WrappedKeys(wrapped.kind, new.version, moved, wrapped.ids), failed

        try:
            moved, failed = self._with_key(service, wrapped.version, rewrap)
        except (DecryptError, KeyDestroyed) as error:
            nothing = bytes(len(wrapped.wrapped))
            moved = WrappedKeys(wrapped.kind, wrapped.version, nothing, wrapped.ids)
            return moved, _every(wrapped, error, failures)
        return moved, _errors(failed, failures)

    def _with_key(self, service: Service, version: int | None, use: Callable[[ServiceKey], T]) -> T:
        """Run ``use`` with a service key; again if the key was dropped between look-up and use."""
        vault = self._vault
        for _ in range(_TRIES):
            held = vault.active_key(service) if version is None else vault.version_key(service, version)
            try:
                return use(held)
            except SecretMemoryError:
                # Still in place: it is not our key that was wiped, or no memory can be locked.
                if vault.ring.version(service.service_id, held.version) is held:
                    raise
        raise StoreUnavailable(OVERTAKEN)

    def _without_shredded(
        self, service: Service, wrapped: WrappedKeys
    ) -> tuple[bytes, dict[int, OpenKCMError]]:
        """Blank out shredded keys, so that they are not even opened."""
        if len(wrapped) > MAX_KEYS_PER_CALL:
            raise LimitExceeded(f"{len(wrapped)} keys in one call; at most {MAX_KEYS_PER_CALL} are allowed")
        if not wrapped.kind.stored:
            return wrapped.wrapped, {}
        gone = self._tombstones.find(service, wrapped.ids)
        if not gone:
            return wrapped.wrapped, {}
        blobs = bytearray(wrapped.wrapped)
        failures: dict[int, OpenKCMError] = {}
        for at in gone:
            blobs[at * WRAPPED_KEY_BYTES : (at + 1) * WRAPPED_KEY_BYTES] = bytes(WRAPPED_KEY_BYTES)
            failures[at] = KeyDestroyed("this data key was shredded; what it encrypted cannot be read again")
        return bytes(blobs), failures


def _every(
    wrapped: WrappedKeys, error: OpenKCMError, known: dict[int, OpenKCMError]
) -> Mapping[int, OpenKCMError]:
    return {at: known.get(at) or error for at in range(len(wrapped))}


def _errors(failed: list[int], known: dict[int, OpenKCMError]) -> Mapping[int, OpenKCMError]:
    return {at: known.get(at) or DecryptError() for at in failed}
