# SPDX-License-Identifier: Apache-2.0
"""Shredded data keys: random ids that must never be opened again.

Invariant: a tombstone is durable before a shred is acknowledged, and it says nothing about the person.
"""

from __future__ import annotations

from typing import NamedTuple

import sqlalchemy as sql

from ..crypto import IdSet
from ..errors import InvalidInput, LimitExceeded
from ..keys import Service
from ..limits import KEY_ID_BYTES, MAX_KEYS_PER_CALL
from . import audit, schema
from .store import Store
from .vault import Vault

_CHUNK = 500
_KEPT = 65_536
_MOST_ACTS = 5000
_FEW = 1024
"""Tombstones that are read beyond the number of ids asked about, to know them all: one read in place of many."""


def check_ids(ids: bytes) -> None:
    """Check packed ids: more at once would keep others from the vault's only write lock, a kill among them.

    Raises:
        InvalidInput: they are none.
        LimitExceeded: there are more than ``limits.MAX_KEYS_PER_CALL``.
    """
    if len(ids) % KEY_ID_BYTES:
        raise InvalidInput("data key ids have 16 bytes each")
    count = len(ids) // KEY_ID_BYTES
    if count > MAX_KEYS_PER_CALL:
        raise LimitExceeded(f"{count} keys in one call; at most {MAX_KEYS_PER_CALL} are allowed")


def split_ids(ids: bytes) -> list[bytes]:
    """Cut packed ids into 16-byte ones; raises as ``check_ids``."""
    check_ids(ids)
    return [ids[at : at + KEY_ID_BYTES] for at in range(0, len(ids), KEY_ID_BYTES)]


def add(vault: Vault, service: Service, ids: bytes, at: str) -> None:
    """Record ids as shredded; those that are already stay as they are."""
    wanted = split_ids(ids)
    if not wanted:
        return
    with vault.store.write() as connection:
        known = _find(connection, service, wanted)
        fresh = [key_id for key_id in dict.fromkeys(wanted) if key_id not in known]
        if not fresh:
            return
        connection.execute(
            schema.shredded_keys.insert(),
            [{"service_id": service.service_id, "key_id": key_id, "shredded_at": at} for key_id in fresh],
        )
        audit.append(connection, at, "shred", service.tenant, service.name, f"{len(fresh)} data keys")


class _Verdicts(NamedTuple):
    """The shredded ones among one service's ids; and the ids that were looked up, or None: all of them."""

    service: Service
    shredded: IdSet
    asked: IdSet | None

    def size(self) -> int:
        return len(self.shredded) + (len(self.asked) if self.asked is not None else 0)


class _Known(NamedTuple):
    """Verdicts by service id, which hold while the store's version is this; ``number`` is an audit record's.

    None of them was read before that record was the newest.
    """

    version: int
    number: int | None
    verdicts: dict[bytes, _Verdicts]


class Tombstones:
    """Answers "is it shredded?" for data keys that are asked for again and again.

    Verdicts are kept as long as no connection of any process has committed to the store since, or has but shredded
    nothing of the tenant's. What is not known while the store does not answer is not answered.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        # One tuple, replaced whole: a thread must never pair old verdicts with a new version.
        self._known = _Known(-1, None, {})

    def find(self, service: Service, ids: bytes) -> list[int]:
        """The positions of those of the packed ids that are shredded.

        Raises:
            StoreUnavailable: it is not known, and the store does not answer.
        """
        # Asked before the store is: a commit in between makes the next look ask again.
        seen = self._store.data_version()
        state = self._known
        if seen != state.version:
            state, _ = self._advance(state, seen)
        known = state.verdicts.get(service.service_id)
        if known is None or (known.asked is not None and known.asked.missing(ids)):
            known = self._look(service, ids, known)
            if known.size() + sum(map(_Verdicts.size, list(state.verdicts.values()))) > _KEPT:
                state.verdicts.clear()
            state.verdicts[service.service_id] = known
        return known.shredded.positions(ids)

    def shredded(self, service: Service, ids: bytes) -> frozenset[bytes]:
        """Those of the packed ids that are shredded; raises as ``check_ids`` and ``find``."""
        check_ids(ids)
        return frozenset([ids[at * KEY_ID_BYTES : (at + 1) * KEY_ID_BYTES] for at in self.find(service, ids)])

    def refresh(self) -> None:
        """Read again, ahead of their use, the verdicts that somebody's shredding made unknown.

        So an outage of the store that comes next finds them known.
        """
        seen, state = self._store.data_version(), self._known
        if seen == state.version or state.version == -1:
            return
        state, dropped = self._advance(state, seen)
        for service in dropped:
            state.verdicts[service.service_id] = self._look(service, b"", None)

    def _advance(self, state: _Known, seen: int) -> tuple[_Known, list[Service]]:
        """Take over the verdicts that still hold; returns the services of the others too."""
        columns = schema.audit.c
        with self._store.read() as connection:
            last = audit.last_number(connection)
            acts = sql.select(columns.tenant).where(
                columns.number > (state.number or 0), columns.act.in_(("shred", "unlink"))
            )
            few = state.number is not None and 0 <= last - state.number <= _MOST_ACTS
            acted_on = set(connection.execute(acts.distinct()).scalars()) if few else None
        # Copied only now: a verdict that another thread adds to the old ones, read before the acts were, is either
        # seen here or lost.
        verdicts = dict(state.verdicts)
        dropped = [
            each.service for each in verdicts.values() if acted_on is None or each.service.tenant in acted_on
        ]
        for service in dropped:
            del verdicts[service.service_id]
        self._known = state = _Known(seen, last, verdicts)
        return state, dropped

    def _look(self, service: Service, ids: bytes, known: _Verdicts | None) -> _Verdicts:
        """Read the verdicts on these ids; or all of the service's tombstones, if they are not many more."""
        shredded, asked = b"", b""
        if known is not None and known.asked is not None:
            shredded, asked = known.shredded.ids, known.asked.ids
            ids = known.asked.missing(ids)
        unknown = list(dict.fromkeys(split_ids(ids)))
        with self._store.read() as connection:
            every = _first(connection, service, len(unknown) + _FEW)
            if len(every) < len(unknown) + _FEW:
                return _Verdicts(service, IdSet(b"".join(every)), None)
            found = _find(connection, service, unknown)
        return _Verdicts(service, IdSet(shredded + b"".join(found)), IdSet(asked + b"".join(unknown)))


def _first(connection: sql.Connection, service: Service, most: int) -> set[bytes]:
    columns = schema.shredded_keys.c
    query = sql.select(columns.key_id).where(columns.service_id == service.service_id).limit(most)
    return set(connection.execute(query).scalars())


def _find(connection: sql.Connection, service: Service, ids: list[bytes]) -> frozenset[bytes]:
    columns = schema.shredded_keys.c
    found: set[bytes] = set()
    for start in range(0, len(ids), _CHUNK):
        query = sql.select(columns.key_id).where(
            columns.service_id == service.service_id, columns.key_id.in_(ids[start : start + _CHUNK])
        )
        found.update(connection.execute(query).scalars())
    return frozenset(found)
