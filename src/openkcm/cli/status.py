# SPDX-License-Identifier: Apache-2.0
"""`openkcm status`: the tree of keys, from each customer's root down, and the state of each.

Invariant: it shows what the vault says and nothing secret, and opens no key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from .commands import INSIGHT, command

if TYPE_CHECKING:
    from rich.tree import Tree

    from ..core.status import ServiceStatus, TenantStatus

STATE_STYLES: Final = {"live": "green", "grace": "yellow", "dark": "bold red"}
MOST_SHOWN: Final = 200
"""Tenants drawn in a tree: more are no longer read by eye, and a hundred thousand take minutes to draw."""

_KEY_STYLES: Final = {
    "pre-active": "cyan",
    "active": "green",
    "deactivated": "yellow",
    "compromised": "bold red",
    "destroyed": "dim strike",
}


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "status", remote=True, rich_help_panel=INSIGHT)(status)


def status(
    tenant: Annotated[str | None, typer.Argument(metavar="[TENANT]", help="Only this customer.")] = None,
) -> None:
    """Show the tree of keys and their states."""
    from .output import answer, settings
    from .session import open_administration, place

    with open_administration() as core:
        tenants = core.status(tenant)
    # Only where it is wanted: of a hundred thousand tenants it takes hundreds of megabytes.
    documents = [_document(each) for each in tenants] if settings.json else []
    document = {"vault": place(), "tenants": documents}
    answer(document, key_tree(tenants, place()))


def state_text(tenant: TenantStatus) -> str:
    """Return a tenant's state, and why it is dark, as Rich markup."""
    from .output import plain

    state = tenant.state.value
    text = f"[{STATE_STYLES[state]}]{state}[/]"
    return f"{text} [dim]({plain(tenant.reason)})[/]" if tenant.reason else text


def key_tree(tenants: list[TenantStatus] | tuple[TenantStatus, ...], title: str) -> Tree:
    """Draw the tree of keys, root first."""
    from rich.tree import Tree

    from .output import plain
    from .tenant import root_text

    tree = Tree(f"[bold]{plain(title)}[/]", guide_style="dim")
    for each in tenants[:MOST_SHOWN]:
        branch = tree.add(f"[bold]{plain(each.tenant)}[/]  {state_text(each)}")
        root = branch.add(f"L1 root key     {root_text(each)}")
        memory = "open in this process" if each.open else "wrapped"
        key = root.add(
            f"L2 tenant key   version {each.key_version} [dim]({memory}, region {plain(each.region)})[/]"
        )
        for service in each.services:
            key.add(_service_text(service))
        if each.shredded:
            key.add(f"L4 data keys    [dim]{each.shredded:,} shredded for good[/]")
    if len(tenants) > MOST_SHOWN:
        rest = len(tenants) - MOST_SHOWN
        tree.add(f"[dim]and {rest:,} tenants more: name one, or take all of them with --json[/]")
    if not tenants:
        tree.add("[dim]no tenants yet: openkcm tenant link NAME --root URI[/]")
    return tree


def _service_text(service: ServiceStatus) -> str:
    from .output import plain

    versions = ", ".join(
        f"{each.version} [{_KEY_STYLES[each.state.value]}]{each.state.value}[/]" for each in service.versions
    )
    lease = f" [dim](open-lease {service.lease:g} s)[/]" if service.lease else ""
    return f"L3 service key  [bold]{plain(service.service)}[/]  version {versions}{lease}"


def _document(tenant: TenantStatus) -> dict[str, Any]:
    from .service import service_document

    return {
        "tenant": tenant.tenant,
        "region": tenant.region,
        "state": tenant.state.value,
        "reason": tenant.reason,
        "root": tenant.root,
        "development": tenant.development,
        "key_version": tenant.key_version,
        "open": tenant.open,
        "shredded": tenant.shredded,
        "created_at": tenant.created_at,
        "services": [service_document(each) for each in tenant.services],
    }
