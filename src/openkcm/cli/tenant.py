# SPDX-License-Identifier: Apache-2.0
"""`openkcm tenant`: link customers, switch them off and on, and let them go.

Invariant: a development root is never linked without saying so in red, and nothing is destroyed before
somebody said that it is meant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands import KEYS, YesOption, command

if TYPE_CHECKING:
    from ..core.status import TenantStatus

TenantArgument = Annotated[str, typer.Argument(metavar="TENANT", help="The customer's name.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="Link customers' root keys; kill, restore and unlink.")
    command(group, "link", remote=True)(link)
    command(group, "list", remote=True)(list_tenants)
    command(group, "probe", remote=True)(probe)
    command(group, "kill", remote=True)(kill)
    command(group, "restore", remote=True)(restore)
    command(group, "unlink", remote=True)(unlink)
    app.add_typer(group, name="tenant", rich_help_panel=KEYS)


def link(
    tenant: TenantArgument,
    root: Annotated[
        str,
        typer.Option(
            "--root",
            metavar="URI",
            help="The customer's root key: aws-kms://, azure-kms://, gcp-kms://, bao-transit://, pkcs11: or, "
            "for development, local:PATH.",
        ),
    ],
) -> None:
    """Link a customer and their root key."""
    from .output import answer, plain, warn, warn_of_fallback
    from .session import open_administration

    warn_of_fallback()
    with open_administration() as core:
        core.link_tenant(tenant, root=root)
        (linked,) = core.status(tenant)
    if linked.development:
        warn(
            "a local: root is for development only: its key lies in a file on this machine, so nobody holds "
            "it but you"
        )
    answer(
        {"tenant": tenant, "root": linked.root, "development": linked.development},
        f"linked [bold]{plain(tenant)}[/] to {plain(linked.root)}",
        f"[dim]next: openkcm service create {plain(tenant)} NAME[/]",
    )


def list_tenants() -> None:
    """List the linked customers."""
    from rich.table import Table

    from .output import answer, plain
    from .session import open_administration
    from .status import state_text

    with open_administration() as core:
        tenants = core.status()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("tenant", "state", "root"):
        table.add_column(column)
    for each in tenants:
        table.add_row(plain(each.tenant), state_text(each), root_text(each))
    answer(
        {"tenants": [_document(each) for each in tenants]},
        table if tenants else "[dim]no tenants yet: openkcm tenant link NAME --root URI[/]",
    )


def probe(tenant: TenantArgument) -> None:
    """Ask a customer's root key now: its state, how long it took and what it said."""
    from ..keys import TenantState
    from .exits import ExitCode
    from .output import answer
    from .root import probe_document, probe_text
    from .session import open_administration

    with open_administration() as core:
        found = core.probe(tenant)
        (linked,) = core.status(tenant)
    answer(
        {"tenant": tenant, "root": linked.root, **probe_document(found)},
        probe_text(tenant, found),
        f"[dim]root[/]  {root_text(linked)}",
    )
    if found.state is not TenantState.LIVE:
        raise typer.Exit(ExitCode.DISABLED if found.state is TenantState.DARK else ExitCode.UNAVAILABLE)


def kill(
    tenant: TenantArgument,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why, for the audit record.")] = "",
) -> None:
    """Switch a customer's keys off, everywhere, until they are restored."""
    from .output import answer, plain
    from .session import open_administration

    with open_administration() as core:
        core.kill(tenant, reason=reason)
    answer(
        {"tenant": tenant, "state": "dark"},
        f"[bold]{plain(tenant)}[/] is [bold red]dark[/]: nothing of theirs opens, here or elsewhere",
        f"[dim]undo: openkcm tenant restore {plain(tenant)}[/]",
    )


def restore(tenant: TenantArgument) -> None:
    """Bring a killed customer back; their root key must agree."""
    from .output import answer, plain
    from .session import open_administration

    with open_administration() as core:
        core.restore(tenant)
    answer({"tenant": tenant, "state": "live"}, f"[bold]{plain(tenant)}[/] is [green]live[/] again")


def unlink(tenant: TenantArgument, yes: YesOption = False) -> None:
    """Destroy all keys of a customer here, so that their data is gone for good."""
    from .output import answer, confirm, plain
    from .session import open_administration

    with open_administration() as core:
        core.status(tenant)
        confirm(f"Destroy every key of {plain(tenant)}, and so all their data, for good?", yes=yes)
        core.unlink(tenant)
    answer({"tenant": tenant, "unlinked": True}, f"unlinked [bold]{plain(tenant)}[/]; no way back")


def root_text(tenant: TenantStatus) -> str:
    """Return a tenant's root URI as Rich markup, red if it is for development."""
    from .output import plain

    root = plain(tenant.root.partition("?")[0])  # the rest says how to get there: --json has it
    return f"[red]{root} (development)[/]" if tenant.development else root


def _document(tenant: TenantStatus) -> dict[str, Any]:
    return {
        "tenant": tenant.tenant,
        "region": tenant.region,
        "state": tenant.state.value,
        "reason": tenant.reason,
        "root": tenant.root,
        "development": tenant.development,
    }
