# SPDX-License-Identifier: Apache-2.0
"""How a command is declared: every one takes the global options, before or after its name.

Invariant: this module and those of the nouns import only Typer and the error vocabulary at their top, so
that ``openkcm --help`` and shell completion answer at once; a command imports what it needs when it runs.
"""

from __future__ import annotations

import inspect
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
        settings.vault = vault
    settings.json = settings.json or json
    settings.quiet = settings.quiet or quiet


def command(app: typer.Typer, name: str, **options: Any) -> Callable[[Command], Command]:
    """Add a function to an app as a command that takes the global options too."""

    def add(function: Command) -> Command:
        def run(**arguments: Any) -> None:
            settings.command = name
            set_globals(*(arguments.pop(option) for option in _GLOBAL))
            try:
                function(**arguments)
                sys.stdout.flush()
            except BrokenPipeError:
                raise ReaderGone from None

        signature = inspect.signature(function, eval_str=True)
        extra = [
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for option, (annotation, default) in _GLOBAL.items()
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
