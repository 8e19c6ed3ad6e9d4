# SPDX-License-Identifier: Apache-2.0
"""Shredded data keys: random ids that must never be opened again.

Invariant: a tombstone is durable before a shred is acknowledged, and it says nothing about the person.
"""

from __future__ import annotations

from typing import NamedTuple

import sqlalchemy as sql

from ..errors import InvalidInput
from ..keys import Service
from ..limits import KEY_ID_BYTES
from . import audit, schema
from .store import Store
from .vault import Vault

_CHUNK = 500
_KEPT = 65_536
_FEW = 64
"""Tombstones that are read beyond the number of ids asked about, to know them all: one read in place of many."""


def check_ids(ids: bytes) -> None:
    """Raise InvalidInput unless these are packed ids."""
    if len(ids) % KEY_ID_BYTES:
        raise InvalidInput("data key ids have 16 bytes each")


def split_ids(ids: bytes) -> list[bytes]:
    """Cut packed ids into 16-byte ones."""
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
    """The ids of one service that are known to be shredded, and those known not to be; None: all others."""

    shredded: set[bytes]
    kept: set[bytes] | None

    def size(self) -> int:
        return len(self.shredded) + len(self.kept or ())


class Tombstones:
    """Answers "is it shredded?" for data keys that are asked for again and again.

    Verdicts are kept only as long as no connection of any process has committed to the store since.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        # One tuple, replaced whole: a thread must never pair old verdicts with a new version.
        self._known: tuple[int, dict[bytes, _Verdicts]] = (-1, {})

    def find(self, service: Service, ids: bytes) -> frozenset[bytes]:
        """Those of the ids that are shredded."""
        check_ids(ids)
        # Asked before the store is: a commit in between makes the next look ask again.
        seen = self._store.data_version()
        version, services = self._known
        if seen != version or sum(map(_Verdicts.size, list(services.values()))) > _KEPT:
            services = {}
            self._known = (seen, services)
        known = services.get(service.service_id)
        if known is not None and known.kept is None and not known.shredded:
            return frozenset()
        wanted = frozenset(split_ids(ids))
        if known is None or (known.kept is not None and not wanted <= known.kept | known.shredded):
            known = self._look(service, wanted, known or _Verdicts(set(), set()))
            services[service.service_id] = known
        return wanted & known.shredded

    def _look(self, service: Service, wanted: frozenset[bytes], known: _Verdicts) -> _Verdicts:
        """Read the verdicts on these ids; or all of the service's tombstones, if they are not many more."""
        unknown = wanted - known.shredded - (known.kept or set())
        with self._store.read() as connection:
            every = _first(connection, service, len(unknown) + _FEW)
            if len(every) < len(unknown) + _FEW:
                return _Verdicts(every, None)
            found = _find(connection, service, list(unknown))
        # New sets: another thread may be reading the old ones.
        return _Verdicts(known.shredded | found, (known.kept or set()) | (unknown - found))


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
