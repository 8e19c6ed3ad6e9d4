# SPDX-License-Identifier: Apache-2.0
"""The first schema."""

import sqlalchemy as sql
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make every table."""
    op.create_table(
        "vault",
        sql.Column("vault_id", sql.LargeBinary(16), primary_key=True),
        sql.Column("region", sql.String(128), nullable=False),
        sql.Column("seal_check", sql.LargeBinary, nullable=False),
        sql.Column("created_at", sql.String(32), nullable=False),
    )
    op.create_table(
        "tenants",
        sql.Column("tenant", sql.String(128), primary_key=True),
        sql.Column("region", sql.String(128), nullable=False),
        sql.Column("root_uri", sql.String(1024), nullable=False),
        sql.Column("state", sql.String(16), nullable=False),
        sql.Column("reason", sql.String(256), nullable=False),
        sql.Column("generation", sql.Integer, nullable=False),
        sql.Column("created_at", sql.String(32), nullable=False),
        sql.Column("changed_at", sql.String(32), nullable=False),
    )
    op.create_table(
        "tenant_keys",
        sql.Column("tenant", sql.String(128), sql.ForeignKey("tenants.tenant"), primary_key=True),
        sql.Column("version", sql.Integer, primary_key=True),
        sql.Column("state", sql.String(16), nullable=False),
        sql.Column("wrapped", sql.LargeBinary, nullable=False),
        sql.Column("created_at", sql.String(32), nullable=False),
    )
    op.create_table(
        "services",
        sql.Column("service_id", sql.LargeBinary(12), primary_key=True),
        sql.Column("tenant", sql.String(128), sql.ForeignKey("tenants.tenant"), nullable=False),
        sql.Column("name", sql.String(128), nullable=False),
        sql.Column("active_version", sql.Integer, nullable=False),
        sql.Column("created_at", sql.String(32), nullable=False),
        sql.UniqueConstraint("tenant", "name"),
    )
    op.create_table(
        "service_keys",
        sql.Column(
            "service_id", sql.LargeBinary(12), sql.ForeignKey("services.service_id"), primary_key=True
        ),
        sql.Column("version", sql.Integer, primary_key=True),
        sql.Column("tenant", sql.String(128), nullable=False),
        sql.Column("tenant_key_version", sql.Integer, nullable=False),
        sql.Column("state", sql.String(16), nullable=False),
        sql.Column("wrapped", sql.LargeBinary, nullable=False),
        sql.Column("created_at", sql.String(32), nullable=False),
        sql.ForeignKeyConstraint(
            ["tenant", "tenant_key_version"], ["tenant_keys.tenant", "tenant_keys.version"]
        ),
    )
    op.create_table(
        "shredded_keys",
        sql.Column("service_id", sql.LargeBinary(12), primary_key=True),
        sql.Column("key_id", sql.LargeBinary(16), primary_key=True),
        sql.Column("shredded_at", sql.String(32), nullable=False),
    )
    op.create_table(
        "audit",
        sql.Column("number", sql.Integer, primary_key=True),
        sql.Column("at", sql.String(32), nullable=False),
        sql.Column("act", sql.String(32), nullable=False),
        sql.Column("tenant", sql.String(128), nullable=False),
        sql.Column("service", sql.String(128), nullable=False),
        sql.Column("detail", sql.String(1024), nullable=False),
        sql.Column("previous", sql.LargeBinary(32), nullable=False),
        sql.Column("digest", sql.LargeBinary(32), nullable=False),
    )
