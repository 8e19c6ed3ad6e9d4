# SPDX-License-Identifier: Apache-2.0
"""Alembic's entry: runs the scripts on the connection it is given, in that connection's transaction."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=False)
context.run_migrations()
