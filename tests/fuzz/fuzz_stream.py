# SPDX-License-Identifier: Apache-2.0
"""Decrypting streams, with the keys at hand: what leaves is the start of what went in, and an end is its end."""

from __future__ import annotations

import io
from collections.abc import Iterator

from vault import handle, originals

from golden import CONTEXTS, PLAINTEXTS
from openkcm.errors import DecryptError, FormatError

WHOLE = {blob: PLAINTEXTS[case["opens"]] for blob, case in originals(stream=True).items()}


def seeds() -> Iterator[bytes]:
    yield from (blob for blob in WHOLE if len(blob) < 1000)


def check(data: bytes) -> None:
    for blob in {data, grown(data)}:
        check_stream(blob)


def grown(data: bytes) -> bytes:
    """A long stream with the fuzzer's bytes written over a place of the fuzzer's choice, and cut there if told to."""
    if len(data) < 5:
        return data
    blobs = sorted((blob for blob in WHOLE if len(blob) > 1000), key=len)
    blob = bytearray(blobs[data[0] & 1])
    place = int.from_bytes(data[1:5], "big") % len(blob)
    blob[place : place + len(data) - 5] = data[5:]
    return bytes(blob[:place] if data[0] & 2 else blob)


def check_stream(blob: bytes) -> None:
    target = io.BytesIO()
    try:
        handle().decrypt_stream(io.BytesIO(blob), target, context=CONTEXTS["mapping"])
    except (DecryptError, FormatError):
        assert blob not in WHOLE
        assert any(plaintext.startswith(target.getvalue()) for plaintext in WHOLE.values())
    else:
        assert target.getvalue() == WHOLE[blob]
