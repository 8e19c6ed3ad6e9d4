# SPDX-License-Identifier: Apache-2.0
"""Moving the data keys of envelopes under the active service key.

Invariant: no data key and no payload is opened here: the Core moves the keys, and what is around them stays as it is.
"""

from __future__ import annotations

from typing import Any

from ..envelope import fixed_header
from ..errors import OpenKCMError
from ..keys import KeyService, Kind, Service, WrappedKeys
from ..limits import WRAPPED_KEY_BYTES
from .batches import Groups, at_index, chunks, place_failures
from .subjects import SubjectKeys


class Rewrapper:
    """Rewraps envelopes of one service."""

    def __init__(self, core: KeyService, service: Service, subjects: SubjectKeys) -> None:
        self._core = core
        self._service = service
        self._subjects = subjects

    def rewrap(self, blobs: list[Any]) -> list[Any]:
        """Each envelope with its key moved, or its error."""
        results: list[Any] = []
        for start, stop in chunks(blobs):
            results += self._rewrap_chunk(blobs[start:stop], start)
        return results

    def _rewrap_chunk(self, blobs: list[Any], start: int) -> list[Any]:
        groups = Groups(blobs, self._service.service_id)
        for version, positions in groups.inline.items():
            packed = b"".join([groups.data_keys[at] for at in positions])
            moved, failures = self._core.rewrap_keys(self._service, WrappedKeys(Kind.INLINE, version, packed))
            head = fixed_header(Kind.INLINE, self._service.service_id, moved.version)
            for local in place_failures(groups.outcomes, positions, failures):
                key = moved.wrapped[local * WRAPPED_KEY_BYTES : (local + 1) * WRAPPED_KEY_BYTES]
                blob = blobs[positions[local]]
                groups.outcomes[positions[local]] = head + key + bytes(blob)[len(head) + len(key) :]
        if groups.stored:
            self._rewrap_stored(groups, blobs)
        for outcome in groups.outcomes:
            if isinstance(outcome, OpenKCMError) and outcome.index is not None:
                outcome.index += start
        return groups.outcomes

    def _rewrap_stored(self, groups: Groups, blobs: list[Any]) -> None:
        """Their keys are moved in the key store."""
        ids = list(dict.fromkeys(groups.data_keys[at] for at in groups.stored))
        errors = dict(zip(ids, self._subjects.rewrap_ids(ids), strict=True))
        for at in groups.stored:
            error = errors[groups.data_keys[at]]
            groups.outcomes[at] = bytes(blobs[at]) if error is None else at_index(error, at)
