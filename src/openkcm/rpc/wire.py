# SPDX-License-Identifier: Apache-2.0
"""Between the vocabulary and the messages of ``keys.proto``; both ends use it.

Invariant: an error crosses as its code and a message that was written for callers; what may name a path, an address or
a setting of the Core's machine crosses as its class alone. What a peer sends is checked here before it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Final, TypeVar

from .. import errors
from ..errors import (
    AccessDenied,
    ConfigurationError,
    DecryptError,
    FormatError,
    InternalError,
    InvalidInput,
    OpenKCMError,
    SecretMemoryError,
    TenantDark,
    Unavailable,
)
from ..keys import Kind, WrappedKeys, check_name
from ..limits import KEY_ID_BYTES, MAX_KEYS_PER_CALL, SERVICE_ID_BYTES, WRAPPED_KEY_BYTES
from . import keys_pb2 as pb

T = TypeVar("T")

SERVICE_NAME: Final = "openkcm.v1.Keys"

NONCE_BYTES: Final = 16
"""What makes each unwrap's answer its own."""

FAILURE_KEY: Final = "openkcm-failure-bin"
"""The trailing metadata that carries a Failure."""

MAX_MESSAGE_BYTES: Final = MAX_KEYS_PER_CALL * (WRAPPED_KEY_BYTES + KEY_ID_BYTES) + 65_536
"""The largest message there is: a full batch of stored keys, its names and framing."""

REFUSED: Final = "this identity may not do that here"
"""Whatever exists or does not: who may not ask is told nothing else."""


CLASSES: Final[Mapping[str, type[OpenKCMError]]] = {
    each.code: each
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, OpenKCMError)
}

_PLAIN: Final = {
    ConfigurationError: "the Core is not set up for this; its log says what is wrong",
    SecretMemoryError: "the Core has no secret memory left for this; its log says more",
    InternalError: "the Core failed; its log says more",
    Unavailable: "something that the Core needs does not answer; its log says what",
}
"""What is told of errors whose messages are for the operator of the Core."""


def failure_of(error: BaseException) -> pb.Failure:
    """What a peer is told of an error."""
    known = isinstance(error, OpenKCMError) and error.code in CLASSES
    told: OpenKCMError = error if known else InternalError()  # type: ignore[assignment]  # it is one of ours
    # Roots are the tenant's own, but how the Core reaches them is not the Gateway's business.
    if told.code in ("root_denied", "root_disabled", "root_destroyed"):
        return pb.Failure(code=TenantDark.code, message="the tenant's root refuses", retryable=False)
    if isinstance(told, TenantDark):
        return pb.Failure(code=told.code, message=told.told[:1024], retryable=told.retryable)
    if isinstance(told, AccessDenied):
        return pb.Failure(code=AccessDenied.code, message=REFUSED)
    plain = [text for kind, text in _PLAIN.items() if kind in type(told).__mro__]
    message = plain[0] if plain else str(told)
    return pb.Failure(code=told.code, message=message[:1024], retryable=told.retryable)


def error_of(failure: pb.Failure, index: int | None = None) -> OpenKCMError:
    """The error that a peer told of; an unknown code is our own bug or a newer Core's."""
    kind = CLASSES.get(failure.code, InternalError)
    if kind is DecryptError:
        return DecryptError(index=index)
    return kind(failure.message or None, index=index, retryable=failure.retryable)


def pack_failures(failures: Mapping[int, OpenKCMError]) -> list[pb.PositionFailure]:
    """One message for all positions that failed alike."""
    alike: dict[tuple[str, str], pb.PositionFailure] = {}
    for at, error in failures.items():
        place = (error.code, str(error))
        known = alike.get(place)
        if known is None:
            known = alike[place] = pb.PositionFailure(failure=failure_of(error))
        known.positions.append(at)
    return list(alike.values())


def unpack_failures(packed: Iterable[pb.PositionFailure], count: int) -> dict[int, OpenKCMError]:
    """The error of each position.

    Raises:
        FormatError: a position outside the batch.
    """
    failures: dict[int, OpenKCMError] = {}
    for each in packed:
        for at in each.positions:
            if at >= count:
                raise FormatError("the Core's answer names a position outside the batch")
            failures[at] = error_of(each.failure)
    return failures


def parse(parser: Callable[[bytes], T], data: bytes) -> T:
    """Parse a message; FormatError where it is none."""
    from google.protobuf.message import DecodeError

    try:
        return parser(data)
    except DecodeError:
        raise FormatError("not a well-formed message of this protocol") from None


def check_service(name: pb.ServiceName) -> pb.ServiceName:
    """Check the parts of a service's name."""
    check_name(name.tenant, "tenant")
    check_name(name.service, "service")
    if len(name.service_id) != SERVICE_ID_BYTES:
        raise InvalidInput(f"a service id has {SERVICE_ID_BYTES} bytes")
    return name


def kind_of(number: int) -> Kind:
    """Check a kind of envelope."""
    try:
        return Kind(number)
    except ValueError:
        raise InvalidInput("no such kind of data key") from None


def wrapped_of(kind: int, version: int, wrapped: bytes, ids: bytes) -> WrappedKeys:
    """Check packed wrapped keys."""
    if not 1 <= version < 2**32:
        raise InvalidInput("a service key version is 1 to 2**32 - 1")
    return WrappedKeys(kind_of(kind), version, wrapped, ids)


_BOUND: Final = struct.Struct(">4sB12sIII")


def wrap_bound(session: bytes, service_id: bytes, kind: int, ids: bytes) -> tuple[bytes, ...]:
    """The associated data of data keys on their way to be wrapped: for which service, kind and ids."""
    return _BOUND.pack(b"wrap", kind, service_id, 0, 0, len(ids)), session, ids


def unwrap_bound(session: bytes, nonce: bytes, service_id: bytes, wrapped: WrappedKeys) -> tuple[bytes, ...]:
    """The associated data of opened data keys on their way back: the answer to this very question."""
    sizes = len(wrapped.wrapped), len(wrapped.ids)
    head = _BOUND.pack(b"open", wrapped.kind, service_id, wrapped.version, *sizes)
    return head, session, nonce, wrapped.wrapped, wrapped.ids
