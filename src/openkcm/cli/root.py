# SPDX-License-Identifier: Apache-2.0
"""`openkcm root`: what a customer must allow, and the door through which a provider's events push.

Invariant: ``grant`` asks nothing of the root's key and changes nothing; ``changed`` acts only on what the root itself
answers, so that whoever can call it can make nobody dark.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands import KEYS, command

if TYPE_CHECKING:
    from ..core.liveness import Probe

UriArgument = Annotated[
    str,
    typer.Argument(metavar="URI", help="The root key: aws-kms://..., pkcs11:..., ...", show_default=False),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="What to allow on a root key; tell that one changed.")
    command(group, "grant")(grant)
    command(group, "changed", remote=True)(changed)
    app.add_typer(group, name="root", rich_help_panel=KEYS)


def grant(
    uri: UriArgument,
    identity: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Who to allow, if it is not who this process is.", show_default=False
        ),
    ] = None,
) -> None:
    """Print what the customer must allow on their root key, in their provider's own form."""
    from ..errors import InvalidInput
    from ..roots import Grantable, open_root
    from .output import answer, plain

    root = open_root(uri)
    try:
        if not isinstance(root, Grantable):
            raise InvalidInput("this root's provider does not say what to allow; see its own documentation")
        found = root.grant(identity)
    finally:
        root.close()
    document = {
        "root": root.uri,
        "form": found.form,
        "identity": found.identity,
        "permissions": list(found.permissions),
        "text": found.text,
    }
    who = f" to [bold]{plain(found.identity)}[/]" if found.identity else ""
    answer(
        document,
        f"[dim]# {plain(found.form)}: gives {plain(', '.join(found.permissions))}{who}[/]",
        plain_text(found.text),
    )


def changed(uri: UriArgument) -> None:
    """Ask a root now, for every customer on it: for EventBridge, Event Grid, Pub/Sub or cron to call."""
    from .output import answer, plain
    from .session import open_administration

    with open_administration() as core:
        found = core.root_changed(uri)
    answer(
        {
            "root": uri,
            "tenants": [{"tenant": tenant, **probe_document(each)} for tenant, each in found.items()],
        },
        *(probe_text(tenant, each) for tenant, each in found.items()),
        *(() if found else (f"[dim]no live tenant is linked to {plain(uri)}[/]",)),
    )


def probe_document(found: Probe) -> dict[str, Any]:
    """What a probe found, for machines."""
    return {
        "state": found.state.value,
        "reason": found.reason,
        "milliseconds": round(found.seconds * 1000, 1),
    }


def probe_text(tenant: str, found: Probe) -> str:
    """What a probe found, as Rich markup."""
    from .output import plain
    from .status import STATE_STYLES

    style = STATE_STYLES[found.state.value]
    said = plain(found.reason) if found.reason else "the root opened the tenant key"
    return f"[bold]{plain(tenant)}[/]  [{style}]{found.state.value}[/]  {found.seconds * 1000:,.0f} ms  [dim]{said}[/]"


def plain_text(text: str) -> Any:
    """Text that is printed as it is, for copying."""
    from rich.text import Text

    return Text(text)
