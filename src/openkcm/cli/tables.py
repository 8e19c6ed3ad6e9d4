# SPDX-License-Identifier: Apache-2.0
"""Protecting chosen columns of a table: what CSV and NDJSON have in common.

Invariant: a value is only ever replaced by the base64 text of its own envelope, or a whole table fails with
an error that names the line. The name of a value's column is always part of its context, so that no value
can be moved to another column unnoticed; ``--context-column`` binds it to other values of its row as well.

The context of a value is the mapping ``{"column": NAME, "row.OTHER": VALUE OF OTHER, ...}``; another program
decrypts one value with ``service.decrypt(base64.b64decode(value), context=...)``.
"""

from __future__ import annotations

import binascii
import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO, Final, Protocol

from ..envelope import parse
from ..errors import FormatError, InvalidInput, KeyDestroyed, OpenKCMError
from ..keys import check_subject

ENVELOPE_TEXT: Final = b"T0tDA"
"""How the base64 text of every envelope begins: the magic ``4F 4B 43 01``, 30 bits of it."""

SHREDDED_TEXT: Final = b"[shredded]"

RowContext = tuple[tuple[str, str], ...]
"""The pairs that a row adds to the contexts of its values."""

to_text: Final[Callable[[bytes], bytes]] = partial(binascii.b2a_base64, newline=False)
_from_text: Final[Callable[[bytes], bytes]] = partial(binascii.a2b_base64, strict_mode=True)


