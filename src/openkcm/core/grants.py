# SPDX-License-Identifier: Apache-2.0
"""Who may do what over the network, and which certificates are refused: the acts, and fast answers.

Invariant: nobody may do anything that was not granted. Every change is one act with its audit record in its
transaction. An answer is at most a second older than the store while that answers, and at most ``OUTAGE_SECONDS``
old while it does not; after that, and before the first reading, there is none.

A Core embedded in a process asks nobody: whoever runs in it holds the vault anyway.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from ..errors import AccessDenied, FormatError, InvalidInput, StoreUnavailable
from ..identity import check_identity, fingerprints_of, identity_of, parse_certificate
from ..keys import EVERY, Verb, check_name
from . import audit, schema
from .rows import MAX_REASON
from .store import Store

OUTAGE_SECONDS: Final = 3600.0
"""For how long what was last known is answered with while the store does not answer, as long as the longest grace.

Without a store nobody can grant or withdraw anything here; but another Core may reach it where this one does not."""

READ_SECONDS: Final = 60.0
"""How often the store itself is read, even if it says that nothing changed: it might be saying so from memory."""

RETRY_SECONDS: Final = 1.0
"""After the store did not answer, whoever asks does not wait for it again for so long."""

FINGERPRINT_BYTES: Final = 32
_MAX_SERIAL: Final = 64
_CHANGES: Final = ("grant", "withdraw", "revoke-certificate", "unlink")
"""The acts in whose transactions these tables change."""


@dataclass(frozen=True, slots=True)
class Grant:
    """That an identity may do one thing with a service of a tenant; ``*`` is every one."""

    identity: str
    tenant: str
    service: str
    verb: Verb
    created_at: str


@dataclass(frozen=True, slots=True)
class RevokedCertificate:
    """A certificate that is refused, whoever signed it; identity and serial are empty where they were not known."""

    fingerprint: bytes
    identity: str
    serial: str
    reason: str
    revoked_at: str


# ---- acts ------------------------------------------------------------------------------------------------------


def grant(
    store: Store, identity: str, tenant: str, service: str, verbs: Iterable[Verb | str], at: str
) -> tuple[Verb, ...]:
    """Let an identity do things; returns those verbs that it could not do before by this very grant."""
    place = _place(identity, tenant, service)
    wanted = check_verbs(verbs)
    with store.write() as connection:
        held = _held(connection, place)
        fresh = tuple(verb for verb in wanted if verb not in held)
        if fresh:
            rows = [{**place, "verb": verb.value, "created_at": at} for verb in fresh]
            connection.execute(schema.grants.insert(), rows)
            _record(connection, at, "grant", place, fresh)
    return fresh


def withdraw(
    store: Store, identity: str, tenant: str, service: str, verbs: Iterable[Verb | str] | None, at: str
) -> tuple[Verb, ...]:
    """Take a grant back, by default with all its verbs; returns those that were taken."""
    place = _place(identity, tenant, service)
    wanted = tuple(Verb) if verbs is None else check_verbs(verbs)
    with store.write() as connection:
        held = _held(connection, place)
        taken = tuple(verb for verb in wanted if verb in held)
        if taken:
            condition = _at(place) & schema.grants.c.verb.in_([verb.value for verb in taken])
            connection.execute(schema.grants.delete().where(condition))
            _record(connection, at, "withdraw", place, taken)
    return taken


def read_grants(connection: Connection, identity: str | None = None) -> list[Grant]:
    """Every grant, or those of one identity, sorted by identity, tenant, service and verb."""
    columns = schema.grants.c
    query = sql.select(columns.identity, columns.tenant, columns.service, columns.verb, columns.created_at)
    # A newer version's verbs mean nothing to this one, and must not keep it from reading the others.
    query = query.where(columns.verb.in_([verb.value for verb in Verb]))
    if identity is not None:
        query = query.where(columns.identity == identity)
    rows = connection.execute(query.order_by(columns.identity, columns.tenant, columns.service, columns.verb))
    return [Grant(row.identity, row.tenant, row.service, Verb(row.verb), row.created_at) for row in rows]


def revoke_certificate(store: Store, certificate: bytes, reason: str, at: str) -> bytes:
    """Refuse a certificate from now on; returns its fingerprint."""
    row = _revocation(certificate, reason, at)
    columns = schema.revoked_certificates.c
    same = columns.fingerprint == row.fingerprint
    with store.write() as connection:
        known = connection.execute(sql.select(columns.signed).where(same)).first()
        if known is not None and (known.signed or not row.signed):
            return row.fingerprint
        if known is not None:
            # It was revoked by its fingerprint alone; now it cannot be shown in another form either.
            connection.execute(schema.revoked_certificates.delete().where(same))
        connection.execute(schema.revoked_certificates.insert().values(**row._asdict()))
        detail = f"{row.identity or 'an unknown identity'}, SHA-256 {row.fingerprint.hex()}: {row.reason}"
        audit.append(connection, at, "revoke-certificate", detail=detail)
    return row.fingerprint


def read_revoked(connection: Connection) -> list[RevokedCertificate]:
    """Every revoked certificate, the newest first."""
    columns = schema.revoked_certificates.c
    rows = connection.execute(
        sql.select(
            columns.fingerprint, columns.identity, columns.serial, columns.reason, columns.revoked_at
        ).order_by(columns.revoked_at.desc(), columns.fingerprint)
    )
    return [RevokedCertificate(*row) for row in rows]


def check_verbs(verbs: Iterable[Verb | str]) -> tuple[Verb, ...]:
    """Return verbs once each, in the order of ``Verb``.

    Raises:
        InvalidInput: there is none, or one that is no verb.
    """
    given = {verbs} if isinstance(verbs, str) else set(verbs)
    known = {verb.value for verb in Verb}
    if not given or not given <= known:
        raise InvalidInput(f"a grant has one or more of the verbs {', '.join(Verb)}")
    return tuple(verb for verb in Verb if verb in given)


def _place(identity: str, tenant: str, service: str) -> dict[str, str]:
    return {
        "identity": check_identity(identity),
        "tenant": tenant if tenant == EVERY else check_name(tenant, "tenant"),
        "service": service if service == EVERY else check_name(service, "service"),
    }


def _at(place: dict[str, str]) -> sql.ColumnElement[bool]:
    columns = schema.grants.c
    return sql.and_(*(columns[name] == value for name, value in place.items()))


def _held(connection: Connection, place: dict[str, str]) -> set[str]:
    return set(connection.execute(sql.select(schema.grants.c.verb).where(_at(place))).scalars())


def _record(
    connection: Connection, at: str, act: str, place: dict[str, str], verbs: tuple[Verb, ...]
) -> None:
    tenant, service = place["tenant"], place["service"]
    audit.append(
        connection,
        at,
        act,
        "" if tenant == EVERY else tenant,
        "" if service == EVERY else service,
        f"{place['identity']}: {', '.join(verbs)} on {tenant} {service}",
    )


class _Revocation(NamedTuple):
    """A row of the table."""

    fingerprint: bytes
    signed: bytes
    identity: str
    serial: str
    reason: str
    revoked_at: str


def _revocation(certificate: bytes, reason: str, at: str) -> _Revocation:
    """From a certificate in DER, or from its fingerprint."""
    # Whatever was given as a reason, it must not stand in the way; nor must a name that is nobody's.
    reason = str(reason).encode("utf-8", "replace").decode()[:MAX_REASON]
    if not isinstance(certificate, bytes):
        raise InvalidInput("a certificate is revoked by its DER bytes, or by the 32 bytes of its fingerprint")
    if len(certificate) == FINGERPRINT_BYTES:
        return _Revocation(certificate, b"", "", "", reason, at)
    parsed = parse_certificate(certificate)
    identity = ""
    with contextlib.suppress(AccessDenied, FormatError):
        identity = identity_of(parsed)
    serial = f"{parsed.serial_number:x}"[:_MAX_SERIAL]
    return _Revocation(*fingerprints_of(parsed), identity, serial, reason, at)


# ---- answers ---------------------------------------------------------------------------------------------------


class Grants:
    """Answers "may it?" and "is it revoked?" from memory, in about a microsecond.

    ``look`` is to be called over and over by a thread; whoever asks looks for himself if that was not done for twice
    the interval, but never while another thread is looking already.

    Args:
        clock: seconds that only ever grow.
        interval: seconds between looks at whether the store changed.
    """

    def __init__(self, store: Store, clock: Callable[[], float], interval: float) -> None:
        self._store = store
        self._clock = clock
        self._interval = interval
        self._looking = threading.Lock()
        # Each replaced whole, never changed: others read them meanwhile.
        self._allowed: dict[tuple[str, str], frozenset[tuple[str, str]]] = {}
        self._revoked: frozenset[bytes] = frozenset()
        self.changes = 0
        """Grows whenever who may do what, or what is revoked, has changed."""
        self._version: int | None = None
        self._number = 0
        never = float("-inf")
        self._read_at = self._until = self._next = self._due = never

    def allows(self, identity: str, tenant: str, service: str, verb: Verb) -> bool:
        """Whether an identity may do this.

        Args:
            tenant: a name, or ``*`` for what is about all tenants, which takes a grant on ``*``.
            service: a name, or ``*`` for what is about the whole tenant, which takes a grant on ``*``.

        Raises:
            StoreUnavailable: that is not known, or too old to go by.
        """
        if self._clock() > self._due:
            self._catch_up()
        places = self._allowed.get((identity, verb))
        return places is not None and (
            (tenant, service) in places
            or (tenant, EVERY) in places
            or (EVERY, EVERY) in places
            or (EVERY, service) in places
        )

    def sees(self, identity: str, tenant: str) -> bool:
        """Whether an identity may do anything with any data key of a tenant, and so hears of its changes.

        Args:
            tenant: a name, or ``*`` for any tenant at all.

        Raises:
            StoreUnavailable: that is not known, or too old to go by.
        """
        if self._clock() > self._due:
            self._catch_up()
        for verb in (Verb.WRAP, Verb.UNWRAP, Verb.SHRED):
            places = self._allowed.get((identity, verb), ())
            if any(tenant == EVERY or place[0] in (tenant, EVERY) for place in places):
                return True
        return False

    def administers(self, identity: str) -> bool:
        """Whether an identity may administer anything at all.

        Raises:
            StoreUnavailable: that is not known, or too old to go by.
        """
        if self._clock() > self._due:
            self._catch_up()
        return bool(self._allowed.get((identity, Verb.ADMINISTER)))

    def is_revoked(self, *fingerprints: bytes) -> bool:
        """Whether a certificate is refused.

        Args:
            fingerprints: both of ``identity.fingerprints_of(leaf)``: the first alone can be got around.

        Raises:
            StoreUnavailable: that is not known, or too old to go by.
        """
        if self._clock() > self._due:
            self._catch_up()
        return not self._revoked.isdisjoint(fingerprints)

    def look(self) -> None:
        """Learn what changed in the store.

        Raises:
            StoreUnavailable: it does not answer; what was known stays known, to its end.
        """
        with self._looking:
            self._look()

    def _catch_up(self) -> None:
        """Look, unless somebody is looking already or did not get an answer just now; raise if nothing is known."""
        if self._looking.acquire(blocking=self._clock() > self._until):
            try:
                if self._clock() > self._next:
                    with contextlib.suppress(StoreUnavailable):
                        self._look()
            finally:
                self._looking.release()
        if self._clock() > self._until:
            raise StoreUnavailable(
                "who may do what is not known, since the vault's store does not answer; try again"
            )

    def _look(self) -> None:
        now = self._clock()
        wait = RETRY_SECONDS
        try:
            # Asked before the store is: a commit in between makes the next look read again.
            version = self._store.data_version()
            if version != self._version or now - self._read_at > READ_SECONDS:
                self._read(version)
                self._read_at, self._until = now, now + OUTAGE_SECONDS
            wait = 2 * self._interval
        finally:
            self._next = now + wait
            self._due = min(self._next, self._until)

    def _read(self, version: int) -> None:
        with self._store.read() as connection:
            number = audit.last_number(connection)
            if not self._same(connection, version, number):
                allowed: dict[tuple[str, str], set[tuple[str, str]]] = {}
                for each in read_grants(connection):
                    allowed.setdefault((each.identity, each.verb), set()).add((each.tenant, each.service))
                columns = schema.revoked_certificates.c
                revoked = connection.execute(sql.select(columns.fingerprint, columns.signed)).all()
                self._allowed = {key: frozenset(places) for key, places in allowed.items()}
                self._revoked = frozenset(name for row in revoked for name in row if name)
                self.changes += 1
        self._version, self._number = version, number

    def _same(self, connection: Connection, version: int, number: int) -> bool:
        """Whether nothing here changed since it was read: what moved the store was another kind of act.

        Where it moved without any record, or its records went back, that is not known.
        """
        if self._version is None:
            return False
        if number == self._number:
            return version == self._version
        columns = schema.audit.c
        changes = sql.select(columns.number).where(columns.number > self._number, columns.act.in_(_CHANGES))
        return number > self._number and connection.execute(changes.limit(1)).first() is None
