# SPDX-License-Identifier: Apache-2.0
"""Who may do what over the network, and which certificates are refused whoever signed them.

A vault that was there before has no grants: nobody may do anything over the network until an operator says so.
"""

import sqlalchemy as sql
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "grants",
        sql.Column("identity", sql.String(512), primary_key=True),
        sql.Column("tenant", sql.String(128), primary_key=True),
        sql.Column("service", sql.String(128), primary_key=True),
        sql.Column("verb", sql.String(16), primary_key=True),
        sql.Column("created_at", sql.String(32), nullable=False),
    )
    op.create_table(
        "revoked_certificates",
        sql.Column("fingerprint", sql.LargeBinary(32), primary_key=True),
        sql.Column("signed", sql.LargeBinary(32), nullable=False),
        sql.Column("identity", sql.String(512), nullable=False),
        sql.Column("serial", sql.String(64), nullable=False),
        sql.Column("reason", sql.String(256), nullable=False),
        sql.Column("revoked_at", sql.String(32), nullable=False),
    )
