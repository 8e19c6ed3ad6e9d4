# SPDX-License-Identifier: Apache-2.0
"""The acts on tenants: link, kill, restore, unlink, rotate, another root, and asking the root.

Invariant: that of ``act``; and a kill zeroes first, then tells, then records.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sql
from sqlalchemy.engine import Connection

from ..crypto import WrappingKey, generate_wrapping_key
from ..errors import (
    AlreadyExists,
    InvalidInput,
    KeyDestroyed,
    LimitExceeded,
    StoreUnavailable,
    TenantNotFound,
)
from ..keys import KeyState, TenantState
from . import audit, schema
from .act import attempt, change_tenant, check_unchanged, linked_region
from .liveness import Probe
from .opening import open_service_key, seal_tenant_key, wrap_service_key, wrap_under_root
from .rows import KILLED, LIVE, UNLINKED, read_tenant, storable
from .vault import OpenTenant, Vault

MAX_ROOT_URI: Final = 1000


def link_tenant(vault: Vault, tenant: str, root_uri: str, region: str, at: str) -> None:
    """Make a tenant key and wrap it under the seal key and the root."""
    with vault.store.read() as connection:
        _refuse_linked(connection, tenant)
    root = vault.root(check_root(root_uri), create=True)
    key = generate_wrapping_key()
    try:
        sealed = seal_tenant_key(vault.seal(), key, tenant, region, 1)
    finally:
        key.wipe()
    wrapped = wrap_under_root(root, sealed, tenant, region, 1)
    with vault.store.write() as connection:
        before = _refuse_linked(connection, tenant)
        row = {
            "region": region,
            "root_uri": check_root(root.uri),
            "state": LIVE,
            "reason": "",
            "liveness": TenantState.LIVE,
            "liveness_reason": "",
            "generation": before + 1,
            "created_at": at,
            "changed_at": at,
        }
        if before:
            connection.execute(schema.tenants.update().where(schema.tenants.c.tenant == tenant).values(**row))
        else:
            connection.execute(schema.tenants.insert().values(tenant=tenant, **row))
        connection.execute(
            schema.tenant_keys.insert().values(
                tenant=tenant, version=1, state=KeyState.ACTIVE, wrapped=wrapped, created_at=at
            )
        )
        audit.append(connection, at, "link", tenant, detail=f"root {root.uri}")
    vault.go_live(tenant)


def kill(vault: Vault, tenant: str, reason: str, at: str) -> None:
    """Zero, tell, record: in this order."""
    # Whatever was given as a reason, it must not stand in the way.
    reason = storable(str(reason))
    vault.go_dark(tenant, killed=reason)
    try:
        with vault.store.write() as connection:
            linked_region(connection, tenant)
            change_tenant(connection, tenant, at, state=KILLED, reason=reason)
            audit.append(connection, at, "kill", tenant, detail=reason)
    except (TenantNotFound, KeyDestroyed):
        vault.go_live(tenant)
        raise
    except StoreUnavailable as error:
        raise StoreUnavailable(
            f"the tenant {tenant} is dark in this process, but that could not be recorded, so other processes and a "
            f"restart do not know: {error}. Repeat the kill",
            retryable=error.retryable,
        ) from None
    vault.settle_dark(tenant)


def restore(vault: Vault, tenant: str, at: str) -> None:
    """Open the tenant key through its root, and only then call the tenant live.

    Not tried again when overtaken: what came between may have been a kill, which stands.
    """

    def act() -> None:
        with vault.store.read() as connection:
            row = read_tenant(connection, tenant)
        vault.open_through_root(row)[0].wipe()
        with vault.store.write() as connection:
            check_unchanged(connection, row)
            generation = change_tenant(
                connection, tenant, at, state=LIVE, reason="", liveness=TenantState.LIVE, liveness_reason=""
            )
            audit.append(connection, at, "restore", tenant)
        vault.changed(tenant, generation)
        vault.go_live(tenant)

    attempt(vault, tenant, act, tries=1)


def probe(vault: Vault, tenant: str) -> Probe:
    """Ask a tenant's root now, whether its key is open or not."""
    with vault.store.read() as connection:
        row = read_tenant(connection, tenant)
    if row.state != LIVE or vault.dark_here(tenant) is not None:
        vault.check_live(row)
    return vault.liveness.probe_now(row)


def probe_under(vault: Vault, root_uri: str) -> dict[str, Probe]:
    """Ask the root of every live tenant under a URI, however that is spelt."""
    root_uri = vault.root(check_root(root_uri)).uri
    columns = schema.tenants.c
    with vault.store.read() as connection:
        names = connection.execute(
            sql.select(columns.tenant)
            .where(columns.root_uri == root_uri, columns.state == LIVE)
            .order_by(columns.tenant)
        ).scalars()
        rows = [read_tenant(connection, name) for name in names.all()]
    return vault.liveness.probe_all([row for row in rows if vault.dark_here(row.tenant) is None])


def unlink(vault: Vault, tenant: str, at: str) -> None:
    """Delete every wrapped key of the tenant; what the database then leaves of it, its store's module says."""
    with vault.store.read() as connection:
        linked_region(connection, tenant)
    killed = vault.dark_here(tenant)  # a kill that could not be recorded stands, whatever becomes of this
    vault.go_dark(tenant, killed="being unlinked")
    try:
        with vault.store.write() as connection:
            linked_region(connection, tenant)
            _delete_keys(connection, tenant)
            # Who is linked under this name later is somebody else.
            connection.execute(schema.grants.delete().where(schema.grants.c.tenant == tenant))
            change_tenant(connection, tenant, at, state=UNLINKED, reason="unlinked")
            audit.append(connection, at, "unlink", tenant)
    except BaseException:
        if killed is None:
            vault.go_live(tenant)  # unlike a kill, an unlink that failed was none
        else:
            vault.go_dark(tenant, killed=killed)
        raise
    vault.settle_dark(tenant)
    vault.store.checkpoint()


