# SPDX-License-Identifier: Apache-2.0
"""`openkcm inspect`: what an envelope says about itself; no key is needed and no vault is opened.

Invariant: everything shown is public, and nothing shown is proof of who made it: only opening is.
"""

from __future__ import annotations

import binascii
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ..errors import FormatError
from .commands import INSIGHT, command

if TYPE_CHECKING:
    from ..envelope import Envelope

HEAD_BYTES: Final = 256
TEXT_BYTES: Final = 1024 * 1024


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "inspect", rich_help_panel=INSIGHT)(inspect)


def inspect(
    what: Annotated[
        str, typer.Argument(metavar="FILE|VALUE", help="A file, a base64 value, or - for standard input.")
    ] = "-",
) -> None:
    """Show what an envelope, an encrypted file or a protected table is. Needs no key."""
    from . import files
    from .output import answer
    from .tables import ENVELOPE_TEXT

    if what != files.STANDARD and not os.path.exists(what) and what.startswith(ENVELOPE_TEXT.decode()):
        finding = _text_finding(what.encode(), "value")
    else:
        with files.reading(what) as source:
            finding = describe(source, what)
    answer(finding.document, finding.table())


@dataclass(slots=True)
class Finding:
    """What was found, as a document for machines and as lines for people."""

    document: dict[str, Any]
    lines: list[tuple[str, str]]

    def table(self) -> Any:
        """The lines as a two-column grid."""
        from rich.table import Table

        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, text in self.lines:
            grid.add_row(name, text)
        return grid


def describe(source: Any, name: str) -> Finding:
    from ..envelope import MAGIC
    from . import files
    from .tables import ENVELOPE_TEXT

    head = source.read(HEAD_BYTES)
    if head[:3] == MAGIC[:3]:
        return _binary_finding(head, _total(source, head, files.size_of(source)))
    head += source.read(TEXT_BYTES - len(head))
    stripped = head.strip()
    if stripped.startswith(ENVELOPE_TEXT) and len(stripped.split()) == 1:
        if len(head) == TEXT_BYTES:
            stripped += source.read().rstrip()
        return _text_finding(stripped, name)
    if ENVELOPE_TEXT in head:
        return _table_finding(head, name)
    raise _unknown(name)


def _unknown(name: str) -> FormatError:
    return FormatError(f"{name} is not an OpenKCM envelope, nor does it begin like a table that holds any")


def _total(source: Any, head: bytes, size: int | None) -> int:
    """The length of the whole input, read to its end if it is a pipe."""
    if size is not None:
        return size
    total = len(head)
    while data := source.read(TEXT_BYTES):
        total += len(data)
    return total


def _text_finding(text: bytes, name: str) -> Finding:
    try:
        blob = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise FormatError(f"{name} begins like the base64 text of an envelope, but is not base64") from None
    return _binary_finding(blob[:HEAD_BYTES], len(blob), "base64 text")


def _binary_finding(head: bytes, total: int, written_as: str = "binary") -> Finding:
    from ..envelope import parse
    from ..limits import COMMITMENT_BYTES, TAG_BYTES

    envelope = parse(head)
    overhead = len(envelope.header)
    if envelope.kind.stream:
        from ..gateway.streams import stream_shape

        segments, size = stream_shape(total - overhead)
    else:
        segments, size = None, total - overhead - COMMITMENT_BYTES - TAG_BYTES
    if size < 0:
        raise FormatError("the envelope is cut short")
    return Finding(
        _document(envelope, total, size, segments, written_as),
        _lines(envelope, total, size, segments, written_as),
    )