class RecordService(Protocol):
    """What a table needs of a service handle."""

    def encrypt_many(
        self,
        records: Sequence[bytes],
        *,
        context: Mapping[str, str] | None = None,
        contexts: Sequence[Mapping[str, str]] | None = None,
        subjects: Sequence[str] | None = None,
    ) -> list[bytes]:
        """Encrypt records; all or nothing."""

    def decrypt_many(
        self,
        blobs: Sequence[bytes],
        *,
        context: Mapping[str, str] | None = None,
        contexts: Sequence[Mapping[str, str]] | None = None,
        errors: str = "raise",
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
class ColumnCipher:
    """Encrypts and decrypts one column of a block of rows at a time.

    ``lines[i]`` is the line of value i, for messages; ``rows[i]`` what its row adds to the context, and None
    when no row adds anything.
    """

    service: RecordService
    shredded: Shredded = Shredded.FAIL
    counts: Counts = field(default_factory=Counts)
    _contexts: dict[tuple[str, RowContext], dict[str, str]] = field(default_factory=dict)

    def protect(
        self,
        column: str,
        values: Sequence[bytes],
        lines: Sequence[int],
        subjects: Sequence[str] | None = None,
        rows: Sequence[RowContext] | None = None,
    ) -> list[bytes]:
        """Return the base64 text of each value's envelope; an empty subject means none.

        Raises:
            InvalidInput: a value is an envelope already.
            OpenKCMError: what the service raised, with the line.
        """
        self.counts.values += len(values)
        if subjects is None or not all(subjects):
            return self._protect_some(column, values, lines, subjects, rows)
        return list(map(to_text, self._encrypt(column, values, lines, subjects, rows)))

    def _protect_some(
        self,
        column: str,
        values: Sequence[bytes],
        lines: Sequence[int],
        subjects: Sequence[str] | None,
        rows: Sequence[RowContext] | None,
    ) -> list[bytes]:
        """Protect values of which some, or all, have no subject and so a data key of their own."""
        if subjects is None:
            return list(map(to_text, self._encrypt(column, values, lines, None, rows)))
        texts: list[bytes] = [b""] * len(values)
        named = [i for i, subject in enumerate(subjects) if subject]
        unnamed = [i for i, subject in enumerate(subjects) if not subject]
        for places, names in ((named, [subjects[i] for i in named]), (unnamed, None)):
            if places:
                blobs = self._encrypt(
                    column,
                    [values[i] for i in places],
                    [lines[i] for i in places],
                    names,
                    None if rows is None else [rows[i] for i in places],
                )
                for place, blob in zip(places, blobs, strict=True):
                    texts[place] = to_text(blob)
        self.counts.without_subject += len(unnamed)
        return texts

    def _encrypt(
        self,
        column: str,
        values: Sequence[bytes],
        lines: Sequence[int],
        subjects: Sequence[str] | None,
        rows: Sequence[RowContext] | None,
    ) -> list[bytes]:
        arguments: dict[str, Any] = self._context(column, rows)
        if subjects is not None:
            arguments["subjects"] = subjects
        try:
            return self.service.encrypt_many(values, **arguments)
        except OpenKCMError as error:
            if error.index is None:
                raise
            raise at(error, lines[error.index], column) from error

    def unprotect(
        self,
        column: str,
        values: Sequence[bytes],
        lines: Sequence[int],
        rows: Sequence[RowContext] | None = None,
    ) -> list[bytes | None]:
        """Return the plaintext of each value; None where it was shredded and is to be left blank.

        Raises:
            FormatError: a value is not the base64 text of an envelope.
            OpenKCMError: what the service raised, with the line.
        """
        self.counts.values += len(values)
        try:
            blobs = list(map(_from_text, values))
        except ValueError:
            raise _first_bad_text(values, lines, column) from None
        context = self._context(column, rows)
        try:
            return self.service.decrypt_many(blobs, **context)
        except KeyDestroyed as error:
            if self.shredded is Shredded.FAIL:
                raise self._destroyed(error, column, lines) from error
        except OpenKCMError as error:
            if error.index is None:
                raise
            raise at(error, lines[error.index], column) from error
        return self._without_shredded(column, values, blobs, lines, context)

    def _without_shredded(
        self,
        column: str,
        values: Sequence[bytes],
        blobs: list[bytes],
        lines: Sequence[int],
        context: dict[str, Any],
    ) -> list[bytes | None]:
        texts: list[bytes | None] = []
        outcomes = self.service.decrypt_many(blobs, errors="return", **context)
        for place, outcome in enumerate(outcomes):
            if not isinstance(outcome, OpenKCMError):
                texts.append(outcome)
            elif isinstance(outcome, KeyDestroyed):
                self.counts.shredded += 1
                texts.append({Shredded.KEEP: values[place], Shredded.MARK: SHREDDED_TEXT}.get(self.shredded))
            else:
                raise at(outcome, lines[place], column)
        return texts

    def _destroyed(self, error: KeyDestroyed, column: str, lines: Sequence[int]) -> OpenKCMError:
        if error.index is None:
            return error
        return type(error)(
            f"line {lines[error.index]}, column {column!r}: the data key of this value was shredded; "
            "--shredded blank, mark or keep carries on without such values"
        )

    def _context(self, column: str, rows: Sequence[RowContext] | None) -> dict[str, Any]:
        if rows is None:
            return {"context": {"column": column}}
        known = self._contexts
        if len(known) > 100_000:
            known.clear()
        contexts = []
        for row in rows:
            context = known.get((column, row))
            if context is None:
                context = known[column, row] = {"column": column, **dict(row)}
            contexts.append(context)
        return {"contexts": contexts}


def check_subjects(subjects: Iterable[str], lines: Sequence[int], column: str) -> None:
    """Check each subject once, so that the error can name its line.

    Raises:
        LimitExceeded: a subject is too long.
    """
    for place, subject in enumerate(subjects):
        if len(subject) > 256:
            try:
                check_subject(subject)
            except OpenKCMError as error:
                raise at(error, lines[place], column) from error


def refuse_envelopes(column: str, values: Sequence[bytes], lines: Sequence[int]) -> None:
    """Refuse values that are envelopes already.

    Raises:
        InvalidInput: one is.
    """
    for place, value in enumerate(values):
        if value.startswith(ENVELOPE_TEXT) and is_envelope_text(value):
            raise InvalidInput(
                f"line {lines[place]}, column {column!r}: the value is protected already; unprotect the file "
                "first, or leave this column out"
            )


def is_envelope_text(value: bytes) -> bool:
    """Whether a value is the base64 text of a well-formed envelope."""
    try:
        parse(_from_text(value))
    except (ValueError, FormatError):
        return False
    return True


def _first_bad_text(values: Sequence[bytes], lines: Sequence[int], column: str) -> OpenKCMError:
    for place, value in enumerate(values):
        try:
            _from_text(value)
        except ValueError:
            return at(FormatError("not a protected value (base64 of an envelope)"), lines[place], column)
    return FormatError(f"column {column!r} holds a value that is not protected")


class Table(Protocol):
    """A format of tables: reads blocks of rows, hands columns to the cipher and writes the rows back."""

    def protect(self, source: BinaryIO, target: BinaryIO) -> Counts:
        """Copy a table, replacing the values of the chosen columns by their envelopes."""

    def unprotect(self, source: BinaryIO, target: BinaryIO) -> Counts:
        """Copy a table, replacing the envelopes of the chosen columns by their values."""
