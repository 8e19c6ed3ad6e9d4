# SPDX-License-Identifier: Apache-2.0
"""`openkcm service`: the domains of a customer's data, each with a key of its own.

Invariant: rotating never touches data; what was encrypted before still opens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands import KEYS, ServiceArgument, TenantArgument, command

if TYPE_CHECKING:
    from ..core.status import ServiceStatus


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="Create, list and rotate the services of a tenant.")
    command(group, "create", remote=True)(create)
    command(group, "list", remote=True)(list_services)
    command(group, "rotate", remote=True)(rotate)
    command(group, "lease", remote=True)(lease)
    app.add_typer(group, name="service", rich_help_panel=KEYS)


def create(tenant: TenantArgument, service: ServiceArgument) -> None:
    """Create a service and its first key."""
    from .output import answer, plain
    from .session import open_administration

    with open_administration() as core:
        made = core.create_service(tenant, service)
    answer(
        {"tenant": tenant, "service": service, "service_id": made.service_id.hex()},
        f"created [bold]{plain(tenant)} {plain(service)}[/] [dim](id {made.service_id.hex()})[/]",
    )


def list_services(
    tenant: Annotated[str | None, typer.Argument(metavar="[TENANT]", help="Only this customer's.")] = None,
) -> None:
    """List services and the versions of their keys."""
    from rich.table import Table

    from .output import answer, plain
    from .session import open_administration

    with open_administration() as core:
        services = [each for owner in core.status(tenant) for each in owner.services]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("tenant", "service", "version", "id"):
        table.add_column(column)
    for each in services:
        table.add_row(
            plain(each.tenant), plain(each.service), str(each.active_version), each.service_id.hex()
        )
    answer(
        {"services": [service_document(each) for each in services]},
        table if services else "[dim]no services yet: openkcm service create TENANT NAME[/]",
    )


def rotate(tenant: TenantArgument, service: ServiceArgument) -> None:
    """Make a new version of a service's key; old data still opens."""
    from .output import answer, plain
    from .session import open_administration

    with open_administration() as core:
        version = core.rotate_service(tenant, service)
    answer(
        {"tenant": tenant, "service": service, "version": version},
        f"[bold]{plain(tenant)} {plain(service)}[/] now encrypts under version [bold]{version}[/]",
    )


def lease(
    tenant: TenantArgument,
    service: ServiceArgument,
    seconds: Annotated[
        float,
        typer.Argument(metavar="SECONDS", help="0 to 3600; 0 is strict, the default.", show_default=False),
    ],
) -> None:
    """Let Gateways keep a data key open for so long after its opening."""
    from .output import answer, plain
    from .session import open_administration

    with open_administration() as core:
        core.set_lease(tenant, service, seconds)
    name = f"[bold]{plain(tenant)} {plain(service)}[/]"
    answer(
        {"tenant": tenant, "service": service, "lease": seconds},
        f"{name}: a data key is kept for {seconds:g} s after its opening, and never longer"
        if seconds
        else f"{name} is strict: the Core is asked for every data key",
    )


def service_document(service: ServiceStatus) -> dict[str, Any]:
    """A service for machines."""
    return {
        "tenant": service.tenant,
        "service": service.service,
        "service_id": service.service_id.hex(),
        "active_version": service.active_version,
        "lease": service.lease,
        "created_at": service.created_at,
        "versions": [
            {"version": each.version, "state": each.state.value, "created_at": each.created_at}
            for each in service.versions
        ],
    }
