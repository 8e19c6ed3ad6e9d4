# SPDX-License-Identifier: Apache-2.0
"""`openkcm shred`: end a subject's data key, and with it everything ever encrypted under it.

Invariant: nothing is destroyed before somebody said that it is meant.
"""

from __future__ import annotations

from typing import Annotated

import typer

from .commands import DATA, ServiceArgument, TenantArgument, YesOption, command


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "shred", rich_help_panel=DATA)(shred)


def shred(
    tenant: TenantArgument,
    service: ServiceArgument,
    subject: Annotated[
        list[str],
        typer.Argument(metavar="SUBJECT...", help="Whose data; - reads one a line from standard input."),
    ],
    yes: YesOption = False,
) -> None:
    """Destroy the data keys of subjects, so that their data, in backups too, is gone for good."""
    from ..errors import KeyNotFound
    from .output import answer, confirm, plain
    from .session import open_service

    subjects, where = _subjects(subject), f"{tenant}/{service}"
    with open_service(tenant, service) as handle:
        what = (
            f"the data of {subjects[0]!r}" if len(subjects) == 1 else f"the data of {len(subjects)} subjects"
        )
        confirm(plain(f"Destroy {what} in {where} for good?"), yes=yes)
        done = {name: bool(handle.shred(name)) for name in subjects}
    missing = [name for name, shredded in done.items() if not shredded]
    count = len(done) - len(missing)
    document = {"service": where, "shredded": count, "not_found": missing}
    if not count:
        raise KeyNotFound(
            f"{where} has no data key for {subjects[0]!r}"
            if len(subjects) == 1
            else f"{where} has no data key for any of the {len(subjects)} subjects"
        )
    remarks = [
        f"shredded {count:,} data key{'s' if count > 1 else ''} of [bold]{plain(where)}[/]; no way back"
    ]
    if missing:
        remarks.append(f"[yellow]{len(missing):,} subjects had none[/]")
    answer(document, *remarks)


def _subjects(given: list[str]) -> list[str]:
    """The subjects named, each once, with those from standard input in the place of ``-``."""
    import sys

    from ..errors import InvalidInput

    subjects: list[str] = []
    for name in given:
        subjects += sys.stdin.read().splitlines() if name == "-" else [name]
    subjects = [name for name in dict.fromkeys(subjects) if name]
    if not subjects:
        raise InvalidInput("name at least one subject")
    return subjects
