# SPDX-License-Identifier: Apache-2.0
"""`openkcm init`: make a vault and its seal file.

Invariant: it never touches a vault that is there.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from .commands import KEYS, command


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "init", rich_help_panel=KEYS)(init)


def init(
    region: Annotated[str, typer.Option(help="The region that this vault serves.")] = "local",
) -> None:
    """Make a new vault and its seal key."""
    from ..core import Core
    from ..errors import AlreadyExists
    from .output import answer, plain, warn_of_fallback
    from .session import holds_vault, seal_option, vault_name, vault_path, vault_url

    warn_of_fallback()
    path = vault_path()
    if path is not None and os.path.lexists(path) and (holds_vault(path) or not os.path.isfile(path)):
        raise AlreadyExists(f"there is a vault at {path} already; nothing was changed")
    if path is None and _holds_vault(vault_url()):
        raise AlreadyExists(f"there is a vault in {vault_name()} already; nothing was changed")
    with Core.open(vault_url(), seal=seal_option(), region=region, create=True) as core:
        seal = str(core.seal_path)
    answer(
        {"vault": vault_name(), "seal": seal, "region": region},
        f"made the vault [bold]{plain(path or vault_name())}[/] and its seal key [bold]{plain(seal)}[/]",
        "[yellow]Keep a copy of the seal key in a safe place: without it, all data of this vault is lost.[/]",
        "[dim]next: openkcm tenant link NAME --root URI[/]",
    )


def _holds_vault(url: str) -> bool:
    """Whether a server's database holds a vault."""
    from ..core.store import open_store

    store = open_store(url)
    try:
        return store.exists()
    finally:
        store.retire()