def _document(
    envelope: Envelope, total: int, size: int, segments: int | None, written_as: str
) -> dict[str, Any]:
    stored = envelope.kind.stored
    return {
        "format": 1,
        "written_as": written_as,
        "kind": envelope.kind.name.lower(),
        "stream": envelope.kind.stream,
        "suite": "AES-256-GCM with key commitment",
        "service_id": envelope.service_id.hex(),
        "service_key_version": None if stored else envelope.version,
        "data_key_id": envelope.data_key.hex() if stored else None,
        "wrapped_data_key": None if stored else envelope.data_key.hex(),
        "nonce": envelope.nonce.hex(),
        "segments": segments,
        "plaintext_bytes": size,
        "envelope_bytes": total,
    }


def _lines(
    envelope: Envelope, total: int, size: int, segments: int | None, written_as: str
) -> list[tuple[str, str]]:
    what = "an encrypted file (stream)" if envelope.kind.stream else "an encrypted record"
    lines = [
        ("what", f"[bold]{what}[/], OpenKCM envelope version 1, {written_as}"),
        ("cipher", "AES-256-GCM with key commitment"),
        ("service id", envelope.service_id.hex()),
    ]
    if envelope.kind.stored:
        lines.append(("data key", f"a subject's, in the key store: id [cyan]{envelope.data_key.hex()}[/]"))
    else:
        lines.append(("data key", "its own, inside, wrapped by XAES-256-GCM"))
        lines.append(("service key", f"version {envelope.version}"))
    lines.append(("nonce", envelope.nonce.hex()))
    if segments is not None:
        lines.append(("segments", f"{segments:,} of up to 64 KiB"))
    lines.append(("plaintext", f"{size:,} bytes"))
    lines.append(("envelope", f"{total:,} bytes, {total - size:,} of them overhead"))
    return lines


def _table_finding(head: bytes, name: str) -> Finding:
    """What a table's first rows say about its columns."""
    import csv

    from .output import plain

    lines = head.split(b"\n")
    if len(lines) > 1:
        lines.pop()
    try:
        kind, columns = _json_columns(lines) if lines[0].lstrip()[:1] == b"{" else _csv_columns(lines)
    except (ValueError, csv.Error):
        columns = {}
    if not columns:
        raise _unknown(name)
    document = {"format": 1, "written_as": kind, "kind": "table", "columns": columns}
    shown = [("what", f"[bold]a protected table[/], {kind}; by its first {max(len(lines) - 1, 1):,} rows")]
    for column, about in columns.items():
        keys = "under a subject's key" if about["stored"] else "each under a key of its own"
        if about["stored"] and about["inline"]:
            keys = "under a subject's key, some under a key of their own"
        ids = ", ".join(about["service_ids"])
        shown.append((plain(column), f"protected, {keys}; service id {ids}"))
    return Finding(document, shown)


def _csv_columns(lines: list[bytes]) -> tuple[str, dict[str, Any]]:
    import csv

    from .csv_table import DELIMITERS

    rows = [line.decode("latin-1") for line in lines]
    delimiter = max(DELIMITERS, key=rows[0].count)
    table = list(csv.reader(rows, delimiter=delimiter))
    values = ((name, row[i]) for row in table[1:] for i, name in enumerate(table[0]) if i < len(row))
    return "CSV", _columns(values)


def _json_columns(lines: list[bytes]) -> tuple[str, dict[str, Any]]:
    import json

    objects = (json.loads(line) for line in lines if line.strip())
    values = ((name, value) for row in objects for name, value in row.items() if isinstance(value, str))
    return "NDJSON", _columns(values)


def _columns(values: Any) -> dict[str, Any]:
    from ..envelope import parse

    columns: dict[str, Any] = {}
    for name, value in values:
        if not value.startswith("T0tDA"):
            continue
        try:
            envelope = parse(binascii.a2b_base64(value, strict_mode=True))
        except (ValueError, FormatError):
            continue
        about = columns.setdefault(name, {"stored": 0, "inline": 0, "service_ids": []})
        about["stored" if envelope.kind.stored else "inline"] += 1
        if envelope.service_id.hex() not in about["service_ids"]:
            about["service_ids"].append(envelope.service_id.hex())
    return columns