def _delete_keys(connection: Connection, tenant: str) -> None:
    services = sql.select(schema.services.c.service_id).where(schema.services.c.tenant == tenant)
    for table in (schema.service_keys, schema.shredded_keys):
        connection.execute(table.delete().where(table.c.service_id.in_(services)))
    for table in (schema.services, schema.tenant_keys):
        connection.execute(table.delete().where(table.c.tenant == tenant))


def rotate_tenant(vault: Vault, tenant: str, at: str) -> int:
    """Move every service key under a new tenant key and destroy the old one."""

    def act() -> int:
        opened = vault.open_tenant(tenant)
        row, version = opened.row, opened.row.key_version + 1
        with vault.ring.passing(tenant, opened.epoch, generate_wrapping_key()) as key:
            sealed = seal_tenant_key(vault.seal(), key, tenant, row.region, version)
            wrapped = wrap_under_root(vault.root(row.root_uri), sealed, tenant, row.region, version)
            with vault.store.write() as connection:
                check_unchanged(connection, row)
                connection.execute(
                    schema.tenant_keys.insert().values(
                        tenant=tenant, version=version, state=KeyState.ACTIVE, wrapped=wrapped, created_at=at
                    )
                )
                _rewrap_service_keys(connection, opened, key, version)
                connection.execute(
                    schema.tenant_keys.update()
                    .where(
                        schema.tenant_keys.c.tenant == tenant, schema.tenant_keys.c.version == row.key_version
                    )
                    .values(state=KeyState.DESTROYED, wrapped=b"")
                )
                generation = change_tenant(connection, tenant, at)
                audit.append(connection, at, "rotate-tenant", tenant, detail=f"version {version}")
        vault.changed(tenant, generation)
        return version

    version = attempt(vault, tenant, act)
    vault.store.checkpoint()
    return version


def _rewrap_service_keys(connection: Connection, opened: OpenTenant, new: WrappingKey, version: int) -> None:
    keys, row = schema.service_keys.c, opened.row
    held = connection.execute(sql.select(schema.service_keys).where(keys.tenant == row.tenant)).all()
    moved: list[dict[str, object]] = []
    for each in held:
        wrapped = b""
        if each.state != KeyState.DESTROYED:
            place = (row.tenant, row.region, each.service_id, each.version)
            key = open_service_key(opened.key, each.wrapped, *place)
            wrapped = wrap_service_key(new, key, *place)
            key.wipe()
        moved.append({"of": each.service_id, "numbered": each.version, "blob": wrapped})
    if moved:  # all at once: a round trip for each of many would hold up every other writer
        connection.execute(
            schema.service_keys.update()
            .where(keys.service_id == sql.bindparam("of"), keys.version == sql.bindparam("numbered"))
            .values(wrapped=sql.bindparam("blob"), tenant_key_version=version),
            moved,
        )


def replace_root(vault: Vault, tenant: str, root_uri: str, at: str) -> None:
    """Wrap the tenant key under another root, having opened it through the old one."""
    root = vault.root(check_root(root_uri), create=True)

    def act() -> None:
        with vault.store.read() as connection:
            row = read_tenant(connection, tenant)
        vault.check_live(row)
        key, _ = vault.open_through_root(row)
        try:
            sealed = seal_tenant_key(vault.seal(), key, tenant, row.region, row.key_version)
        finally:
            key.wipe()
        wrapped = wrap_under_root(root, sealed, tenant, row.region, row.key_version)
        with vault.store.write() as connection:
            check_unchanged(connection, row)
            connection.execute(
                schema.tenant_keys.update()
                .where(schema.tenant_keys.c.tenant == tenant, schema.tenant_keys.c.version == row.key_version)
                .values(wrapped=wrapped)
            )
            generation = change_tenant(connection, tenant, at, root_uri=check_root(root.uri))
            audit.append(connection, at, "replace-root", tenant, detail=f"root {root.uri}")
        vault.changed(tenant, generation)

    attempt(vault, tenant, act)
    vault.store.checkpoint()


def check_root(uri: object) -> str:
    if not isinstance(uri, str):
        raise InvalidInput(f"a root is a URI in text, not {type(uri).__name__}")
    try:
        uri.encode()
    except UnicodeEncodeError:
        raise InvalidInput("a root's URI must be text that UTF-8 can carry") from None
    if len(uri) > MAX_ROOT_URI:
        raise LimitExceeded(f"a root URI takes at most {MAX_ROOT_URI} characters, not {len(uri)}")
    return uri


def _refuse_linked(connection: Connection, tenant: str) -> int:
    """Raise AlreadyExists if the tenant is linked; else the generation it once had, or 0."""
    columns = schema.tenants.c
    found = connection.execute(
        sql.select(columns.state, columns.generation).where(columns.tenant == tenant)
    ).first()
    if found is not None and found.state != UNLINKED:
        raise AlreadyExists(f"the tenant {tenant} is linked already; 'openkcm status' shows it")
    return int(found.generation) if found is not None else 0
