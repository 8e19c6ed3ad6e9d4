# SPDX-License-Identifier: Apache-2.0
"""What each tenant's root last said, and the open-lease of each service.

A tenant that was there before counts as live until its root is asked; a service has no lease.
"""

import sqlalchemy as sql
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add the columns."""
    op.add_column("tenants", sql.Column("liveness", sql.String(16), nullable=False, server_default="live"))
    op.add_column(
        "tenants", sql.Column("liveness_reason", sql.String(256), nullable=False, server_default="")
    )
    op.add_column("services", sql.Column("lease", sql.Float, nullable=False, server_default="0"))
