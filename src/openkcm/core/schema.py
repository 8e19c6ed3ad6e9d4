# SPDX-License-Identifier: Apache-2.0
"""The tables of the Core's store.

Invariant: nothing in them opens anything by itself. Wrapped keys are opened only with the customer's root
and the seal key, tombstones hold random ids and no personal data, and the audit chain holds no secret.
The Alembic scripts in ``migrations`` make these tables; a test holds that both agree.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

HEAD: Final = "0004"
"""The newest Alembic revision that this build knows."""

metadata: Final = MetaData()

vault = Table(
    "vault",
    metadata,
    Column("vault_id", LargeBinary(16), primary_key=True),
    Column("region", String(128), nullable=False),
    Column("seal_check", LargeBinary, nullable=False),
    Column("created_at", String(32), nullable=False),
)

tenants = Table(
    "tenants",
    metadata,
    Column("tenant", String(128), primary_key=True),
    Column("region", String(128), nullable=False),
    Column("root_uri", String(1024), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", String(256), nullable=False, default=""),
    # What the root last said to any process: live, grace or dark. A report, never a reason to open or to refuse.
    Column("liveness", String(16), nullable=False, default="live"),
    Column("liveness_reason", String(256), nullable=False, default=""),
    # Grows with every change of state or keys, so that another process sees at a glance what it must drop.
    Column("generation", Integer, nullable=False),
    Column("created_at", String(32), nullable=False),
    Column("changed_at", String(32), nullable=False),
)

tenant_keys = Table(
    "tenant_keys",
    metadata,
    Column("tenant", String(128), ForeignKey("tenants.tenant"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("state", String(16), nullable=False),
    Column("wrapped", LargeBinary, nullable=False),
    Column("created_at", String(32), nullable=False),
)

services = Table(
    "services",
    metadata,
    Column("service_id", LargeBinary(12), primary_key=True),
    Column("tenant", String(128), ForeignKey("tenants.tenant"), nullable=False),
    Column("name", String(128), nullable=False),
    Column("active_version", Integer, nullable=False),
    # For how many seconds Gateways may keep a data key that was opened for them; 0 is strict.
    Column("lease", Float, nullable=False, default=0.0),
    Column("created_at", String(32), nullable=False),
    UniqueConstraint("tenant", "name"),
)

service_keys = Table(
    "service_keys",
    metadata,
    Column("service_id", LargeBinary(12), ForeignKey("services.service_id"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("tenant_key_version", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("wrapped", LargeBinary, nullable=False),
    Column("created_at", String(32), nullable=False),
    ForeignKeyConstraint(["tenant", "tenant_key_version"], ["tenant_keys.tenant", "tenant_keys.version"]),
    # A tenant's acts and its status read its own rows only, and so do the checks of the foreign key.
    Index("service_keys_by_tenant", "tenant", "tenant_key_version"),
)

shredded_keys = Table(
    "shredded_keys",
    metadata,
    Column("service_id", LargeBinary(12), primary_key=True),
    Column("key_id", LargeBinary(16), primary_key=True),
    Column("shredded_at", String(32), nullable=False),
)

# Who may do what over the network; "*" is every tenant, or every service.
grants = Table(
    "grants",
    metadata,
    Column("identity", String(512), primary_key=True),
    Column("tenant", String(128), primary_key=True),
    Column("service", String(128), primary_key=True),
    Column("verb", String(16), primary_key=True),
    Column("created_at", String(32), nullable=False),
)

revoked_certificates = Table(
    "revoked_certificates",
    metadata,
    # SHA-256 of the whole certificate, and of its signed part; the latter is empty where only the former was told.
    Column("fingerprint", LargeBinary(32), primary_key=True),
    Column("signed", LargeBinary(32), nullable=False),
    Column("identity", String(512), nullable=False),
    Column("serial", String(64), nullable=False),
    Column("reason", String(256), nullable=False),
    Column("revoked_at", String(32), nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("at", String(32), nullable=False),
    Column("act", String(32), nullable=False),
    Column("tenant", String(128), nullable=False),
    Column("service", String(128), nullable=False),
    Column("detail", String(1024), nullable=False),
    Column("previous", LargeBinary(32), nullable=False),
    Column("digest", LargeBinary(32), nullable=False),
)
