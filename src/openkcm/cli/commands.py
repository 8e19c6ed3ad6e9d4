# SPDX-License-Identifier: Apache-2.0
"""How a command is declared: every one takes the global options, before or after its name.

Invariant: this module and those of the nouns import only Typer and the error vocabulary at their top, so
that ``openkcm --help`` and shell completion answer at once; a command imports what it needs when it runs.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from typing import Annotated, Any, Final, TypeVar

import typer

from ..errors import InvalidInput
from .output import DEFAULT_VAULT, settings

Command = TypeVar("Command", bound=Callable[..., None])

PANEL: Final = "Global options"

KEYS: Final = "Keys"
DATA: Final = "Data"
NETWORK: Final = "Network"
INSIGHT: Final = "Insight"
"""The groups that the commands are listed in."""

VaultOption = Annotated[
    str | None,
    typer.Option(
        "--vault",
        metavar="PATH|URL",
        help=f"The vault: a path or a database URL. [dim]default: {DEFAULT_VAULT}, or $OPENKCM_VAULT[/]",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", metavar="", help="One JSON document for machines.", rich_help_panel=PANEL)
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", metavar="", help="Only errors and warnings.", rich_help_panel=PANEL)
]

CORE: Final = "A Core elsewhere"

CoreOption = Annotated[
    str | None,
    typer.Option(
        "--core",
        metavar="HOST:PORT",
        help="Work on a Core's administrative interface. [dim]default: $OPENKCM_CORE; else the vault[/]",
        show_default=False,
        rich_help_panel=CORE,
    ),
]
CertificateOption = Annotated[
    str | None,
    typer.Option(
        "--certificate",
        metavar="FILE",
        help="Your certificate, in PEM. [dim]default: $OPENKCM_TLS_CERTIFICATE[/]",
        show_default=False,
        rich_help_panel=CORE,
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key",
        metavar="FILE",
        help="Its private key. [dim]default: $OPENKCM_TLS_KEY[/]",
        show_default=False,
        rich_help_panel=CORE,
    ),
]
RootsOption = Annotated[
    str | None,
    typer.Option(
        "--roots",
        metavar="FILE",
        help="The authorities of the Core's certificate. [dim]default: $OPENKCM_TLS_ROOTS[/]",
        show_default=False,
        rich_help_panel=CORE,
    ),
]

_REMOTE: Final[dict[str, Any]] = {
    "core_": (CoreOption, None),
    "certificate_": (CertificateOption, None),
    "key_": (KeyOption, None),
    "roots_": (RootsOption, None),
}
"""What the commands take that also work on a Core elsewhere."""

_GLOBAL: Final[dict[str, Any]] = {
    "vault_": (VaultOption, None),
    "json_": (JsonOption, False),
    "quiet_": (QuietOption, False),
}


class ReaderGone(Exception):
    """The reader of standard output went away; BrokenPipeError itself would be answered by Typer."""


def set_globals(vault: str | None, json: bool, quiet: bool) -> None:
    """Apply the global options of one place; those given in neither stay as they were."""
    if vault is not None:
        settings.vault, settings.vault_named = vault, True
    settings.json = settings.json or json
    settings.quiet = settings.quiet or quiet


def set_remote(core: str | None, certificate: str | None, key: str | None, roots: str | None) -> None:
    """Apply the options of a command that also works on a Core elsewhere.

    A vault that was named in the command goes before $OPENKCM_CORE.
    """
    variables = {
        "core": (core, "OPENKCM_CORE"),
        "certificate": (certificate, "OPENKCM_TLS_CERTIFICATE"),
        "key": (key, "OPENKCM_TLS_KEY"),
        "roots": (roots, "OPENKCM_TLS_ROOTS"),
    }
    for option, (given, variable) in variables.items():
        if given is None and option == "core" and settings.vault_named:
            continue
        setattr(settings, option, given if given is not None else os.environ.get(variable, ""))
    if core is not None and settings.vault_named:
        raise InvalidInput("--core and --vault name two places to work on; give one of them")


def command(
    app: typer.Typer, name: str, *, remote: bool = False, **options: Any
) -> Callable[[Command], Command]:
    """Add a function to an app as a command that takes the global options too.

    Args:
        app: where.
        name: the command's.
        remote: whether it also works on a Core elsewhere (``session.open_administration``).
        options: for Typer.
    """

    def add(function: Command) -> Command:
        def run(**arguments: Any) -> None:
            settings.command = name
            set_globals(*(arguments.pop(option) for option in _GLOBAL))
            if remote:
                set_remote(*(arguments.pop(option, None) for option in _REMOTE))
            try:
                function(**arguments)
                sys.stdout.flush()
            except BrokenPipeError:
                raise ReaderGone from None

        signature = inspect.signature(function, eval_str=True)
        taken = _GLOBAL
        if remote:
            # A command with an option of that name has its own; what is meant here is then in the environment.
            own = {name: each for name, each in _REMOTE.items() if name[:-1] not in signature.parameters}
            taken = own | _GLOBAL
        extra = [
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for option, (annotation, default) in taken.items()
        ]
        parameters = [*signature.parameters.values(), *extra]
        shown = signature.replace(parameters=parameters)
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        setattr(run, "__signature__", shown)  # noqa: B010 - what Typer reads instead of **arguments
        app.command(name, **options)(run)
        return function

    return add


TenantArgument = Annotated[
    str, typer.Argument(metavar="TENANT", help="Whose key: a linked customer.", show_default=False)
]
ServiceArgument = Annotated[
    str, typer.Argument(metavar="SERVICE", help="The tenant's service, such as payments.", show_default=False)
]
ForceOption = Annotated[
    bool, typer.Option("--force", "-f", metavar="", help="Replace the output file if it is there.")
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Do not ask.")]
ContextOption = Annotated[
    list[str] | None,
    typer.Option(
        "--context",
        "-c",
        metavar="KEY=VALUE",
        help="Associated data, needed again to open.",
        show_default=False,
    ),
]


def parse_context(pairs: list[str] | None) -> dict[str, str] | None:
    """Turn ``KEY=VALUE`` options into a context.

    Raises:
        InvalidInput: one is not of that form, or a key is there twice.
    """
    if not pairs:
        return None
    context: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InvalidInput(f"--context {pair!r} is not KEY=VALUE")
        if key in context:
            raise InvalidInput(f"--context names {key!r} twice")
        context[key] = value
    return context
