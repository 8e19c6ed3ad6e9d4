# SPDX-License-Identifier: Apache-2.0
"""The context's encoding: a strict decoder, written from its description alone, gives the same context back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from openkcm.context import encode_context
from openkcm.errors import InvalidInput, LimitExceeded


def seeds() -> Iterator[bytes]:
    yield b"\x00"
    yield b"\x01raw"
    yield b"\x02table\x00cards\x00row\x007"
    yield "\x02ü\x00\x00\x00é".encode()
    yield b"\x02\x00\x00\xed\xa0\x80\x00x"


def check(data: bytes) -> None:
    context = context_of(data)
    try:
        encoded = encode_context(context)
    except InvalidInput:
        assert isinstance(context, Mapping) and not all(
            utf8(part) for pair in context.items() for part in pair
        )
    except LimitExceeded:
        assert len(data) > 30_000
    else:
        assert decode(encoded) == context
        if isinstance(context, dict):
            assert encode_context(dict(reversed(context.items()))) == encoded


def context_of(data: bytes) -> None | bytes | dict[str, str]:
    """A mapping of texts, which may hold surrogates; or the bytes; or nothing."""
    tag, rest = data[:1], data[1:]
    if tag != b"\x02":
        return rest if tag == b"\x01" else None
    try:
        texts = rest.decode("utf-8", "surrogatepass").split("\0")
    except UnicodeDecodeError:
        texts = rest.decode("latin-1").split("\0")
    return dict(zip(texts[::2], texts[1::2], strict=False))


def utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def decode(encoded: bytes) -> None | bytes | dict[str, str]:
    if encoded == b"\x00":
        return None
    if encoded[:1] == b"\x01":
        return encoded[1:]
    assert encoded[:1] == b"\x02"
    parts, at = [], 1
    while at < len(encoded):
        size = int.from_bytes(encoded[at : at + 4], "big")
        assert at + 4 + size <= len(encoded)
        parts.append(encoded[at + 4 : at + 4 + size])
        at += 4 + size
    assert len(parts) % 2 == 0
    keys = parts[::2]
    assert keys == sorted(set(keys))
    return {key.decode(): value.decode() for key, value in zip(keys, parts[1::2], strict=True)}
