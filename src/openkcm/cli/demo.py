# SPDX-License-Identifier: Apache-2.0
"""`openkcm demo`: the whole chain on real data, told in seven steps.

Invariant: every figure shown was measured in this run, every refusal shown was raised by the call that an
application makes, and the work directory is gone afterwards, whatever happens.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from .commands import INSIGHT, command


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "demo", rich_help_panel=INSIGHT)(demo)


def demo(
    keep: Annotated[
        bool, typer.Option("--keep", metavar="", help="Leave the work directory for a look around.")
    ] = False,
    work: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Where to work; a new temporary directory if not given.", show_default=False
        ),
    ] = None,
) -> None:
    """Watch two airlines' real data under their own keys; one pulls the plug, one aircraft is forgotten."""
    from .demo_story import Story
    from .output import answer, note, plain

    with _workspace(work, keep) as directory:
        started = time.perf_counter()
        story = Story(directory)
        try:
            measured: dict[str, Any] = story.tell()
        finally:
            story.close()
        measured["seconds"] = round(time.perf_counter() - started, 1)
        answer(measured, f"\n[dim]{measured['seconds']} s in all.[/]")
        if keep:
            note(f"[dim]kept: {plain(str(directory))}[/]")


@contextlib.contextmanager
def _workspace(work: str | None, keep: bool) -> Iterator[Path]:
    """Make the directory and take away everything in it that is ours."""
    if work is not None:
        Path(work).mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="openkcm-demo-", dir=work))
    before = os.environ.get("SOFTHSM2_CONF")
    try:
        yield directory
    finally:
        if before is None:
            os.environ.pop("SOFTHSM2_CONF", None)
        else:
            os.environ["SOFTHSM2_CONF"] = before
        if not keep:
            shutil.rmtree(directory, ignore_errors=True)
