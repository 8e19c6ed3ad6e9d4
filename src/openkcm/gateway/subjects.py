# SPDX-License-Identifier: Apache-2.0
"""Named data keys: one for each subject, kept wrapped in the key store.

Invariant: to encrypt, a subject's key is opened by the Core for every use, so a shred that another process made is
seen before anything is encrypted under the old key; and a key is durable in the store before a record under it is
returned. What is remembered of the store is wrapped and bounded, and is looked at anew where it does not open: other
Gateways move the same keys.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, cast

from .. import crypto
from ..crypto import SecretKeys
from ..errors import CoreUnavailable, DecryptError, KeyDestroyed, OpenKCMError, StoreUnavailable
from ..keys import KeyService, Kind, Service, WrappedKeys, check_subject
from ..limits import KEY_ID_BYTES, MAX_KEYS_PER_CALL, MAX_SUBJECT_BYTES, WRAPPED_KEY_BYTES
from .background import Delivery
from .keystore import KeyStore, StoredKey
from .leases import Leases
from .under_way import UnderWay

CACHED: Final = 131_072
"""Wrapped keys kept in memory for each service: some 67 MB, where there are so many."""

TOGETHER: Final = 65_536
"""Keys that are looked for, or added, in one go: a transaction costs the more the fewer it brings."""

_TRIES: Final = 100
"""Each try that fails was overtaken by somebody's shred or rotation, so that somebody always gets on."""


@dataclass(frozen=True, slots=True)
class OpenKeys:
    """Data keys that are open: ``ids`` packs the id of each."""

    keys: SecretKeys
    ids: bytes


@dataclass(frozen=True, slots=True)
class OpenGroup:
    """Data keys that are open, and the position each has in what was asked for."""

    keys: SecretKeys
    positions: list[int]


