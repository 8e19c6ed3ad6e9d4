# SPDX-License-Identifier: Apache-2.0
"""Many records at once: splitting, grouping, and putting results back in order.

Invariant: results stand where their inputs stood. Without per-item outcomes a batch is all or nothing; with them an
error stands at each position that failed. A chunk is small enough that a kill does not wait for it long.
"""

from __future__ import annotations

import itertools
import operator
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

from ..context import Buffer, Context, encode_context
from ..envelope import Envelope, parse
from ..errors import DecryptError, FormatError, InvalidInput, OpenKCMError
from ..keys import Kind, check_subject
from ..limits import MAX_KEYS_PER_CALL

Outcome: TypeAlias = bytes | OpenKCMError
Errors: TypeAlias = Literal["raise", "return"]
Contexts: TypeAlias = bytes | list[bytes]

CHUNK_RECORDS: Final = MAX_KEYS_PER_CALL
CHUNK_BYTES: Final = 64 * 1024 * 1024


def check_errors(errors: str) -> bool:
    """Whether errors are to be returned in place."""
    if errors not in ("raise", "return"):
        raise InvalidInput('errors is "raise" or "return"')
    return errors == "return"


def as_list(records: object) -> list[Any]:
    """The caller's batch as a list; a lone bytes object or text is a mistake and not a batch."""
    if type(records) is list:
        return records
    if isinstance(records, (str, bytes, bytearray, memoryview, Mapping)) or not hasattr(records, "__iter__"):
        raise InvalidInput(f"a batch is a list of records, not {type(records).__name__}")
    return list(records)


def encode_contexts(context: Context, contexts: Sequence[Context] | None, count: int) -> Contexts:
    """Encode one context for all, or one a record."""
    if contexts is None:
        return encode_context(context)
    if context is not None:
        raise InvalidInput("give context= for all records or contexts= for each, not both")
    each = [*as_list(contexts)]  # ours: while they are told apart by their places in memory, none may go
    if len(each) != count:
        raise InvalidInput(f"there are {count} records and {len(each)} contexts")
    known: dict[int, bytes] = {}  # one object for many records, as a table has, is encoded once
    encoded: list[bytes] = []
    for start, stop in _runs(each):
        one = each[start]
        try:
            found = known.get(id(one)) or known.setdefault(id(one), encode_context(one))
        except OpenKCMError as error:
            error.index = start
            raise
        encoded += [found] * (stop - start)
    return encoded


def _runs(items: list[Any]) -> Iterator[tuple[int, int]]:
    """Start and stop of each run of one and the same object."""
    same = bytes(map(operator.is_, items, itertools.islice(items, 1, None)))
    start = 0
    while start < len(items):
        change = same.find(0, start)
        stop = len(items) if change < 0 else change + 1
        yield start, stop
        start = stop


def one_by_one(
    act: Callable[[list[Any], Contexts, list[str] | None], list[Any]],
    items: list[Any],
    context: Context,
    contexts: list[Context] | None,
    names: list[str] | None,
) -> list[Any]:
    """Find the records that cannot be encrypted and encrypt the others."""
    results: list[Any] = []
    for at, item in enumerate(items):
        try:
            some = names if names is None or len(names) == 1 else names[at : at + 1]
            one = encode_contexts(context, None if contexts is None else contexts[at : at + 1], 1)
            results += act([item], one, some)
        except OpenKCMError as error:
            if error.index is None:
                raise
            results.append(at_index(error, at))
    return results


def part_of(contexts: Contexts, start: int, stop: int) -> Contexts:
    """The contexts of a slice of the batch."""
    return contexts if isinstance(contexts, bytes) else contexts[start:stop]


def pick(contexts: Contexts, positions: Sequence[int]) -> Contexts:
    """The contexts at some positions of the batch."""
    return contexts if isinstance(contexts, bytes) else [contexts[at] for at in positions]


def chunks(records: list[Any]) -> list[tuple[int, int]]:
    """Cut a batch into slices of bounded count and size: (start, stop) of each."""
    if len(records) <= CHUNK_RECORDS and _size(records, 0, len(records)) <= CHUNK_BYTES:
        return [(0, len(records))] if records else []
    slices = [(at, min(at + CHUNK_RECORDS, len(records))) for at in range(0, len(records), CHUNK_RECORDS)]
    return [part for start, stop in slices for part in _halves(records, start, stop)]


