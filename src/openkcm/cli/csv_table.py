# SPDX-License-Identifier: Apache-2.0
"""Protecting columns of a CSV file (RFC 4180), a block of rows at a time.

Invariant: what is not in a protected column is written as it was read, and a value written needs no guess to
be read back: it is quoted exactly when it holds the delimiter, a quote or a line end. A file in canonical
form (quotes only where needed, one kind of line end) comes back byte for byte.

Everything is bytes: the delimiter, quote and line ends are ASCII, which no byte of a longer UTF-8 sequence
can be, so a file in UTF-8 or in any single-byte encoding passes unharmed; what csv.reader needs as text is
decoded as Latin-1, which maps each byte to one character and back. Only a subject must be UTF-8.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
from binascii import b2a_base64
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, Final, Protocol

from ..crypto import FlatRows, split_rows
from ..errors import FormatError, InvalidInput
from .files import behind
from .tables import (
    ColumnCipher,
    Columns,
    Counts,
    Part,
    RowContext,
    check_subjects,
    holds_envelopes,
    missing_column,
    none_named,
    nothing_protected,
)

DELIMITERS: Final = (",", ";", "\t", "|")
"""What separates fields; none of them can be part of base64 text."""

ROWS_PER_BLOCK: Final = 4096
FIRST_BLOCK_BYTES: Final = 64 * 1024
MAX_BLOCK_BYTES: Final = 8 * 1024 * 1024

MAX_FIELD_BYTES: Final = 64 * 1024 * 1024
"""A field that csv.reader may gather before it gives up on a quote that is never closed."""


class Block(Protocol):
    """Some rows of a file."""

    lines: Sequence[int]

    def column(self, index: int) -> list[bytes]:
        """The values of one column, as they were read."""

    def replace(self, index: int, values: Sequence[bytes]) -> None:
        """Set the values of one column."""

    def replace_encoded(self, index: int, values: Sequence[bytes]) -> None:
        """Set the values of one column to the base64 text of these, which never needs a quote."""

    def dump(self) -> bytes:
        """The rows as they are written, each with its line end."""


class FlatBlock:
    """Rows without any quote, found and written by the backend in one call a block."""

    def __init__(self, rows: FlatRows, delimiter: bytes, first_line: int) -> None:
        self._rows = rows
        self._delimiter = delimiter
        self.lines: Sequence[int] = range(first_line, first_line + rows.count)

    @classmethod
    def parse(
        cls, data: bytes, columns: int, delimiter: bytes, end: bytes, first_line: int
    ) -> FlatBlock | None:
        """Split whole lines; None if they need csv.reader (quotes, odd line ends, blank or ragged rows)."""
        rows = split_rows(data, columns, delimiter, end)
        return None if rows is None else cls(rows, delimiter, first_line)

    def column(self, index: int) -> list[bytes]:
        return self._rows.column(index)

    def replace(self, index: int, values: Sequence[bytes]) -> None:
        self._rows.replace(index, quote_values(values, self._delimiter))

    def replace_encoded(self, index: int, values: Sequence[bytes]) -> None:
        self._rows.replace(index, values, True)

    def dump(self) -> bytes:
        return self._rows.dump()


class RowBlock:
    """Rows as csv.reader gives them, as Latin-1 text; a blank line is an empty row and stays one."""

    def __init__(self, rows: list[list[str]], lines: list[int], delimiter: bytes, end: bytes) -> None:
        self._rows = rows
        self._filled = [row for row in rows if row]
        self._delimiter = delimiter.decode()
        self._end = end.decode()
        self.lines: Sequence[int] = [line for row, line in zip(rows, lines, strict=True) if row]

    def column(self, index: int) -> list[bytes]:
        return [row[index].encode("latin-1") for row in self._filled]

    def replace(self, index: int, values: Sequence[bytes]) -> None:
        for row, value in zip(self._filled, values, strict=True):
            row[index] = value.decode("latin-1")

    def replace_encoded(self, index: int, values: Sequence[bytes]) -> None:
        self.replace(index, [b2a_base64(value, newline=False) for value in values])

    def dump(self) -> bytes:
        return "".join(self._join(row) + self._end for row in self._rows).encode("latin-1")

    def _join(self, row: list[str]) -> str:
        joined = self._delimiter.join(row)
        if joined.count(self._delimiter) >= len(row) or '"' in joined or "\n" in joined or "\r" in joined:
            return self._delimiter.join([_quoted(field, self._delimiter) for field in row])
        return joined if joined or not row else '""'


def _quoted(field: str, delimiter: str) -> str:
    if '"' in field:
        return '"' + field.replace('"', '""') + '"'
    return f'"{field}"' if delimiter in field or "\n" in field or "\r" in field else field


def quote_values(values: Sequence[bytes], delimiter: bytes) -> Sequence[bytes]:
    """Quote the values that need it; the same object comes back when none does."""
    special = (b'"', delimiter, b"\n", b"\r")
    joined = b" ".join(values)
    if not any(mark in joined for mark in special):
        return values
    quoted = []
    for value in values:
        if any(mark in value for mark in special):
            value = b'"' + value.replace(b'"', b'""') + b'"'
        quoted.append(value)
    return quoted


class CsvSource:
    """Reads the header and then blocks of whole rows, and remembers how the file looked."""

    def __init__(self, stream: BinaryIO, delimiter: str) -> None:
        if delimiter not in DELIMITERS:
            raise InvalidInput("a delimiter is one of: comma, semicolon, tab, vertical bar")
        csv.field_size_limit(MAX_FIELD_BYTES)
        self._stream = stream
        self._text_delimiter = delimiter
        self._delimiter = delimiter.encode()
        self._line = 1
        self._block_bytes = FIRST_BLOCK_BYTES
        self._open_end = False
        self.read = 0
        self.end = b"\n"
        self.raw_header, self.header = self._read_header()

    def _read_header(self) -> tuple[bytes, list[str]]:
        first = self._stream.readline()
        if first[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise FormatError("the file is in UTF-16; save it as UTF-8 first")
        raw = [first]
        bom = codecs.BOM_UTF8 if first.startswith(codecs.BOM_UTF8) else b""
        rows = self._parse([first.removeprefix(bom)], raw, 1)
        header = [name.encode("latin-1").decode("utf-8", "replace") for name in next(rows, ([], 0))[0]]
        if not any(header):
            raise FormatError("the file has no header: its first line must name the columns")
        whole = self.close(b"".join(raw))
        self.end = b"\r\n" if whole.endswith(b"\r\n") else b"\n"
        self._line += whole.count(b"\n")
        self.read = len(whole)
        return whole, header

    def index(self, name: str) -> int:
        """Return the position of a column.

        Raises:
            InvalidInput: there is none of that name, or more than one.
        """
        found = self.header.count(name)
        if found == 1:
            return self.header.index(name)
        if found:
            raise InvalidInput(f"the header names column {name!r} {found} times; rename one of them")
        other = [d for d in DELIMITERS if d in self.header[0]] if len(self.header) == 1 else []
        hint = f" (is the file separated by {other[0]!r}? then use --delimiter)" if other else ""
        raise missing_column(name, self.header, hint)

    def blocks(self) -> Iterator[Block]:
        """Yield the rows, about ``ROWS_PER_BLOCK`` at a time.

        Raises:
            FormatError: a row that is not CSV, or has more or fewer fields than the header.
        """
        while data := self._stream.read(self._block_bytes):
            self.read += len(data)
            if not data.endswith(b"\n"):
                rest = self._stream.readline()
                self.read += len(rest)
                data += rest
            if not data.endswith(b"\n"):
                self._open_end = True
                data += self.end
            lines = data.count(b"\n")
            self._block_bytes = min(
                max(ROWS_PER_BLOCK * len(data) // lines, FIRST_BLOCK_BYTES), MAX_BLOCK_BYTES
            )
            block: Block | None = FlatBlock.parse(
                data, len(self.header), self._delimiter, self.end, self._line
            )
            yield self._row_block(data) if block is None else block
            self._line += lines

    def close(self, written: bytes) -> bytes:
        """Take the line end off the last block if the file had none."""
        return written.removesuffix(self.end) if self._open_end else written

    def _row_block(self, data: bytes) -> RowBlock:
        rows, lines = [], []
        more: list[bytes] = []
        whole_lines = [line + b"\n" for line in data[:-1].split(b"\n")]
        for row, line in self._parse(whole_lines, more, self._line):
            if row and len(row) != len(self.header):
                raise FormatError(f"line {line}: {len(row)} fields where the header has {len(self.header)}")
            rows.append(row)
            lines.append(line)
        self._line += sum(line.count(b"\n") for line in more)
        return RowBlock(rows, lines, self._delimiter, self.end)

    def _parse(
        self, lines: list[bytes], more: list[bytes], first_line: int
    ) -> Iterator[tuple[list[str], int]]:
        """Parse the rows that begin in ``lines``, reading on where the last one does not end there."""
        remaining = len(lines)

        def feed() -> Iterator[str]:
            nonlocal remaining
            for line in lines:
                remaining -= 1
                yield line.decode("latin-1")
            while line := self._stream.readline():
                self.read += len(line)
                if not line.endswith(b"\n"):
                    self._open_end = True
                    line += self.end
                more.append(line)
                yield line.decode("latin-1")

        reader = csv.reader(feed(), delimiter=self._text_delimiter, strict=True)
        while remaining:
            line = first_line + reader.line_num
            try:
                yield next(reader), line
            except StopIteration:
                return
            except csv.Error as error:
                raise FormatError(f"line {line}: not CSV (RFC 4180): {_reason(error)}") from None


def _reason(error: csv.Error) -> str:
    text = str(error)
    if "unexpected end" in text:
        return "a quoted field is not closed"
    if "new-line" in text:
        return "a carriage return stands alone outside quotes"
    if "larger than" in text:
        return f"a field is over {MAX_FIELD_BYTES // 2**20} MiB; is a quote not closed?"
    return "a quote inside a quoted field is not doubled"


class CsvTable:
    """The CSV form of ``tables.Table``.

    Args:
        cipher: what encrypts and decrypts.
        columns: which columns.
        delimiter: one of ``DELIMITERS``.
        progress: called with the bytes read so far after each block.
    """

    def __init__(
        self,
        cipher: ColumnCipher,
        columns: Columns,
        *,
        delimiter: str = ",",
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._cipher = cipher
        self._columns = columns
        self._delimiter = delimiter
        self._progress = progress

    def protect(self, source: BinaryIO, target: BinaryIO) -> Counts:
        if not self._columns.protected:
            raise none_named()
        return self._copy(source, target, self._protect_block)

    def unprotect(self, source: BinaryIO, target: BinaryIO) -> Counts:
        return self._copy(source, target, self._unprotect_block)

    def _copy(
        self, source: BinaryIO, target: BinaryIO, change: Callable[[Block, dict[str, int]], None]
    ) -> Counts:
        table, counts = CsvSource(source, self._delimiter), self._cipher.counts
        places = {name: table.index(name) for name in self._columns.named}
        with behind(target) as write:
            write(table.raw_header)
            counts.written += len(table.raw_header)
            for block in table.blocks():
                if not self._columns.protected:
                    self._find_protected(block, table)
                    places = {name: table.index(name) for name in self._columns.named}
                change(block, places)
                data = table.close(block.dump())
                write(data)
                counts.rows += len(block.lines)
                counts.written += len(data)
                self._progress(table.read)
        counts.read = table.read
        counts.columns = self._columns.protected
        return counts

    def _find_protected(self, block: Block, table: CsvSource) -> None:
        """Choose the columns that hold envelopes; ``protect`` leaves no value out, so the first rows show."""
        found = [name for i, name in enumerate(table.header) if holds_envelopes(block.column(i)[:100])]
        if not found:
            raise nothing_protected()
        self._columns = dataclasses.replace(self._columns, protected=tuple(found))

    def _protect_block(self, block: Block, places: dict[str, int]) -> None:
        lines, columns = block.lines, self._columns
        rows = self._row_contexts(block, places)
        subjects = None
        if columns.subject is not None:
            subjects = _texts(block.column(places[columns.subject]), lines, columns.subject)
            check_subjects(subjects, lines, columns.subject)
        parts = [Part(n, block.column(places[n]), lines, subjects, rows) for n in columns.protected]
        for name, envelopes in zip(columns.protected, self._cipher.protect(parts), strict=True):
            block.replace_encoded(places[name], envelopes)

    def _unprotect_block(self, block: Block, places: dict[str, int]) -> None:
        rows = self._row_contexts(block, places)
        names = self._columns.protected
        parts = [Part(name, block.column(places[name]), block.lines, None, rows) for name in names]
        for name, values in zip(names, self._cipher.unprotect(parts), strict=True):
            filled = [value or b"" for value in values] if None in values else values
            block.replace(places[name], filled)  # type: ignore[arg-type]

    def _row_contexts(self, block: Block, places: dict[str, int]) -> list[RowContext] | None:
        names = self._columns.context
        if not names:
            return None
        keys = [f"row.{name}" for name in names]
        columns = [_texts(block.column(places[name]), block.lines, name) for name in names]
        return [tuple(zip(keys, values, strict=True)) for values in zip(*columns, strict=True)]


def _texts(values: list[bytes], lines: Sequence[int], column: str) -> list[str]:
    """Decode a whole column as UTF-8 in one go."""
    try:
        texts = b"\n".join(values).decode().split("\n")
        return texts if len(texts) == len(values) else [value.decode() for value in values]
    except UnicodeDecodeError:
        for line, value in zip(lines, values, strict=True):
            try:
                value.decode()
            except UnicodeDecodeError:
                raise FormatError(f"line {line}, column {column!r}: not UTF-8 text") from None
        raise
