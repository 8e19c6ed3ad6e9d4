# SPDX-License-Identifier: Apache-2.0
"""Opens the vault, or the Core elsewhere, that a command works on, and closes it again.

Invariant: only ``init`` makes a vault; every other command refuses a path where there is none, so that a
mistyped ``--vault`` cannot quietly begin a new one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from .output import settings

if TYPE_CHECKING:
    from ..core import Core
    from ..gateway import Gateway
    from ..gateway.gateway import ServiceHandle
    from ..rpc.client.admin_client import RemoteAdmin


class NoVault(ConfigurationError):
    """There is no vault where the command looks for one."""

    hint = "`openkcm init` makes one; --vault or OPENKCM_VAULT names another"


class NoCertificate(ConfigurationError):
    """A Core elsewhere is named, and not who asks."""

    hint = "or set OPENKCM_TLS_CERTIFICATE, OPENKCM_TLS_KEY and OPENKCM_TLS_ROOTS; `openkcm pki` makes them for tests"


def vault_url() -> str:
    """Return the vault as a database URL; a path is an SQLite file."""
    return settings.vault if "://" in settings.vault else f"sqlite:///{os.path.expanduser(settings.vault)}"


def vault_name() -> str:
    """Return what to call the vault in what is shown: its URL, without a password."""
    if vault_path() is not None:
        return vault_url()
    from ..core.store import open_store

    return open_store(vault_url()).place


def vault_path() -> str | None:
    """Return the path of an SQLite vault, else None."""
    url = vault_url()
    return url.removeprefix("sqlite:///") if url.startswith("sqlite:///") else None


def holds_vault(path: str) -> bool:
    """Whether a vault is at a path; an empty file is none, and only ``init`` may make one of it."""
    return any(os.path.exists(name) and os.path.getsize(name) for name in (path, f"{path}-wal"))


@contextlib.contextmanager
def open_core(**options: Any) -> Iterator[Core]:
    """Open the vault; ``options`` are those of ``Core.open``.

    Raises:
        NoVault: there is none.
    """
    path = vault_path()
    if path is not None and not holds_vault(path):
        raise NoVault(f"there is no vault at {path}")
    from ..core import Core

    core = Core.open(vault_url(), seal=seal_option(), **options)
    try:
        yield core
    finally:
        core.close()


@contextlib.contextmanager
def open_administration() -> Iterator[Core | RemoteAdmin]:
    """Open what a command manages keys in: the Core that ``--core`` names, else the vault.

    Raises:
        NoVault: there is none.
        ConfigurationError: a Core is named, and a certificate file is not, or cannot be used.
    """
    if not settings.core:
        with open_core() as core:
            yield core
        return
    files = {name: getattr(settings, name) for name in ("certificate", "key", "roots")}
    missing = [f"--{name}" for name, value in files.items() if not value]
    if missing:
        raise NoCertificate(f"a Core elsewhere is reached with a certificate; missing: {', '.join(missing)}")
    from ..rpc.client.admin_client import connect_admin
    from ..rpc.client.connect import TLS

    with connect_admin(settings.core.split(","), tls=TLS(**files)) as remote:
        yield remote


def place() -> str:
    """Return what a command that manages keys works on, for people."""
    return settings.core or vault_name()


@contextlib.contextmanager
def open_gateway() -> Iterator[Gateway]:
    """Open the vault and a Gateway on it; its key store is beside the vault, or what OPENKCM_KEYS names."""
    with open_core() as core:
        from ..gateway import Gateway

        gateway = Gateway(core, keys=os.environ.get("OPENKCM_KEYS") or None)
        try:
            yield gateway
        finally:
            gateway.close()


@contextlib.contextmanager
def open_service(tenant: str, service: str) -> Iterator[ServiceHandle]:
    """Open the vault and the handle of one service."""
    with open_gateway() as gateway:
        yield gateway.service(tenant, service)


def seal_option() -> str | None:
    """Return the seal file that OPENKCM_SEAL names; without it, it lies beside the vault, if that is a file."""
    return os.environ.get("OPENKCM_SEAL") or None


def seal_path(vault: str) -> str:
    """Return where the seal key of a vault lies."""
    return seal_option() or os.path.splitext(vault)[0] + ".seal"
