# SPDX-License-Identifier: Apache-2.0
"""``openkcm inspect``: any file at all is described or refused, and what is shown carries none of its control bytes."""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections.abc import Iterator

from rich.console import Console
from vault import originals

from openkcm.cli.inspect import describe
from openkcm.errors import FormatError


def seeds() -> Iterator[bytes]:
    stored = [blob for blob, case in originals(stream=False).items() if "opens" in case]
    yield from stored[:2]
    yield next(blob for blob in originals(stream=True) if len(blob) < 1000)
    text = base64.b64encode(stored[0]).decode()
    yield text.encode()
    yield f"a,b\n1,{text}\n".encode()
    yield f'{{"a": 1, "[bold]b": "{text}"}}\n'.encode()
    yield f"[red];\x1b[2J\n1;{text}\n".encode()


def check(data: bytes) -> None:
    with contextlib.suppress(FormatError):
        finding = describe(io.BytesIO(data), "a file")
        json.dumps(finding.document)
        screen = io.StringIO()
        Console(file=screen, width=100, color_system=None).print(finding.table())
        assert all(character.isprintable() or character == "\n" for character in screen.getvalue())
