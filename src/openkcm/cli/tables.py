# SPDX-License-Identifier: Apache-2.0
"""Protecting chosen columns of a table: what CSV and NDJSON have in common.

Invariant: a value is only ever replaced by the base64 text of its own envelope, or a whole table fails with
an error that names the line. The name of a value's column is always part of its context, so that no value
can be moved to another column unnoticed; ``--context-column`` binds it to other values of its row as well.

The context of a value is the mapping ``{"column": NAME, "row.OTHER": VALUE OF OTHER, ...}``; another program
decrypts one value with ``service.decrypt(base64.b64decode(value), context=...)``.
"""

from __future__ import annotations

import enum
from binascii import a2b_base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, compress, count, islice
from typing import Any, BinaryIO, Final, Literal, Protocol, TypeVar

from ..envelope import parse
from ..errors import FormatError, InvalidInput, KeyDestroyed, OpenKCMError
from ..keys import Kind, check_subject
from ..limits import MAX_SUBJECT_BYTES

ENVELOPE_TEXT: Final = b"T0tDA"
"""How the base64 text of every envelope begins: the magic ``4F 4B 43 01``, 30 bits of it."""

KIND_PLACE: Final = 5
STORED_KIND: Final = bytes((Kind.STORED,))
"""Where an envelope says what kind it is, and what it says when its data key is in the key store."""

SHREDDED_TEXT: Final = b"[shredded]"

UTF8_BYTES: Final = 4
"""At most, for a character."""

CONTEXTS_KEPT: Final = 100_000
"""Distinct contexts remembered, so that equal ones stay one object."""

T = TypeVar("T")

RowContext = tuple[tuple[str, str], ...]
"""The pairs that a row adds to the contexts of its values."""

_from_text: Final[Callable[[bytes], bytes]] = partial(a2b_base64, strict_mode=True)


class RecordService(Protocol):
    """What a table needs of a service handle."""

    def encrypt_many(
        self,
        records: Sequence[bytes],
        *,
        contexts: Sequence[Mapping[str, str]] | None = None,
        subjects: Sequence[str] | None = None,
    ) -> list[bytes]:
        """Encrypt records; all or nothing."""

    def decrypt_many(
        self,
        blobs: Sequence[bytes],
        *,
        contexts: Sequence[Mapping[str, str]] | None = None,
        errors: Literal["raise", "return"] = "raise",
    ) -> list[Any]:
        """Decrypt envelopes; with ``errors="return"`` an error stands at each position that failed."""


