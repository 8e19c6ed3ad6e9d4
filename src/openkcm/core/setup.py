# SPDX-License-Identifier: Apache-2.0
"""Making a vault, and checking one before it is used.

Invariant: the seal file is whole and durable before the database says that a vault is there; a crash in
between leaves a seal file that the next attempt takes, and never a vault without one.
"""

from __future__ import annotations

import os

import sqlalchemy as sql
from sqlalchemy.exc import IntegrityError

from ..crypto import WrappingKey, generate_wrapping_key, random_bytes, wrap_key
from ..errors import ConfigurationError, SealError
from . import audit, schema
from .seal import make_seal
from .vault import Vault, check_seal, seal_check_aad


def initialise(vault: Vault, region: str, at: str) -> None:
    """Make the seal file and the database.

    Where another process makes it at the same moment, that one's counts, and this does nothing.

    Raises:
        SealError, StoreUnavailable: one of the two cannot be written.
    """
    vault.store.check_place()
    # Unlike Path.exists, this is no error in a folder that may not be looked into; making or reading says what is.
    if not os.path.exists(vault.seal_path):
        try:
            make_seal(vault.seal_path)
        except SealError:
            if not os.path.exists(vault.seal_path):
                raise  # else another process made it just now; that one counts
    vault.store.make_place()
    vault.store.migrate()
    seal = vault.seal()
    vault_id = random_bytes(16)
    check = _seal_check(seal, vault_id, region)
    try:
        with vault.store.write() as connection:
            if connection.execute(sql.select(schema.vault.c.vault_id)).first() is not None:
                return
            connection.execute(
                schema.vault.insert().values(
                    vault_id=vault_id, region=region, seal_check=check, created_at=at
                )
            )
            audit.begin(connection, at, "init", f"region {region}")
    except IntegrityError:
        # Before there is a vault a server has nothing to lock, but there can be only one record number 1.
        return


def open_existing(vault: Vault, region: str | None, at: str) -> str:
    """Migrate and check a vault; returns its region."""
    vault.store.migrate()
    with vault.store.read() as connection:
        found = connection.execute(sql.select(schema.vault)).first()
    if found is None:
        # A crash came between the schema and the first row: nothing was ever encrypted here.
        initialise(vault, region or "local", at)
        return open_existing(vault, region, at)
    if region is not None and region != found.region:
        raise ConfigurationError(f"this vault belongs to region {found.region}, not {region}")
    check_seal(vault.seal(), found.seal_check, found.vault_id, found.region)
    return str(found.region)


def _seal_check(seal: WrappingKey, vault_id: bytes, region: str) -> bytes:
    """A throw-away key under the seal key: who opens it has the right seal key, and the region it was made for."""
    probe = generate_wrapping_key()
    try:
        return wrap_key(seal, probe, seal_check_aad(vault_id, region))
    finally:
        probe.wipe()
