# SPDX-License-Identifier: Apache-2.0
"""Opening a batch of envelopes: each kind of data key in as few calls as there can be.

Invariant: every data key that was opened for a batch is zeroed when the batch is done; plaintext stands only where tag
and commitment were right.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from typing import Any

from ..crypto import RecordCipher, SecretKeys
from ..envelope import split_place
from ..errors import DecryptError, OpenKCMError, SecretMemoryError
from ..keys import Kind, Service, WrappedKeys
from ..limits import KEY_ID_BYTES
from .batches import Contexts, Groups, at_index, index_of, pick, place_failures, settle
from .leases import Leases
from .subjects import SubjectKeys

OpenMany = Callable[..., tuple[list[Any], list[int]]]
"""As ``RecordCipher.open_many``."""


class Opener:
    """Opens the envelopes of one service."""

    def __init__(
        self,
        service: Service,
        leases: Leases,
        subjects: SubjectKeys,
        inline: RecordCipher,
        stored: RecordCipher,
    ) -> None:
        self._service = service
        self._leases = leases
        self._subjects = subjects
        self._inline = inline
        self._stored = stored
        waiting = leases.waiting
        self._open_one = waiting.heavy(inline.open_one, 3)
        self._open_inline = waiting.heavy(inline.open_many, 3)
        self._open_subjects = waiting.heavy(stored.open_many, 3)

    def open(self, blobs: list[Any], contexts: Contexts, in_place: bool) -> list[Any]:
        """Open envelopes of any record kind and version; outcomes in their order, as ``decrypt_many`` has them."""
        gathered = self._inline.gather(blobs, True)
        if gathered is not None and gathered[0]:
            keys, failures = self._leases.open(WrappedKeys(Kind.INLINE, gathered[0], gathered[1]))
            if not failures:
                return self._open_all(self._open_inline, keys, gathered[2], blobs, contexts, in_place)
            keys.wipe()
        elif gathered is None and (gathered := self._stored.gather(blobs)) is not None and not gathered[0]:
            records = self._open_stored_only(gathered[1], blobs, contexts, in_place)
            if records is not None:
                return records
        groups = Groups(blobs, self._service.service_id)
        for version, positions in groups.inline.items():
            packed = b"".join([groups.data_keys[at] for at in positions])
            keys, failures = self._leases.open(WrappedKeys(Kind.INLINE, version, packed))
            self._open_group(
                self._open_inline, keys, failures, positions, positions, blobs, contexts, groups.outcomes
            )
        if groups.stored:
            self._open_stored(groups, blobs, contexts)
        return settle(groups.outcomes, in_place)

    def open_inline(self, blob: bytes, place: bytes, context: bytes, out: Any = None) -> Any:
        """Open one record whose data key is inside; None where that key does not open, which ``open`` explains.

        Returns it as bytes, or how many were written to ``out``, a buffer.

        Args:
            blob: the envelope.
            place: its service key version (4, big-endian) and wrapped key, as they stand in it.
            context: encoded.

        Raises:
            DecryptError: another key or context, or altered.
        """
        kept = self._leases.find(place)
        try:
            if kept is not None:
                return _verified(self._open_one(kept, 0, context, blob, out))
        except SecretMemoryError:
            if not kept.wiped:  # type: ignore[union-attr]  # it is not None
                raise
        version, wrapped = split_place(place)
        if not version:
            return None
        keys, failures = self._leases.open(WrappedKeys(Kind.INLINE, version, wrapped))
        try:
            return None if failures else _verified(self._open_one(keys, 0, context, blob, out))
        finally:
            keys.wipe()

    def _open_stored_only(
        self, packed: bytes, blobs: list[Any], contexts: Contexts, in_place: bool
    ) -> list[Any] | None:
        """Envelopes of subjects only, whose keys all open and have one version; None if it is not that simple."""
        ids, index = index_of([packed[at : at + KEY_ID_BYTES] for at in range(0, len(packed), KEY_ID_BYTES)])
        opened, failures = self._subjects.open_ids(ids)
        if failures or len(opened) != 1:
            return None
        return self._open_all(self._open_subjects, opened[0].keys, index, blobs, contexts, in_place)

    def _open_stored(self, groups: Groups, blobs: list[Any], contexts: Contexts) -> None:
        distinct, index = index_of([groups.data_keys[at] for at in groups.stored])
        places: list[list[int]] = [[] for _ in distinct]
        for local, at in enumerate(groups.stored):
            places[index[local] if index is not None else (local if len(distinct) > 1 else 0)].append(at)
        opened, failures = self._subjects.open_ids(distinct)
        for place, error in failures.items():
            for at in places[place]:
                groups.outcomes[at] = at_index(error, at)
        for group in opened:
            positions = [at for place in group.positions if place not in failures for at in places[place]]
            owners = [
                local
                for local, place in enumerate(group.positions)
                if place not in failures
                for _ in places[place]
            ]
            self._open_group(
                self._open_subjects, group.keys, {}, owners, positions, blobs, contexts, groups.outcomes
            )

    def _open_group(
        self,
        open_many: OpenMany,
        keys: SecretKeys,
        failures: Mapping[int, OpenKCMError],
        owners: list[int],
        positions: list[int],
        blobs: list[Any],
        contexts: Contexts,
        outcomes: list[Any],
    ) -> None:
        """Open the envelopes at ``positions``; the key of each is at ``owners``, or in the same order."""
        left = place_failures(outcomes, positions, failures)
        if owners is positions:
            owners = list(range(len(positions)))
        places = [positions[at] for at in left]
        try:
            if not left:
                return
            index = array("I", [owners[at] for at in left])
            opened, failed = open_many(
                keys, index, pick(contexts, places), [blobs[at] for at in places], True
            )
        finally:
            keys.wipe()
        for at, record in zip(places, opened, strict=True):
            outcomes[at] = record
        for at in failed:
            outcomes[places[at]] = DecryptError(index=places[at])

    def _open_all(
        self,
        open_many: OpenMany,
        keys: SecretKeys,
        index: Any,
        blobs: list[Any],
        contexts: Contexts,
        in_place: bool,
    ) -> list[Any]:
        try:
            records, failed = open_many(keys, index, contexts, blobs, in_place)
        finally:
            keys.wipe()
        if not failed:
            return records
        if not in_place:
            raise DecryptError(index=failed[0])
        results: list[Any] = records
        for at in failed:
            results[at] = DecryptError(index=at)
        return results


def _verified(record: Any) -> Any:
    if record is None:
        raise DecryptError()
    return record
