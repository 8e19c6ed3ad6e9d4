# SPDX-License-Identifier: Apache-2.0
"""`openkcm plan`: what an act would do, before it is done.

Invariant: it reads, and opens no key.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands import INSIGHT, TenantArgument, command

if TYPE_CHECKING:
    from ..core.status import TenantStatus


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="Say what would happen, and change nothing.")
    command(group, "unplug")(unplug)
    app.add_typer(group, name="plan", rich_help_panel=INSIGHT)


def unplug(
    tenant: TenantArgument,
    keys: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="The Gateway's key store, if it is not the one beside the vault.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say what goes dark when a customer disables their root key."""
    from .output import answer
    from .session import open_core

    with open_core() as core:
        (status,) = core.status(tenant)
        path = keys or os.environ.get("OPENKCM_KEYS") or str(core.default_key_store or "")
    subjects = _subjects(status, path)
    services = [
        {
            "service": each.service,
            "active_version": each.active_version,
            "service_keys": len(each.versions),
            "subjects": subjects.get(each.service) if subjects is not None else None,
            "lease": each.lease,
        }
        for each in status.services
    ]
    named = None if subjects is None else sum(subjects.values())
    document = {
        "tenant": tenant,
        "root": status.root,
        "state": status.state.value,
        "services": services,
        "wrapped_keys": {
            "tenant_keys": 1,
            "service_keys": sum(len(each.versions) for each in status.services),
            "named_data_keys": named,
        },
        "shredded": status.shredded,
        "key_store": path if subjects is not None else None,
    }
    answer(document, *_text(status, services, named, path))


def _subjects(status: TenantStatus, path: str) -> dict[str, int] | None:
    """Named data keys of each service; None where there is no key store."""
    if not os.path.exists(path):  # nor where none was named
        return None
    from ..gateway.sqlite_store import SQLiteKeyStore

    store = SQLiteKeyStore(path)
    try:
        return {each.service: store.count(each.service_id) for each in status.services}
    finally:
        store.close()


def _text(status: TenantStatus, services: list[dict[str, Any]], named: int | None, path: str) -> list[Any]:
    from rich.table import Table

    from .output import plain
    from .status import state_text
    from .tenant import root_text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, right in (
        ("service", False),
        ("service keys", True),
        ("subjects", True),
        ("open-lease", True),
    ):
        table.add_column(column, justify="right" if right else "left")
    for each in services:
        subjects = "?" if each["subjects"] is None else f"{each['subjects']:,}"
        lease = f"{each['lease']:g} s" if each["lease"] else "strict"
        table.add_row(plain(each["service"]), str(each["service_keys"]), subjects, lease)
    versions = sum(each["service_keys"] for each in services)
    known = f"1 tenant key, {versions} service key{'s' * (versions != 1)}"
    known += (
        f", {named:,} named data keys"
        if named is not None
        else (
            f"; no key store at {plain(path)}"
            if path
            else "; name the key store (--keys) to count named ones"
        )
    )
    return [
        f"[bold]{plain(status.tenant)}[/]  {state_text(status)}  {root_text(status)}",
        "",
        (
            "When this root is disabled, denied or deleted, all of this goes dark within one probe interval and a "
            "second (10 s + 1 s by default), and a lease does not outlast it:"
        ),
        "",
        table if services else "[dim]no services: nothing was ever encrypted[/]",
        "",
        f"wrapped keys known here: {known}",
        (
            "[dim]Data keys of single records lie beside their data, are not counted here, and go dark with the rest. "
            "Nothing is lost: when the root is enabled again, all of it opens within one probe.[/]"
        ),
    ]
