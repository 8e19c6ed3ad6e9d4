# SPDX-License-Identifier: Apache-2.0
"""`openkcm grant`: who may do what over the network.

Invariant: what was asked for and could not be done is an error, so that nobody believes a grant gone that is there;
and where another grant still allows what was taken back, that is said.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import KeyNotFound
from .commands import NETWORK, command

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..core import Grant
    from ..keys import Verb

IdentityArgument = Annotated[
    str,
    typer.Argument(metavar="IDENTITY", help="spiffe://DOMAIN/PATH, or cn:NAME.", show_default=False),
]
TenantArgument = Annotated[
    str, typer.Argument(metavar="TENANT", help="A tenant, or '*' for every one.", show_default=False)
]
ServiceArgument = Annotated[
    str, typer.Argument(metavar="SERVICE", help="A service, or '*' for every one.", show_default=False)
]
_VERBS = "wrap, unwrap, shred, administer"


class NoGrant(KeyNotFound):
    """What was to be taken back was not there."""

    hint = "`openkcm grant list` shows those that are; one is taken back in the words that it was given in"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="Who may do what over the network; nobody by default.")
    command(group, "add", remote=True)(add)
    command(group, "remove", remote=True)(remove)
    command(group, "list", remote=True)(list_grants)
    app.add_typer(group, name="grant", rich_help_panel=NETWORK)


def add(
    identity: IdentityArgument,
    tenant: TenantArgument,
    service: ServiceArgument,
    verbs: Annotated[
        list[str], typer.Argument(metavar="VERB...", help=f"Any of {_VERBS}.", show_default=False)
    ],
) -> None:
    """Let an identity do things with a service; every Core on the vault knows within a second."""
    from .output import answer, plain
    from .session import open_administration

    with open_administration() as core:
        added = core.grant(identity, tenant, service, verbs)
    said = f"may now {', '.join(added)}" if added else "could do that already"
    answer(
        {"identity": identity, "tenant": tenant, "service": service, "added": list(added)},
        f"[bold]{plain(identity)}[/] {said} on {_place(tenant, service)}",
    )


def remove(
    identity: IdentityArgument,
    tenant: TenantArgument,
    service: ServiceArgument,
    verbs: Annotated[
        list[str] | None, typer.Argument(metavar="[VERB...]", help="Which; all by default.")
    ] = None,
) -> None:
    """Take a grant back, in the words it was given in; every Core on the vault knows within a second."""
    from .output import answer, plain, warn
    from .session import open_administration

    with open_administration() as core:
        taken = core.withdraw(identity, tenant, service, verbs or None)
        left = _overlapping(core.grants(identity), tenant, service, taken)
    if not taken:
        raise NoGrant(f"{identity} has no such grant on {tenant} {service}; nothing was taken back")
    for each in left:
        warn(f"{each.verb} stays allowed by the grant on {_place(each.tenant, each.service)}")
    document = {"identity": identity, "tenant": tenant, "service": service, "removed": list(taken)}
    answer(
        {**document, "still_granted": [_document(each) for each in left]},
        f"[bold]{plain(identity)}[/] no longer has {', '.join(taken)} on {_place(tenant, service)}",
    )


def list_grants(
    identity: Annotated[str | None, typer.Argument(metavar="[IDENTITY]", help="Only this one's.")] = None,
) -> None:
    """List who may do what."""
    from rich.table import Table

    from .output import answer, plain
    from .session import open_administration

    with open_administration() as core:
        found = core.grants(identity)
    places: dict[tuple[str, str, str], list[str]] = {}
    for each in found:
        places.setdefault((each.identity, each.tenant, each.service), []).append(each.verb)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("identity", "tenant", "service", "verbs"):
        table.add_column(column)
    for place, verbs in places.items():
        table.add_row(*map(plain, place), ", ".join(verbs))
    answer(
        {"grants": [_document(each) for each in found]},
        table if found else "[dim]nobody may do anything over the network: openkcm grant add IDENTITY ...[/]",
    )


def _overlapping(grants: Iterable[Grant], tenant: str, service: str, verbs: tuple[Verb, ...]) -> list[Grant]:
    """Grants that still allow the verbs on some part of a place."""
    return [
        each
        for each in grants
        if each.verb in verbs and _meet(each.tenant, tenant) and _meet(each.service, service)
    ]


def _meet(one: str, other: str) -> bool:
    return one == other or "*" in (one, other)


def _place(tenant: str, service: str) -> str:
    from .output import plain

    tenants = "every tenant" if tenant == "*" else f"tenant [bold]{plain(tenant)}[/]"
    return f"{'every service' if service == '*' else f'service [bold]{plain(service)}[/]'} of {tenants}"


def _document(grant: Grant) -> dict[str, Any]:
    return {
        "identity": grant.identity,
        "tenant": grant.tenant,
        "service": grant.service,
        "verb": grant.verb.value,
        "created_at": grant.created_at,
    }