class Shredded(enum.StrEnum):
    """What ``unprotect`` writes for a value whose data key was shredded."""

    FAIL = "fail"
    KEEP = "keep"
    BLANK = "blank"
    MARK = "mark"


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns are protected, which one names the subject, and which ones join the context.

    To unprotect with none named means every column that holds envelopes.
    """

    protected: tuple[str, ...]
    subject: str | None = None
    context: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for names, what in ((self.protected, "protected"), (self.context, "context")):
            if len(set(names)) != len(names):
                raise InvalidInput(f"a {what} column is named twice")
        for name in self.context:
            if name in self.protected:
                raise InvalidInput(
                    f"column {name!r} cannot be protected and a context column too: its value would not be "
                    "readable when the context is needed"
                )

    @property
    def named(self) -> tuple[str, ...]:
        """Every column that must be there."""
        subject = () if self.subject is None else (self.subject,)
        return tuple(dict.fromkeys((*self.protected, *subject, *self.context)))


@dataclass(slots=True)
class Counts:
    """What was done, for the summary."""

    rows: int = 0
    values: int = 0
    without_subject: int = 0
    shredded: int = 0
    read: int = 0
    written: int = 0
    columns: tuple[str, ...] = ()
    """Those that were worked on, also where none were named."""


def at(error: OpenKCMError, line: int, column: str | None = None) -> OpenKCMError:
    """Return the same kind of error, its message saying where."""
    where = f"line {line}" if column is None else f"line {line}, column {column!r}"
    return type(error)(f"{where}: {error}", retryable=error.retryable)


def nothing_protected() -> InvalidInput:
    """Return the error for a table in which no column holds an envelope."""
    return InvalidInput("no column of this file holds protected values")


def none_named() -> InvalidInput:
    """Return the error for protecting no column."""
    return InvalidInput("name at least one column to protect")


def holds_envelopes(values: Sequence[bytes]) -> bool:
    """Whether one of the values is an envelope."""
    return any(value.startswith(ENVELOPE_TEXT) and is_envelope_text(value) for value in values)


def missing_column(name: str, available: Iterable[str], hint: str = "") -> InvalidInput:
    """Return the error for a column that the table does not have."""
    names = ", ".join(available)
    return InvalidInput(f"there is no column {name!r}; the columns are: {names}{hint}")


@dataclass(slots=True)
class Part:
    """The values of one column in a block of rows.

    ``lines[i]`` is the line of value i, for messages; ``rows[i]`` what its row adds to the context, None when
    no row adds anything; ``subjects[i]`` whose value it is, "" for nobody, None when no row has a subject.
    """

    column: str
    values: Sequence[bytes]
    lines: Sequence[int]
    subjects: Sequence[str] | None = None
    rows: Sequence[RowContext] | None = None


class ColumnCipher:
    """Encrypts and decrypts the protected columns of a block of rows, in one call of the service."""

    def __init__(self, service: RecordService, shredded: Shredded = Shredded.FAIL) -> None:
        self._service = service
        self._shredded = shredded
        self._contexts: dict[tuple[str, RowContext], dict[str, str]] = {}
        self.counts = Counts()

    def protect(self, parts: Sequence[Part]) -> list[list[bytes]]:
        """Return each value's envelope, part by part; a table holds its base64 text.

        Raises:
            InvalidInput: a value is an envelope already.
            OpenKCMError: what the service raised, with the line.
        """
        for part in parts:
            if ENVELOPE_TEXT in b" ".join(part.values):
                _refuse_envelopes(part)
        values = _flat([part.values for part in parts])
        contexts = self._all_contexts(parts)
        self.counts.values += len(values)
        if not values:
            return [[] for _ in parts]
        if parts[0].subjects is None:
            return _like(parts, self._encrypt(parts, values, contexts, None, lambda index: index))
        subjects = _flat([part.subjects or () for part in parts])
        return _like(parts, self._encrypt_for(parts, values, contexts, subjects))

    def _encrypt_for(
        self, parts: Sequence[Part], values: list[bytes], contexts: list[dict[str, str]], subjects: list[str]
    ) -> list[bytes]:
        """Encrypt values that mostly have a subject; those that have none get a data key of their own."""
        nobody = _places_of("", subjects)
        if not nobody:
            return self._encrypt(parts, values, contexts, subjects, lambda index: index)
        self.counts.without_subject += len(nobody)
        theirs: list[bytes] = []
        if len(nobody) < len(values):
            theirs = self._encrypt(
                parts,
                list(compress(values, subjects)),
                list(compress(contexts, subjects)),
                list(filter(None, subjects)),
                lambda index: next(islice(compress(count(), subjects), index, None)),
            )
        others = self._encrypt(
            parts,
            [values[place] for place in nobody],
            [contexts[place] for place in nobody],
            None,
            nobody.__getitem__,
        )
        return _merged(theirs, others, nobody)

    def _encrypt(
        self,
        parts: Sequence[Part],
        values: list[bytes],
        contexts: list[dict[str, str]],
        subjects: list[str] | None,
        place: Callable[[int], int],
    ) -> list[bytes]:
        """Encrypt some values; ``place`` says where among all of them the value at an index is."""
        try:
            if subjects is None:
                return self._service.encrypt_many(values, contexts=contexts)
            return self._service.encrypt_many(values, contexts=contexts, subjects=subjects)
        except OpenKCMError as error:
            if error.index is None:
                raise
            raise at(error, *_place(parts, place(error.index))) from error

    def unprotect(self, parts: Sequence[Part]) -> list[list[bytes | None]]:
        """Return the plaintext of each value, part by part; None where it was shredded and is left blank.

        Raises:
            FormatError: a value is not the base64 text of an envelope.
            OpenKCMError: what the service raised, with the line.
        """
        values = _flat([part.values for part in parts])
        self.counts.values += len(values)
        try:
            blobs = list(map(_from_text, values))
        except ValueError:
            raise _first_bad_text(parts, values) from None
        contexts = self._all_contexts(parts)
        try:
            return _like(parts, self._decrypt(blobs, contexts, "raise"))
        except KeyDestroyed as error:
            if self._shredded is Shredded.FAIL or error.index is None:
                raise _destroyed(error, parts) from error
        except OpenKCMError as error:
            if error.index is None:
                raise
            raise at(error, *_place(parts, error.index)) from error
        return _like(parts, self._without_shredded(parts, values, blobs, contexts))

    def _decrypt(
        self, blobs: list[bytes], contexts: list[dict[str, str]], errors: Literal["raise", "return"]
    ) -> list[Any]:
        """Decrypt envelopes of stored and of inline data keys in a call each, as mixed batches are slow."""
        stored = [blob[KIND_PLACE : KIND_PLACE + 1] == STORED_KIND for blob in blobs]
        kinds = [kind for kind in (stored, [not one for one in stored]) if any(kind)]
        if len(kinds) == 1:
            return self._service.decrypt_many(blobs, contexts=contexts, errors=errors)
        results: list[Any] = [None] * len(blobs)
        for kind in kinds:
            places, theirs = list(compress(range(len(blobs)), kind)), list(compress(contexts, kind))
            try:
                opened = self._service.decrypt_many(
                    list(compress(blobs, kind)), contexts=theirs, errors=errors
                )
            except OpenKCMError as error:
                error.index = None if error.index is None else places[error.index]
                raise
            for place, outcome in zip(places, opened, strict=True):
                results[place] = outcome
        return results

    def _without_shredded(
        self,
        parts: Sequence[Part],
        values: list[bytes],
        blobs: list[bytes],
        contexts: list[dict[str, str]],
    ) -> list[bytes | None]:
        texts: list[bytes | None] = []
        outcomes = self._decrypt(blobs, contexts, "return")
        for place, outcome in enumerate(outcomes):
            if not isinstance(outcome, OpenKCMError):
                texts.append(outcome)
            elif isinstance(outcome, KeyDestroyed):
                self.counts.shredded += 1
                texts.append({Shredded.KEEP: values[place], Shredded.MARK: SHREDDED_TEXT}.get(self._shredded))
            else:
                raise at(outcome, *_place(parts, place))
        return texts

    def _all_contexts(self, parts: Sequence[Part]) -> list[dict[str, str]]:
        """The context of every value; equal ones are one object, which is then encoded once a call."""
        contexts: list[dict[str, str]] = []
        for part in parts:
            if part.rows is None:
                contexts += [self._context(part.column, ())] * len(part.values)
            else:
                contexts += [self._context(part.column, row) for row in part.rows]
        return contexts

    def _context(self, column: str, row: RowContext) -> dict[str, str]:
        known = self._contexts
        context = known.get((column, row))
        if context is None:
            if len(known) >= CONTEXTS_KEPT:
                known.clear()
            context = known[column, row] = {"column": column, **dict(row)}
        return context


def _flat(sequences: Sequence[Sequence[T]]) -> list[T]:
    return list(chain.from_iterable(sequences))


def _places_of(wanted: T, items: list[T]) -> list[int]:
    """Where an item is, which is rarely."""
    places: list[int] = []
    with suppress(ValueError):
        while True:
            places.append(items.index(wanted, places[-1] + 1 if places else 0))
    return places


def _merged(most: list[T], others: list[T], places: list[int]) -> list[T]:
    """Put the others back among the most, each at its place; the places ascend."""
    merged: list[T] = []
    start = 0
    for passed, (place, other) in enumerate(zip(places, others, strict=True)):
        merged += most[start : place - passed]
        merged.append(other)
        start = place - passed
    return merged + most[start:]


def _like(parts: Sequence[Part], results: list[T]) -> list[list[T]]:
    """Cut results as the parts are cut."""
    cut, start = [], 0
    for part in parts:
        cut.append(results[start : start + len(part.values)])
        start += len(part.values)
    return cut


def _place(parts: Sequence[Part], place: int) -> tuple[int, str]:
    """The line and column of a value, counted through all parts."""
    for part in parts:
        if place < len(part.values):
            return part.lines[place], part.column
        place -= len(part.values)
    raise IndexError(place)


def _destroyed(error: KeyDestroyed, parts: Sequence[Part]) -> OpenKCMError:
    if error.index is None:
        return error
    line, column = _place(parts, error.index)
    return type(error)(
        f"line {line}, column {column!r}: the data key of this value was shredded; --shredded blank, mark or "
        "keep carries on without such values"
    )


def check_subjects(subjects: Sequence[str], lines: Sequence[int], column: str) -> None:
    """Check subjects, so that an error can name the line.

    Raises:
        LimitExceeded: a subject is too long.
    """
    if len(max(subjects, key=len, default="")) * UTF8_BYTES <= MAX_SUBJECT_BYTES:
        return
    for line, subject in zip(lines, subjects, strict=True):
        try:
            check_subject(subject or "nobody")
        except OpenKCMError as error:
            raise at(error, line, column) from error


def _refuse_envelopes(part: Part) -> None:
    for line, value in zip(part.lines, part.values, strict=True):
        text = value.strip(b'"')  # a JSON text has its quotes
        if text.startswith(ENVELOPE_TEXT) and is_envelope_text(text):
            raise at(
                InvalidInput(
                    "the value is protected already; unprotect the file first, or leave this column out"
                ),
                line,
                part.column,
            )


def is_envelope_text(value: bytes) -> bool:
    """Whether a value is the base64 text of a well-formed envelope."""
    try:
        parse(_from_text(value))
    except (ValueError, FormatError):
        return False
    return True


def _first_bad_text(parts: Sequence[Part], values: Sequence[bytes]) -> OpenKCMError:
    error = FormatError("not a protected value (base64 of an envelope)")
    for place, value in enumerate(values):
        try:
            _from_text(value)
        except ValueError:
            return at(error, *_place(parts, place))
    return error


class Table(Protocol):
    """A format of tables: reads blocks of rows, hands columns to the cipher and writes the rows back."""

    def protect(self, source: BinaryIO, target: BinaryIO) -> Counts:
        """Copy a table, replacing the values of the chosen columns by their envelopes."""

    def unprotect(self, source: BinaryIO, target: BinaryIO) -> Counts:
        """Copy a table, replacing the envelopes of the chosen columns by their values."""
