# SPDX-License-Identifier: Apache-2.0
"""The envelope's parser: what it accepts, it serialises to the same bytes; all else is a FormatError."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from vault import originals

from openkcm import envelope
from openkcm.errors import FormatError

ERRORS = (FormatError,)


def seeds() -> Iterator[bytes]:
    yield from originals(stream=False)
    for blob in originals(stream=True):
        yield blob[:200]


def check(data: bytes) -> None:
    with contextlib.suppress(*ERRORS):
        found = envelope.parse(data)
        header = found.header
        assert data.startswith(header)
        assert envelope.parse(memoryview(data)) == found
        assert found.kind.stored == (found.version == 0)
        if found.size is None:
            assert found.kind.stream
        else:
            assert len(header) + 32 + found.size + 16 == len(data)
            # The bytes after the header are not looked at.
            assert envelope.parse(header + bytes(48 + found.size)) == found