def _halves(records: list[Any], start: int, stop: int) -> list[tuple[int, int]]:
    if stop - start == 1 or _size(records, start, stop) <= CHUNK_BYTES:
        return [(start, stop)]
    middle = (start + stop) // 2
    return _halves(records, start, middle) + _halves(records, middle, stop)


def _size(records: list[Any], start: int, stop: int) -> int:
    try:
        whole = start == 0 and stop == len(records)
        return sum(map(len, records if whole else records[start:stop]))
    except (TypeError, ValueError):
        return 0  # something without a length, or released: the native layer names it


def index_of(keys: Sequence[Any]) -> tuple[list[Any], array[int] | None]:
    """The distinct keys in order of appearance, and for each item the position of its key (None if all differ)."""
    # A key that is not there yet gets the next number: one look-up for each item is all there is.
    places: defaultdict[Any, int] = defaultdict(itertools.count().__next__)
    try:
        index = list(map(places.__getitem__, keys))
    except TypeError:
        raise InvalidInput("a subject is text, and one of these is not") from None
    distinct = list(places)
    if len(distinct) == len(keys) or len(distinct) == 1:
        return distinct, None
    return distinct, array("I", index)


class Groups:
    """A mixed batch of envelopes, parsed and sorted by where their data keys are."""

    def __init__(self, blobs: list[Any], service_id: bytes) -> None:
        self.outcomes: list[Any] = [None] * len(blobs)
        self.inline: dict[int, list[int]] = {}
        self.stored: list[int] = []
        self.data_keys: list[bytes] = [b""] * len(blobs)
        for at, blob in enumerate(blobs):
            try:
                envelope = parse_record(blob, service_id)
            except OpenKCMError as error:
                error.index = at
                self.outcomes[at] = error
                continue
            self.data_keys[at] = envelope.data_key
            if envelope.kind is Kind.STORED:
                self.stored.append(at)
            else:
                self.inline.setdefault(envelope.version, []).append(at)


def parse_record(blob: Buffer, service_id: bytes) -> Envelope:
    """Parse an envelope that must be a record of this service.

    Raises:
        FormatError: malformed, or a stream.
        DecryptError: another service's.
    """
    envelope = parse(blob)
    if envelope.kind.stream:
        raise FormatError("this is the start of a stream and not a record; use decrypt_stream")
    if envelope.service_id != service_id:
        raise DecryptError
    return envelope


def settle(outcomes: list[Outcome], in_place: bool) -> list[Any]:
    """Hand out a batch's outcomes, or raise the first error among them."""
    if not in_place:
        for outcome in outcomes:
            if isinstance(outcome, OpenKCMError):
                raise outcome
    return outcomes


def place_failures(
    outcomes: list[Any], positions: Sequence[int], failures: Mapping[int, OpenKCMError]
) -> list[int]:
    """Put errors at their positions in the batch; returns the local positions that are left."""
    for at, error in failures.items():
        outcomes[positions[at]] = at_index(error, positions[at])
    return [at for at in range(len(positions)) if at not in failures]


def subjects_of(subject: str | None, subjects: Sequence[str] | None, count: int) -> list[str] | None:
    """The subjects of a batch: one for all, one a record, or none."""
    if subjects is None:
        return None if subject is None else [subject]
    if subject is not None:
        raise InvalidInput("give subject= for all records or subjects= for each, not both")
    names = as_list(subjects)
    if len(names) != count:
        raise InvalidInput(f"there are {count} records and {len(names)} subjects")
    return names


def at_index(error: OpenKCMError, index: int) -> OpenKCMError:
    """The same error, saying which item it is about."""
    return type(error)(str(error), index=index)


def first_bad_subject(names: list[str]) -> int | None:
    """The position of the first that cannot name a subject."""
    for at, name in enumerate(names):
        try:
            check_subject(name)
        except OpenKCMError:
            return at
    return None


def length_of(item: Any) -> int:
    """The bytes of a record."""
    try:
        return memoryview(item).nbytes
    except (TypeError, ValueError, BufferError):
        return 0  # the native layer says what is wrong with it
