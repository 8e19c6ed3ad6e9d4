# SPDX-License-Identifier: Apache-2.0
"""Makes a vault of very many tenants, faster than one act a tenant could.

Every key in it is real: made, sealed, wrapped by the tenant's root and wrapped under its tenant key by the Core's own
functions, with the audit chain that the acts would have left. Only the transactions are few. What comes out is what
``link_tenant`` and ``create_service`` make; ``core.verify_audit`` and a first use of any key hold it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy.engine import Connection

import openkcm
from openkcm.clock import utc_now
from openkcm.core import audit, schema
from openkcm.core.opening import seal_tenant_key, wrap_service_key, wrap_under_root
from openkcm.core.rows import LIVE
from openkcm.core.vault import Vault
from openkcm.crypto import generate_wrapping_key, random_bytes
from openkcm.keys import KeyState, TenantState
from openkcm.limits import SERVICE_ID_BYTES

TENANTS_A_TRANSACTION = 2000


def tenant_name(number: int) -> str:
    """The name of a tenant by its number, from 0."""
    return f"tenant-{number:06d}"


def service_name(number: int) -> str:
    """The name of a tenant's service by its number, from 0."""
    return f"service-{number}"


def make_large_vault(path: Path, tenants: int, services: int) -> None:
    """Make a vault, all of whose tenants have one development root beside it.

    Args:
        path: the database, which is not there yet.
        services: how many each tenant has.
    """
    with openkcm.Core.open(f"sqlite:///{path}") as core:
        vault, region = core._vault, core.region
        uri = f"local:{path.with_suffix('.root')}"
        vault.root(uri, create=True)
        for start in range(0, tenants, TENANTS_A_TRANSACTION):
            numbers = range(start, min(start + TENANTS_A_TRANSACTION, tenants))
            made = [_Rows(vault, tenant_name(number), region, uri, services) for number in numbers]
            with vault.store.write() as connection:
                _insert(connection, made)
        vault.store.checkpoint()


class _Rows:
    """One tenant's rows."""

    def __init__(self, vault: Vault, tenant: str, region: str, root_uri: str, services: int) -> None:
        at, root = utc_now(), vault.root(root_uri)
        key = generate_wrapping_key()
        sealed = seal_tenant_key(vault.seal(), key, tenant, region, 1)
        self.tenant = {
            "tenant": tenant,
            "region": region,
            "root_uri": root.uri,
            "state": LIVE,
            "reason": "",
            "liveness": TenantState.LIVE,
            "liveness_reason": "",
            "generation": 1,
            "created_at": at,
            "changed_at": at,
        }
        self.tenant_key = {
            "tenant": tenant,
            "version": 1,
            "state": KeyState.ACTIVE,
            "created_at": at,
            "wrapped": wrap_under_root(root, sealed, tenant, region, 1),
        }
        self.services: list[dict[str, Any]] = []
        self.service_keys: list[dict[str, Any]] = []
        self.acts: list[tuple[str, ...]] = [(at, "link", tenant, "", f"root {root.uri}")]
        for number in range(services):
            service_id, child = random_bytes(SERVICE_ID_BYTES), generate_wrapping_key()
            wrapped = wrap_service_key(key, child, tenant, region, service_id, 1)
            child.wipe()
            self.services.append(
                {
                    "service_id": service_id,
                    "tenant": tenant,
                    "name": service_name(number),
                    "active_version": 1,
                    "lease": 0.0,
                    "created_at": at,
                }
            )
            self.service_keys.append(
                {
                    "service_id": service_id,
                    "version": 1,
                    "tenant": tenant,
                    "tenant_key_version": 1,
                    "state": KeyState.ACTIVE,
                    "wrapped": wrapped,
                    "created_at": at,
                }
            )
            self.acts.append((at, "create-service", tenant, service_name(number), ""))
        key.wipe()


def _insert(connection: Connection, made: Sequence[_Rows]) -> None:
    connection.execute(schema.tenants.insert(), [each.tenant for each in made])
    connection.execute(schema.tenant_keys.insert(), [each.tenant_key for each in made])
    if any(each.services for each in made):
        connection.execute(schema.services.insert(), [row for each in made for row in each.services])
        connection.execute(schema.service_keys.insert(), [row for each in made for row in each.service_keys])
    acts = [act for each in made for act in each.acts]
    connection.execute(schema.audit.insert(), list(_chain(connection, acts)))


def _chain(connection: Connection, acts: Sequence[tuple[str, ...]]) -> Iterator[dict[str, Any]]:
    columns = schema.audit.c
    last = connection.execute(
        sql.select(columns.number, columns.digest).order_by(columns.number.desc()).limit(1)
    ).one()
    number, previous = last.number, last.digest
    for act in acts:
        number += 1
        record = audit.AuditRecord(number, *act)
        digest = audit.digest(record, previous)
        yield {
            "number": number,
            "at": record.at,
            "act": record.act,
            "tenant": record.tenant,
            "service": record.service,
            "detail": record.detail,
            "previous": previous,
            "digest": digest,
        }
        previous = digest
