# SPDX-License-Identifier: Apache-2.0
"""Alembic migrations of the Core's store, run inside the caller's transaction.

Invariant: a released script is never changed; a new schema is a new script. Alembic is imported only when
there is something to run.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Final

from sqlalchemy.engine import Connection

_lock: Final = threading.Lock()
"""Alembic keeps its context in module globals."""


def upgrade(connection: Connection, revision: str) -> None:
    """Bring the database up to a revision."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    with _lock:
        command.upgrade(config, revision)
