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


def split_ids(ids: bytes) -> list[bytes]:
    """Cut packed ids into 16-byte ones."""
    if len(ids) % KEY_ID_BYTES:
        raise InvalidInput("data key ids have 16 bytes each")
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
    """The ids of one service that are known not to be shredded, and those known to be."""

    kept: set[bytes]
    shredded: set[bytes]

    def size(self) -> int:
        return len(self.kept) + len(self.shredded)


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
        wanted = frozenset(split_ids(ids))
        # Asked before the store is: a commit in between makes the next look ask again.
        seen = self._store.data_version()
        version, services = self._known
        if seen != version or sum(map(_Verdicts.size, list(services.values()))) > _KEPT:
            services = {}
            self._known = (seen, services)
        known = services.setdefault(service.service_id, _Verdicts(set(), set()))
        unknown = wanted - known.kept - known.shredded
        if unknown:
            with self._store.read() as connection:
                found = _find(connection, service, list(unknown))
            known.shredded.update(found)
            known.kept.update(unknown - found)
        return wanted & known.shredded


def _find(connection: sql.Connection, service: Service, ids: list[bytes]) -> frozenset[bytes]:
    columns = schema.shredded_keys.c
    found: set[bytes] = set()
    for start in range(0, len(ids), _CHUNK):
        query = sql.select(columns.key_id).where(
            columns.service_id == service.service_id, columns.key_id.in_(ids[start : start + _CHUNK])
        )
        found.update(connection.execute(query).scalars())
    return frozenset(found)
