# SPDX-License-Identifier: Apache-2.0
"""The audit chain: one record of every key-management act, each holding the digest of the one before.

Invariant: a record is written in the transaction of its act, so that neither is there without the other.
Changing, removing or reordering a record breaks the chain; cutting off its end does not show (signed
checkpoints are to close that). What somebody had done over the network names them.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Final

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from . import schema

START: Final = bytes(32)

MAX_DETAIL: Final = 1024

_actor: ContextVar[str] = ContextVar("openkcm-actor", default="")


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """One act: what was done to which tenant and service, and when (UTC)."""

    number: int
    at: str
    act: str
    tenant: str
    service: str
    detail: str


def digest(record: AuditRecord, previous: bytes) -> bytes:
    """SHA-256 over the previous digest and every field, each with its length before it."""
    fields = (record.number, record.at, record.act, record.tenant, record.service, record.detail)
    encoded = [str(field).encode() for field in fields]
    return hashlib.sha256(
        previous + b"".join(len(field).to_bytes(4, "big") + field for field in encoded)
    ).digest()


@contextlib.contextmanager
def acting(identity: str) -> Iterator[None]:
    """Name who has the acts done that this thread records meanwhile; an embedded Core's acts are its process's own."""
    token = _actor.set(identity)
    try:
        yield
    finally:
        _actor.reset(token)


def append(
    connection: Connection, at: str, act: str, tenant: str = "", service: str = "", detail: str = ""
) -> None:
    """Append a record within the caller's write transaction; see ``acting`` for what is added to ``detail``."""
    if actor := _actor.get():
        by = f"by {actor}"
        detail = f"{detail[: MAX_DETAIL - len(by) - 2]}; {by}" if detail else by
    last = connection.execute(
        sql.select(schema.audit.c.number, schema.audit.c.digest)
        .order_by(schema.audit.c.number.desc())
        .limit(1)
    ).first()
    number, previous = (last.number + 1, last.digest) if last else (1, START)
    _insert(connection, AuditRecord(number, at, act, tenant, service, detail), previous)


def begin(connection: Connection, at: str, act: str, detail: str) -> None:
    """Write the first record within the caller's write transaction; IntegrityError if another process did."""
    _insert(connection, AuditRecord(1, at, act, "", "", detail), START)


def _insert(connection: Connection, record: AuditRecord, previous: bytes) -> None:
    connection.execute(
        schema.audit.insert().values(**asdict(record), previous=previous, digest=digest(record, previous))
    )


def last_number(connection: Connection) -> int:
    """The number of the newest record, 0 if there is none."""
    return int(connection.execute(sql.select(sql.func.max(schema.audit.c.number))).scalar() or 0)


def records(connection: Connection, after: int = 0, most: int | None = None) -> list[AuditRecord]:
    """The records behind one, oldest first: all of them, or the first so many."""
    columns = schema.audit.c
    rows = connection.execute(
        sql.select(columns.number, columns.at, columns.act, columns.tenant, columns.service, columns.detail)
        .where(columns.number > after)
        .order_by(columns.number)
        .limit(most)
    )
    return [AuditRecord(*row) for row in rows]


def verify(connection: Connection) -> int | None:
    """Check the chain; returns the number of the first record that does not fit, or None."""
    previous = START
    expected = 1
    for row in connection.execute(sql.select(schema.audit).order_by(schema.audit.c.number)):
        record = AuditRecord(row.number, row.at, row.act, row.tenant, row.service, row.detail)
        if row.number != expected or row.previous != previous or row.digest != digest(record, previous):
            return int(row.number)
        previous = row.digest
        expected += 1
    return None
