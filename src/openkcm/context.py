# SPDX-License-Identifier: Apache-2.0
"""The caller's associated data, in its one canonical encoding.

Invariant: two contexts have the same encoding exactly when they mean the same. A tag byte keeps an absent
context, raw bytes and a mapping apart, and every text in a mapping carries its length.

=======  ==========================================================================================
tag      rest
=======  ==========================================================================================
``00``   nothing: no context
``01``   the caller's bytes
``02``   for each pair, sorted by its key's UTF-8 bytes: length (4, big-endian), key, length, value
=======  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeAlias

from .errors import InvalidInput, LimitExceeded
from .limits import MAX_CONTEXT_BYTES

Buffer: TypeAlias = bytes | bytearray | memoryview
Context: TypeAlias = None | Buffer | Mapping[str, str]

ABSENT: Final = b"\x00"
RAW_TAG: Final = b"\x01"
MAPPING_TAG: Final = b"\x02"


def encode_context(context: Context) -> bytes:
    """Encode a context canonically.

    Args:
        context: None, bytes-like, or a mapping of text to text.

    Raises:
        InvalidInput: another type, or text that UTF-8 cannot carry (a lone surrogate).
        LimitExceeded: more than ``limits.MAX_CONTEXT_BYTES`` once encoded.
    """
    if context is None:
        return ABSENT
    if isinstance(context, Mapping):
        encoded = MAPPING_TAG + b"".join(_pairs(context))
    elif isinstance(context, (bytes, bytearray, memoryview)):
        try:
            encoded = RAW_TAG + bytes(context)
        except ValueError:
            raise InvalidInput("a context must not be released") from None
    else:
        raise InvalidInput(
            f"a context is None, bytes or a mapping of text to text, not {type(context).__name__}"
        )
    if len(encoded) > MAX_CONTEXT_BYTES:
        raise LimitExceeded(
            f"the context takes {len(encoded)} bytes; at most {MAX_CONTEXT_BYTES} are allowed"
        )
    return encoded


def _pairs(context: Mapping[str, str]) -> list[bytes]:
    try:
        pairs = sorted((key.encode(), value.encode()) for key, value in context.items())
    except AttributeError:
        raise InvalidInput("a context mapping takes text keys and text values") from None
    except UnicodeEncodeError:
        raise InvalidInput("a context mapping holds text that UTF-8 cannot carry") from None
    if any(type(part) is not bytes for pair in pairs for part in pair):
        raise InvalidInput("a context mapping takes text keys and text values")
    return [len(key).to_bytes(4, "big") + key + len(value).to_bytes(4, "big") + value for key, value in pairs]