class SubjectKeys:
    """The named data keys of one service."""

    def __init__(
        self,
        core: KeyService,
        store: KeyStore,
        service: Service,
        leases: Leases,
        under_way: Sequence[UnderWay] = (),
        delivery: Delivery | None = None,
    ) -> None:
        self._core = core
        self._leases = leases
        self._under_way = under_way
        self._store = store
        self._delivery = delivery
        self._buried: set[bytes] = set()
        self._service = service
        self._lock = threading.Lock()
        self._by_subject: dict[bytes, StoredKey] = {}
        self._by_id: dict[bytes, StoredKey] = {}
        self._hashes: dict[str, bytes] = {}

    # ---- for encrypting ------------------------------------------------------------------------------

    def open(self, subjects: Sequence[str]) -> OpenKeys:
        """Open the keys of distinct subjects, in their order, making those that there are not yet."""
        hashes = self._hash_all(subjects)
        for _ in range(_TRIES):
            opened, destroyed = self._unwrap(self._find_or_make(hashes))
            if opened is not None:
                return opened
            self._drop_destroyed(destroyed)
        raise StoreUnavailable("the subject's key is shredded or rotated again and again; try once more")

    def open_chunks(self, subjects: Sequence[str]) -> Iterator[OpenKeys]:
        """Open the keys of any number of distinct subjects, in their order, ``MAX_KEYS_PER_CALL`` at a time.

        What ``open`` does, with one look into the store and at most one transaction for each ``TOGETHER`` of them.
        The caller wipes each part before asking for the next, so that no more than one is open.
        """
        for start in range(0, len(subjects), TOGETHER):
            part = subjects[start : start + TOGETHER]
            self._find_or_make(self._hash_all(part))
            for at in range(0, len(part), MAX_KEYS_PER_CALL):
                yield self.open(part[at : at + MAX_KEYS_PER_CALL])

    def hash(self, subject: str) -> bytes:
        """The subject as the store knows it: SHA-256 of salt, service id and name."""
        check_subject(subject)
        return hashlib.sha256(self._store.salt + self._service.service_id + subject.encode()).digest()

    def _hash_all(self, subjects: Sequence[str]) -> list[bytes]:
        """Hash subjects, most of which were asked for before: a table has the same ones block after block.

        What is remembered may be gone by the next look: a shred, a kill or another caller has it forgotten.
        """
        known = self._hashes
        if len(known) > CACHED:
            known = self._hashes = {}
        try:
            found = list(map(known.get, subjects))
        except TypeError:
            return [self.hash(each) for each in subjects]  # one of them is no text, which it says
        if None not in found:
            return cast(list[bytes], found)
        missing = [name for name, each in zip(subjects, found, strict=True) if each is None]
        fresh = self._hash_new(missing)
        known.update(zip(missing, fresh, strict=True))
        rest = iter(fresh)
        return [each or next(rest) for each in found]

    def _hash_new(self, subjects: Sequence[str]) -> list[bytes]:
        """Hash subjects, all checked at once; where one cannot be a subject, ``hash`` says so."""
        try:
            names = [each.encode() for each in subjects]
            sizes = [*map(len, names)]
            if min(sizes) > 0 and max(sizes) <= MAX_SUBJECT_BYTES:
                prefix, sha256 = self._store.salt + self._service.service_id, hashlib.sha256
                return [sha256(prefix + name).digest() for name in names]
        except (AttributeError, UnicodeEncodeError):
            pass
        return [self.hash(each) for each in subjects]

    def _find_or_make(self, hashes: Sequence[bytes]) -> list[StoredKey]:
        known = list(map(self._by_subject.get, hashes))
        found = [key for key in known if key is not None]
        if len(found) == len(hashes):
            return found
        missing = [each for each, key in zip(hashes, known, strict=True) if key is None]
        stored = dict(self._store.find_subjects(self._service.service_id, missing))
        fresh = [each for each in missing if each not in stored] if len(stored) < len(missing) else []
        if fresh:
            stored.update(self._make(fresh))
        self._remember(stored.values())
        return [key or stored[each] for each, key in zip(hashes, known, strict=True)]

    def _make(self, hashes: Sequence[bytes]) -> Mapping[bytes, StoredKey]:
        made: list[StoredKey] = []
        for start in range(0, len(hashes), MAX_KEYS_PER_CALL):
            part = hashes[start : start + MAX_KEYS_PER_CALL]
            ids = crypto.random_bytes(len(part) * KEY_ID_BYTES)
            keys = crypto.generate_keys(len(part))
            wrapped = self._core.wrap_keys(self._service, keys, Kind.STORED, ids)
            keys.wipe()
            made += _split(wrapped, part)
        return self._store.add(self._service.service_id, made)

    def _unwrap(self, stored: Sequence[StoredKey]) -> tuple[OpenKeys | None, list[StoredKey]]:
        """Open keys that all must open; else the destroyed ones are returned."""
        version = stored[0].version
        if any(key.version != version for key in stored):
            _, stuck = self._move(stored)
            if stuck:
                return None, stuck
            stored = [self._by_id.get(key.key_id, key) for key in stored]
            version = stored[0].version
            if any(key.version != version for key in stored):
                return None, []  # rotated once more in between; the caller looks again
        wrapped = _pack(stored, version)
        keys, failures, _ = self._core.unwrap_keys(self._service, wrapped)
        if not failures:
            return OpenKeys(keys, wrapped.ids), []
        keys.wipe()
        refused = [stored[at] for at in failures]
        self._raise_unless_destroyed(refused, failures)
        return None, refused

    def _raise_unless_destroyed(
        self, refused: Sequence[StoredKey], failures: Mapping[int, OpenKCMError]
    ) -> None:
        for error in failures.values():
            if type(error) is not KeyDestroyed:
                # Not to be remembered: the store may be mended.
                self.forget([key.key_id for key in refused])
                raise error

    def _drop_destroyed(self, destroyed: Sequence[StoredKey]) -> None:
        """Forget keys that do not open any more; those that were shredded leave the store too."""
        if not destroyed:
            return
        gone, left = self._sort_out(destroyed)
        if self._look_again(left):
            raise KeyDestroyed("the service key that wraps this subject's data key was destroyed")
        if gone:
            self.forget(gone)
            self._store.remove(self._service.service_id, gone)

    def _sort_out(self, refused: Sequence[StoredKey]) -> tuple[list[bytes], list[StoredKey]]:
        """Of keys that did not open: the ids of those that were shredded, and the others."""
        gone = self._core.shredded(self._service, b"".join([key.key_id for key in refused]))
        return [*gone], [key for key in refused if key.key_id not in gone]

    def _look_again(self, refused: Sequence[StoredKey]) -> list[StoredKey]:
        """Remember of keys that did not open what the store has now; those of them that are there just as they were."""
        if not refused:
            return []
        ids = [key.key_id for key in refused]
        self.forget(ids)
        stored = self._store.find_ids(self._service.service_id, ids)
        self._remember(stored.values())
        return [key for key in refused if stored.get(key.key_id) == key]

    # ---- for decrypting ------------------------------------------------------------------------------

    def open_ids_chunks(
        self, ids: Sequence[bytes]
    ) -> Iterator[tuple[list[OpenGroup], dict[int, OpenKCMError]]]:
        """Open keys by any number of distinct ids, ``MAX_KEYS_PER_CALL`` at a time.

        Gives what ``open_ids`` does; positions count from the start of the part. One look into the store for each
        ``TOGETHER`` of them; the caller wipes each part before asking for the next.
        """
        for start in range(0, len(ids), TOGETHER):
            part = ids[start : start + TOGETHER]
            known = self._by_id
            missing = [each for each in part if each not in known]
            if missing:
                self._remember(self._store.find_ids(self._service.service_id, missing).values())
            for at in range(0, len(part), MAX_KEYS_PER_CALL):
                yield self.open_ids(part[at : at + MAX_KEYS_PER_CALL])

    def open_ids(self, ids: Sequence[bytes]) -> tuple[list[OpenGroup], dict[int, OpenKCMError]]:
        """Open keys by distinct ids.

        Returns one group for each service key version among them, and the error of each position whose key did
        not open.
        """
        for _ in range(_TRIES):
            found = self._known_or_stored(ids)
            groups, failures = self._open_found(ids, found)
            try:
                missing = [(at, each) for at, each in enumerate(ids) if each not in found]
                explained = self._explain(missing)
                if not failures or not self._moved([found[ids[at]] for at in failures]):
                    return groups, {**explained, **failures}
            except BaseException:
                _wipe(groups)
                raise
            _wipe(groups)
        raise StoreUnavailable("the subject's key is moved again and again; try once more")

    def _moved(self, refused: Sequence[StoredKey]) -> bool:
        """Whether some of the keys that did not open were moved: what they were under is destroyed, they are not."""
        _, left = self._sort_out(refused)
        return len(self._look_again(left)) < len(left)

    def _known_or_stored(self, ids: Sequence[bytes]) -> dict[bytes, StoredKey]:
        found = {each: key for each in ids if (key := self._by_id.get(each)) is not None}
        missing = [each for each in ids if each not in found]
        if missing:
            stored = self._store.find_ids(self._service.service_id, missing)
            self._remember(stored.values())
            found.update(stored)
        return found

    def _open_found(
        self, ids: Sequence[bytes], found: Mapping[bytes, StoredKey]
    ) -> tuple[list[OpenGroup], dict[int, OpenKCMError]]:
        versions: dict[int, list[int]] = {}
        for at, each in enumerate(ids):
            if each in found:
                versions.setdefault(found[each].version, []).append(at)
        groups: list[OpenGroup] = []
        failures: dict[int, OpenKCMError] = {}
        for version, positions in versions.items():
            wrapped = _pack([found[ids[at]] for at in positions], version)
            keys, failed = self._leases.open(wrapped)
            failures.update((positions[at], error) for at, error in failed.items())
            groups.append(OpenGroup(keys, positions))
        return groups, failures

    def _explain(self, missing: list[tuple[int, bytes]]) -> dict[int, OpenKCMError]:
        if not missing:
            return {}
        ids = [key_id for _, key_id in missing]
        gone = frozenset() if self._delivery is None else self._store.buried(self._service.service_id, ids)
        if len(gone) < len(ids):
            gone |= self._core.shredded(self._service, b"".join(each for each in ids if each not in gone))
        return {
            at: KeyDestroyed("this subject's data key was shredded; what it encrypted cannot be read again")
            if key_id in gone
            # An id that is in no store may as well be an altered one.
            else DecryptError()
            for at, key_id in missing
        }

    # ---- upkeep --------------------------------------------------------------------------------------

    def rewrap(self, stored: Sequence[StoredKey]) -> int:
        """Move keys under the active service key, in the store as well; returns how many moved."""
        return self._move(stored)[0]

    def _move(self, stored: Sequence[StoredKey]) -> tuple[int, list[StoredKey]]:
        """Move keys under the active service key: how many moved, and those that do not open any more."""
        moved: list[StoredKey] = []
        stuck: list[StoredKey] = []
        for version in sorted({key.version for key in stored}):
            group = [key for key in stored if key.version == version]
            wrapped, failures = self._core.rewrap_keys(self._service, _pack(group, version))
            refused = [group[at] for at in failures]
            self._raise_unless_destroyed(refused, failures)
            stuck += refused
            if wrapped.version == version:
                continue
            fresh = _split(wrapped, [key.subject for key in group])
            moved.extend(key for at, key in enumerate(fresh) if at not in failures)
        if moved:
            self._store.rewrap(self._service.service_id, moved)
            self._remember(moved)
        return len(moved), stuck

    def rewrap_ids(self, ids: Sequence[bytes]) -> list[OpenKCMError | None]:
        """Move the keys of these distinct ids under the active service key; the error of each that could not be."""
        found = self._store.find_ids(self._service.service_id, ids)
        missing = self._explain([(at, each) for at, each in enumerate(ids) if each not in found])
        gone = self._core.shredded(self._service, b"".join(ids))
        self.rewrap([key for key in found.values() if key.key_id not in gone])
        shredded = KeyDestroyed(
            "this subject's data key was shredded; what it encrypted cannot be read again"
        )
        return [missing.get(at) or (shredded if each in gone else None) for at, each in enumerate(ids)]

    def rewrap_all(self) -> int:
        """Move every stored key under the active service key; returns how many moved."""
        after, moved = b"", 0
        while part := self._store.scan(self._service.service_id, after, 4096):
            after = part[-1].key_id
            moved += self.rewrap(part)
        return moved

    def shred(self, subjects: Sequence[str]) -> int:
        """Destroy the keys of subjects: tombstones first, then the rows. Returns how many there were.

        Where the Core is far away and does not answer, its tombstones wait in the key store, in the place of the rows.
        """
        hashes = [self.hash(subject) for subject in subjects]
        ids = [key.key_id for key in self._store.find_subjects(self._service.service_id, hashes).values()]
        if ids:
            try:
                self._core.shred_keys(self._service, b"".join(ids))
            except CoreUnavailable as error:
                if self._delivery is None or not error.retryable:
                    raise
                self._bury(self._delivery, ids)
                return len(ids)
            self.gone(ids)
            self._store.remove(self._service.service_id, ids)
        return len(ids)

    def _bury(self, delivery: Delivery, ids: Sequence[bytes]) -> None:
        """Have keys be destroyed for this Gateway from now on, and for all when the Core has heard of it."""
        self._store.bury(self._service, ids)
        with self._lock:
            # Who has just read one of them must not remember it: for now, the Core would open it.
            self._buried.update(ids)
        self.gone(ids)
        delivery.wake()

    def gone(self, ids: Sequence[bytes]) -> None:
        """Data keys were shredded: let go of what is cached of them, kept open, and under way."""
        self.forget(ids)
        self._leases.forget(frozenset(ids))
        for each in self._under_way:
            each.forget(frozenset(ids))

    def after_fork(self) -> None:
        """Another thread of the parent may have held the lock."""
        self._lock = threading.Lock()

    def forget(self, ids: Sequence[bytes] | None = None) -> None:
        """Drop cached wrapped keys: these, or all."""
        # Ids do not say which names were theirs, and of a subject that is shredded not even the name is kept.
        self._hashes = {}
        with self._lock:
            if ids is None:
                self._by_id.clear()
                self._by_subject.clear()
                return
            for key_id in ids:
                key = self._by_id.pop(key_id, None)
                if key is not None and self._by_subject.get(key.subject) is key:
                    del self._by_subject[key.subject]

    def _remember(self, keys: Iterable[StoredKey]) -> None:
        with self._lock:
            for key in keys:
                if key.key_id in self._buried:
                    continue
                self._by_id[key.key_id] = self._by_subject[key.subject] = key
            if len(self._by_id) > CACHED:
                for key_id in list(islice(self._by_id, len(self._by_id) - CACHED // 2)):
                    old = self._by_id.pop(key_id)
                    self._by_subject.pop(old.subject, None)


def _wipe(groups: Iterable[OpenGroup]) -> None:
    for group in groups:
        group.keys.wipe()


def _pack(keys: Sequence[StoredKey], version: int) -> WrappedKeys:
    return WrappedKeys(
        Kind.STORED, version, b"".join([key.wrapped for key in keys]), b"".join([key.key_id for key in keys])
    )


def _split(wrapped: WrappedKeys, subjects: Sequence[bytes]) -> list[StoredKey]:
    ids, blobs = wrapped.ids, wrapped.wrapped
    return [
        StoredKey(
            ids[at * KEY_ID_BYTES : (at + 1) * KEY_ID_BYTES],
            subject,
            wrapped.version,
            blobs[at * WRAPPED_KEY_BYTES : (at + 1) * WRAPPED_KEY_BYTES],
        )
        for at, subject in enumerate(subjects)
    ]
