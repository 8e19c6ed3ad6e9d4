# SPDX-License-Identifier: Apache-2.0
"""`openkcm seal`: have a vault's seal key open only through a root of the operator's own.

Invariant: the file that is there is only read; nothing is replaced.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .commands import KEYS, command


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="The Core's own seal key.")
    command(group, "wrap")(wrap)
    app.add_typer(group, name="seal", rich_help_panel=KEYS)


def wrap(
    source: Annotated[Path, typer.Argument(metavar="SEAL", help="The seal file.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="FILE", help="The new one.", show_default=False)],
    root: Annotated[
        str, typer.Option("--root", metavar="URI", help="A root key of your own, not a customer's.")
    ],
) -> None:
    """Write the seal key so that it opens only through a root key."""
    from ..core.seal import wrap_seal
    from .output import answer, plain

    wrap_seal(source, root, target)
    answer(
        {"seal": str(target), "root": root},
        f"wrote [bold]{plain(str(target))}[/]: with it and the root, the vault opens; use it as the seal file",
        f"[yellow]Keep {plain(str(source))} where no machine reads it: if the root is lost, it is all there is.[/]",
    )
