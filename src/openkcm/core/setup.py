# SPDX-License-Identifier: Apache-2.0
"""Making a vault, and checking one before it is used.

Invariant: the seal file is whole and durable before the database says that a vault is there; a crash in
between leaves a seal file that the next attempt takes, and never a vault without one.
"""

from __future__ import annotations

import os

import sqlalchemy as sql

from ..crypto import WrappingKey, generate_wrapping_key, random_bytes, wrap_key
from ..errors import ConfigurationError, SealError, StoreUnavailable
from . import audit, schema
from .seal import make_seal, sync_folder
from .vault import Vault, check_seal


def initialise(vault: Vault, region: str, at: str) -> None:
    """Make the seal file and the database.

    Raises:
        AlreadyExists: another process made the vault meanwhile.
        SealError, StoreUnavailable: one of the two cannot be written.
    """
    if not vault.store.path.parent.is_dir():
        raise StoreUnavailable(
            f"the folder {vault.store.path.parent} for the vault is not there", retryable=False
        )
    # Unlike Path.exists, this is no error in a folder that may not be looked into; making or reading says what is.
    if not os.path.exists(vault.seal_path):
        try:
            make_seal(vault.seal_path)
        except SealError:
            if not os.path.exists(vault.seal_path):
                raise  # else another process made it just now; that one counts
    _touch_private(vault)
    vault.store.migrate()
    seal = vault.seal()
    with vault.store.write() as connection:
        if connection.execute(sql.select(schema.vault.c.vault_id)).first() is not None:
            return
        vault_id = random_bytes(16)
        connection.execute(
            schema.vault.insert().values(
                vault_id=vault_id, region=region, seal_check=_seal_check(seal, vault_id), created_at=at
            )
        )
        audit.append(connection, at, "init", detail=f"region {region}")


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
    check_seal(vault.seal(), found.seal_check, found.vault_id)
    return str(found.region)


def _seal_check(seal: WrappingKey, vault_id: bytes) -> bytes:
    """A throw-away key under the seal key: who opens it has the right seal key."""
    probe = generate_wrapping_key()
    try:
        return wrap_key(seal, probe, b"openkcm/v1/seal-check" + vault_id)
    finally:
        probe.wipe()


def _touch_private(vault: Vault) -> None:
    """Make the database file, durably, readable by its owner alone; SQLite gives its WAL the same mode."""
    try:
        descriptor = os.open(vault.store.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.fchmod(descriptor, 0o600)  # an empty file may have been there
        os.close(descriptor)
        sync_folder(vault.store.path.parent)
    except OSError as error:
        raise StoreUnavailable(
            f"the vault {vault.store.path} cannot be made: {error.strerror}", retryable=False
        ) from None
