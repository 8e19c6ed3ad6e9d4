# SPDX-License-Identifier: Apache-2.0
"""The names of things: tenants, services, kinds and states of keys, and what a Core does for a Gateway.

Invariant: a name that passed here is safe in a file name, a log line, a URI and an associated-data field.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias

from .errors import InvalidInput, LimitExceeded, OpenKCMError
from .limits import KEY_ID_BYTES, MAX_NAME_BYTES, MAX_SUBJECT_BYTES, WRAPPED_KEY_BYTES

if TYPE_CHECKING:
    from .crypto import SecretKeys

_NAME: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME_BYTES - 1}}}\Z", re.ASCII)


class Kind(enum.IntEnum):
    """What an envelope holds: where its data key is, and whether it is a record or a stream."""

    INLINE = 1
    STORED = 2
    INLINE_STREAM = 3
    STORED_STREAM = 4

    @property
    def stored(self) -> bool:
        """Whether the data key is in a key store, named by its id, rather than in the envelope."""
        return self in (Kind.STORED, Kind.STORED_STREAM)

    @property
    def stream(self) -> bool:
        """Whether the payload is a sequence of segments."""
        return self in (Kind.INLINE_STREAM, Kind.STORED_STREAM)

    @property
    def wrap_kind(self) -> Kind:
        """The kind its data key is wrapped as: a stored key serves records and streams alike."""
        return Kind.STORED if self.stored else self


class KeyState(enum.StrEnum):
    """States of a key version (NIST SP 800-57 part 1, section 7)."""

    PRE_ACTIVE = "pre-active"
    ACTIVE = "active"
    DEACTIVATED = "deactivated"
    COMPROMISED = "compromised"
    DESTROYED = "destroyed"


class TenantState(enum.StrEnum):
    """Whether a tenant's keys may be used."""

    LIVE = "live"
    GRACE = "grace"
    DARK = "dark"


class Verb(enum.StrEnum):
    """What an identity may be granted. None includes another: who may only administer can neither wrap nor unwrap."""

    WRAP = "wrap"
    UNWRAP = "unwrap"
    SHRED = "shred"
    ADMINISTER = "administer"


EVERY: Final = "*"
"""In a grant, every tenant or every service; no name is spelt so."""


def check_name(value: object, what: str) -> str:
    """Return ``value`` if it is a usable tenant, service or region name.

    Raises:
        InvalidInput: not text, empty, over 128 characters, or outside ``A-Z a-z 0-9 . _ -``.
    """
    if not isinstance(value, str):
        raise InvalidInput(f"a {what} name is text, not {type(value).__name__}")
    if not _NAME.match(value):
        raise InvalidInput(
            f"a {what} name has 1 to {MAX_NAME_BYTES} characters of A-Z a-z 0-9 . _ - and starts with a "
            "letter or digit"
        )
    return value


def check_subject(value: object) -> str:
    """Return ``value`` if it can name a subject.

    Raises:
        InvalidInput: not text, empty, or text that UTF-8 cannot carry.
        LimitExceeded: over ``limits.MAX_SUBJECT_BYTES`` in UTF-8.
    """
    if not isinstance(value, str):
        raise InvalidInput(f"a subject is text, not {type(value).__name__}")
    if not value:
        raise InvalidInput("a subject must not be empty")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:
        raise InvalidInput("a subject must be text that UTF-8 can carry") from None
    if size > MAX_SUBJECT_BYTES:
        raise LimitExceeded(f"a subject takes at most {MAX_SUBJECT_BYTES} bytes of UTF-8, not {size}")
    return value


@dataclass(frozen=True, slots=True)
class Service:
    """One logical domain of a tenant in a region, as a Gateway needs to know it; nothing in it is secret."""

    tenant: str
    region: str
    name: str
    service_id: bytes


@dataclass(frozen=True, slots=True)
class WrappedKeys:
    """Packed wrapped data keys of one service: n x 72 bytes, all under one service key version.

    ``ids`` holds n x 16 bytes for stored keys and nothing for inline ones.
    """

    kind: Kind
    version: int
    wrapped: bytes
    ids: bytes = b""

    def __post_init__(self) -> None:
        count, rest = divmod(len(self.wrapped), WRAPPED_KEY_BYTES)
        if not count:
            raise InvalidInput("there is no wrapped key")
        if rest or len(self.ids) != (count * KEY_ID_BYTES if self.kind.stored else 0):
            raise InvalidInput("wrapped keys and their ids do not have matching lengths")

    def __len__(self) -> int:
        return len(self.wrapped) // WRAPPED_KEY_BYTES


class Change(enum.StrEnum):
    """What a Core tells its Gateways."""

    DARK = "dark"
    LIVE = "live"
    ROTATED = "rotated"
    SHREDDED = "shredded"


@dataclass(frozen=True, slots=True)
class Event:
    """A change that a Gateway must act on before it uses the tenant's keys again."""

    change: Change
    tenant: str
    service_id: bytes = b""
    key_ids: tuple[bytes, ...] = ()


OpenedKeys: TypeAlias = "tuple[SecretKeys, Mapping[int, OpenKCMError], float]"
"""Data keys that a Core opened; the error of each position that did not open; and the open-lease: for how many seconds,
from before the call, the keys may be kept open, 0 for not at all. A plain tuple: one is made for every strict decrypt.
"""


class KeyService(Protocol):
    """What a Gateway needs of a Core, embedded or remote."""

    @property
    def far(self) -> bool:
        """Whether its calls cross a network: then a Gateway fetches in advance, and keeps what it cannot deliver."""

    def find_service(self, tenant: str, name: str) -> Service:
        """Look a service up; raises TenantNotFound or ServiceNotFound."""

    def wrap_keys(self, service: Service, keys: SecretKeys, kind: Kind, ids: bytes = b"") -> WrappedKeys:
        """Wrap data keys under the service's active key."""

    def unwrap_keys(self, service: Service, wrapped: WrappedKeys) -> OpenedKeys:
        """Open wrapped data keys, and say how long they may be kept."""

    def lease(self, service: Service) -> float:
        """For how many seconds from its opening a kept data key may be used now; 0 for no longer. Raises TenantDark."""

    def rewrap_keys(
        self, service: Service, wrapped: WrappedKeys
    ) -> tuple[WrappedKeys, Mapping[int, OpenKCMError]]:
        """Move wrapped data keys under the active service key without their leaving the Core."""

    def shred_keys(self, service: Service, ids: bytes) -> None:
        """Record stored data keys (n x 16 bytes of ids) as destroyed, for good."""

    def shredded(self, service: Service, ids: bytes) -> frozenset[bytes]:
        """Return those of the ids that were shredded."""

    def watch(self, listener: Callable[[Event], None]) -> Callable[[], None]:
        """Call ``listener`` on every change until the returned function is called."""


class FarKeyService(KeyService, Protocol):
    """What a Gateway needs of a Core whose ``far`` is true besides."""

    def in_touch(self, opened: float) -> bool:
        """Whether keys that were asked for at a moment of ``awake_clock`` and opened may still be used now.

        They may while a kill would be told of, and for so short a time after that moment that it is as good.
        """
