# SPDX-License-Identifier: Apache-2.0
"""Protecting fields of newline-delimited JSON, line by line.

Invariant: only the text of a chosen value changes. Everything else on the line (order, spacing, how a number
is spelled) stays as it was, because values are found by their place in the text and never written anew. What
is encrypted is the value's JSON text, so it comes back with its type: ``5``, ``5.0`` and ``"5"`` differ.

A ``null`` and an absent field have no value to protect and stay as they are.
"""

from __future__ import annotations

import dataclasses
import json
import re
from binascii import b2a_base64
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Final

from ..errors import FormatError, InvalidInput
from .tables import (
    ENVELOPE_TEXT,
    SHREDDED_TEXT,
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

LINES_PER_BLOCK: Final = 1024
BLOCK_BYTES: Final = 4 * 1024 * 1024
_SPACE: Final = re.compile(r"[ \t\r]*")
_COLON: Final = r"[ \t\r]*:[ \t\r]*"
_SCALAR: Final = re.compile(r"[^,} \t\r]+")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# As floats, numbers of any length parse in linear time; their text is what is kept.
_PAIRS: Final = json.JSONDecoder(parse_int=float, parse_constant=_refuse_constant)
_scan: Final[Callable[[str, int], tuple[Any, int]]] = _PAIRS.scan_once  # type: ignore[attr-defined]


@dataclasses.dataclass(slots=True)
class Field:
    """A field of a line: its value, and where the value's text is. A number's value is not kept exactly."""

    value: Any
    start: int
    end: int


class Line:
    """One object, and the new texts of some of its values."""

    __slots__ = ("_edits", "fields", "number", "text")

    def __init__(self, text: str, number: int, fields: dict[str, Field]) -> None:
        self.text = text
        self.number = number
        self.fields = fields
        self._edits: list[tuple[int, int, str]] = []

    def raw(self, name: str) -> str:
        """The JSON text of a value, as written."""
        field = self.fields[name]
        return self.text[field.start : field.end]

    def edit(self, name: str, text: str) -> None:
        """Put another text in a value's place."""
        field = self.fields[name]
        self._edits.append((field.start, field.end, text))

    def dump(self) -> str:
        """The line with its edits."""
        parts: list[str] = []
        place = 0
        for start, end, text in sorted(self._edits):
            parts += (self.text[place:start], text)
            place = end
        return "".join((*parts, self.text[place:]))

    def plain(self, name: str) -> str:
        """A value as a subject or as part of a context: a text without its quotes, and "" for none.

        Raises:
            InvalidInput: an array or an object.
        """
        field = self.fields.get(name)
        if field is None or field.value is None:
            return ""
        if isinstance(field.value, (dict, list)):
            raise InvalidInput(
                f"line {self.number}, column {name!r}: a subject or context is a text, number or truth value"
            )
        return field.value if isinstance(field.value, str) else self.raw(name)


class FieldFinder:
    """Finds where the values of some fields of an object are.

    ``names`` collects the fields seen, and ``missing`` the wanted ones not seen yet, for as long as one is.
    """

    def __init__(self, wanted: Sequence[str]) -> None:
        self._wanted = wanted
        # A name of nothing but these could match from the end of one text to the start of the next.
        self._quick = all(name.strip(" \t\r,:") for name in wanted)
        self._keys = {
            name: re.compile(re.escape(json.dumps(name, ensure_ascii=False)) + _COLON) for name in wanted
        }
        self.names: dict[str, None] = {}
        self.missing = set(wanted)

    def find(self, text: str, number: int) -> dict[str, Field]:
        """Return the wanted fields that a line has.

        Raises:
            FormatError: the line is not one JSON object, or names a field twice.
        """
        # Without a backslash every quote opens or closes a string, and with one brace nothing is nested, so
        # that a quoted name before a colon is a field of this object. Other lines are scanned in full.
        if not self._quick or "\\" in text or "[" in text or text.count("{") != 1:
            everything = scan_object(text, number)
            fields = {name: everything[name] for name in self._wanted if name in everything}
            self._note(everything)
            return fields
        try:
            pairs = _PAIRS.decode(text)
        except (ValueError, RecursionError):
            raise FormatError(f"line {number}: not JSON") from None
        if type(pairs) is not dict:
            raise FormatError(f"line {number}: not a JSON object")
        self._note(pairs)
        return {name: self._locate(text, name, pairs[name], number) for name in self._wanted if name in pairs}

    def _locate(self, text: str, name: str, value: Any, number: int) -> Field:
        pattern = self._keys[name]
        found = pattern.search(text)
        if found is None:
            raise FormatError(f"line {number}: not JSON")
        start = found.end()
        if pattern.search(text, start):
            raise _twice(name, number)
        if isinstance(value, str):
            return Field(value, start, text.index('"', start + 1) + 1)
        scalar = _SCALAR.match(text, start)
        return Field(value, start, start if scalar is None else scalar.end())

    def _note(self, names: Iterable[str]) -> None:
        if self.missing:
            self.names.update(dict.fromkeys(names))
            self.missing.difference_update(names)


def _twice(name: str, number: int) -> FormatError:
    return FormatError(f"line {number}: field {name!r} is there twice")


def scan_object(text: str, number: int) -> dict[str, Field]:
    """Find all fields of the object that a line holds.

    Raises:
        FormatError: the line is not one JSON object, or names a field twice.
    """
    fields: dict[str, Field] = {}
    try:
        place = _skip(text, 0)
        if text[place] != "{":
            raise FormatError(f"line {number}: not a JSON object")
        place = _skip(text, place + 1)
        place = place + 1 if text[place] == "}" else _scan_fields(text, place, fields, number)
    except (StopIteration, IndexError, ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"line {number}: not JSON") from None
    if _skip(text, place) != len(text):
        raise FormatError(f"line {number}: something follows the JSON object")
    return fields


def _scan_fields(text: str, place: int, fields: dict[str, Field], number: int) -> int:
    while True:
        name, place = _scan(text, place)
        if type(name) is not str:
            raise StopIteration
        place = _skip(text, place)
        if text[place] != ":":
            raise StopIteration
        start = _skip(text, place + 1)
        value, end = _scan(text, start)
        if name in fields:
            raise _twice(name, number)
        fields[name] = Field(value, start, end)
        place = _skip(text, end)
        if text[place] == "}":
            return place + 1
        if text[place] != ",":
            raise StopIteration
        place = _skip(text, place + 1)


def _skip(text: str, place: int) -> int:
    """Return the place after any white space."""
    found = _SPACE.match(text, place)
    return place if found is None else found.end()


class NdjsonTable:
    """The NDJSON form of ``tables.Table``.

    Args:
        cipher: what encrypts and decrypts.
        columns: which fields of the top level.
        progress: called with the bytes read so far after each block.
    """

    def __init__(
        self, cipher: ColumnCipher, columns: Columns, *, progress: Callable[[int], None] = lambda _: None
    ) -> None:
        self._cipher = cipher
        self._columns = columns
        self._progress = progress
        self._search = not columns.protected
        self._finder = FieldFinder(columns.named)

    def protect(self, source: BinaryIO, target: BinaryIO) -> Counts:
        if self._search:
            raise none_named()
        return self._copy(source, target, self._protect_lines)

    def unprotect(self, source: BinaryIO, target: BinaryIO) -> Counts:
        return self._copy(source, target, self._unprotect_lines)

    def _copy(self, source: BinaryIO, target: BinaryIO, change: Callable[[list[Line]], None]) -> Counts:
        counts, number = self._cipher.counts, 1
        for raw in _blocks(source):
            if self._search:
                self._find_protected(raw, number)
            lines = [
                self._line(line, place) if line.strip(b" \t\r") else None
                for place, line in enumerate(raw, number)
            ]
            objects = [line for line in lines if line is not None]
            change(objects)
            data = b"\n".join(
                text if line is None else line.dump().encode() for line, text in zip(lines, raw, strict=True)
            )
            number += len(raw) - 1
            target.write(data)
            counts.rows += len(objects)
            counts.read += sum(map(len, raw)) + len(raw) - 1
            counts.written += len(data)
            self._progress(counts.read)
        if counts.rows and not self._columns.protected:
            raise nothing_protected()
        if counts.rows and self._finder.missing:
            # A misspelt name must not leave a file in clear: the whole copy is refused.
            raise missing_column(min(self._finder.missing), self._finder.names)
        counts.columns = self._columns.protected
        return counts

    def _find_protected(self, raw: list[bytes], number: int) -> None:
        """Add the fields in which this block has envelopes; in NDJSON a field may come late."""
        known = dict.fromkeys(self._columns.protected)
        found = dict(known)
        for place, line in enumerate(raw, number):
            if ENVELOPE_TEXT in line:
                for name, field in scan_object(_decode(line, place), place).items():
                    if name not in found and isinstance(field.value, str) and _is_envelope(field.value):
                        found[name] = None
        if found != known:
            self._columns = dataclasses.replace(self._columns, protected=tuple(found))
            self._finder = FieldFinder(self._columns.named)

    def _line(self, raw: bytes, number: int) -> Line:
        text = _decode(raw, number)
        return Line(text, number, self._finder.find(text, number))

    def _with_value(self, lines: list[Line], name: str) -> list[Line]:
        return [line for line in lines if name in line.fields and line.fields[name].value is not None]

    def _protect_lines(self, lines: list[Line]) -> None:
        columns = self._columns
        chosen = {name: self._with_value(lines, name) for name in columns.protected}
        parts = [
            self._part(name, some, [line.raw(name).encode() for line in some])
            for name, some in chosen.items()
        ]
        if columns.subject is not None:
            for part, some in zip(parts, chosen.values(), strict=True):
                part.subjects = [line.plain(columns.subject) for line in some]
                check_subjects(part.subjects, part.lines, columns.subject)
        for (name, some), envelopes in zip(chosen.items(), self._cipher.protect(parts), strict=True):
            for line, envelope in zip(some, envelopes, strict=True):
                line.edit(name, f'"{b2a_base64(envelope, newline=False).decode()}"')

    def _unprotect_lines(self, lines: list[Line]) -> None:
        chosen = {name: self._with_value(lines, name) for name in self._columns.protected}
        parts = [
            self._part(name, some, [self._envelope_text(line, name) for line in some])
            for name, some in chosen.items()
        ]
        for part, texts in zip(parts, self._cipher.unprotect(parts), strict=True):
            name = part.column
            for line, text, value in zip(chosen[name], texts, part.values, strict=True):
                line.edit(name, self._json_text(line, name, text, value))

    def _part(self, name: str, lines: list[Line], values: list[bytes]) -> Part:
        return Part(name, values, [line.number for line in lines], None, self._row_contexts(lines))

    def _envelope_text(self, line: Line, name: str) -> bytes:
        value = line.fields[name].value
        return value.encode("utf-8", "replace") if isinstance(value, str) else b"?"

    def _json_text(self, line: Line, name: str, text: bytes | None, value: bytes) -> str:
        """What to write for an opened value: its JSON text, once it is known to be just that."""
        if text is None:
            return "null"
        if text is value or text is SHREDDED_TEXT:
            return f'"{text.decode()}"'
        try:
            decoded = text.decode()
            if _scan(decoded, 0)[1] == len(decoded) and "\n" not in decoded:
                return decoded
        except (ValueError, StopIteration, RecursionError):
            pass
        raise FormatError(
            f"line {line.number}, column {name!r}: the value opened, but is not JSON text; it was not "
            "protected as NDJSON"
        )

    def _row_contexts(self, lines: list[Line]) -> list[RowContext] | None:
        if not self._columns.context:
            return None
        return [tuple((f"row.{name}", line.plain(name)) for name in self._columns.context) for line in lines]


def _is_envelope(value: str) -> bool:
    return holds_envelopes([value.encode("utf-8", "replace")])


def _decode(line: bytes, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise FormatError(f"line {number}: not UTF-8 text") from None


def _blocks(source: BinaryIO) -> Iterator[list[bytes]]:
    """Yield lists of lines without their ends; joined with newlines they are the input again."""
    lines: list[bytes] = []
    size = 0
    while line := source.readline():
        lines.append(line)
        size += len(line)
        if len(lines) >= LINES_PER_BLOCK or size >= BLOCK_BYTES:
            yield b"".join(lines).split(b"\n")
            lines, size = [], 0
    if lines:
        yield b"".join(lines).split(b"\n")
