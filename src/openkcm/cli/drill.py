# SPDX-License-Identifier: Apache-2.0
"""`openkcm drill`: prove on this machine, and on your own root keys, that unplugging works and how fast.

Invariant: a real tenant is drilled only after somebody said so, its stored data is neither read nor changed, and a
root that this command switched off is switched on again whatever happens.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from .commands import INSIGHT, YesOption, command
from .exits import ExitCode

if TYPE_CHECKING:
    from ..core import Core
    from .drill_run import Findings, Lever

TEST_TENANT: Final = "drill"
TEST_SERVICE: Final = "drill"
LEVER_SECONDS: Final = 120


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="Prove that unplugging works, and how fast.")
    command(group, "unplug")(unplug)
    app.add_typer(group, name="drill", rich_help_panel=INSIGHT)


def unplug(
    tenant: Annotated[
        str | None,
        typer.Argument(metavar="[TENANT]", help="A customer of this vault; a test tenant if not given."),
    ] = None,
    service: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The customer's service to use; their first if not given.",
            show_default=False,
        ),
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(metavar="URI", help="The test tenant's root; a file if not given.", show_default=False),
    ] = None,
    off: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND", help="A shell command that disables the root key.", show_default=False
        ),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(metavar="COMMAND", help="A shell command that enables it again.", show_default=False),
    ] = None,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", help="Between two probes, 0.1 to 3600.")
    ] = 10.0,
    rate: Annotated[float, typer.Option(metavar="N", help="Decrypts a second.", min=1, max=20_000)] = 1000.0,
    patience: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait for the root's no, and its yes.", min=1)
    ] = 900.0,
    plot: Annotated[
        str | None, typer.Option(metavar="FILE", help="Draw it: an .svg or .png file.", show_default=False)
    ] = None,
    yes: YesOption = False,
) -> None:
    """Unplug a root key under traffic and measure: first no, last decrypt, zeroed, recovered."""
    from ..errors import InvalidInput
    from .drill_plot import check_plot, draw
    from .output import answer, note, plain

    if (off is None) != (on is None):
        raise InvalidInput("--off and --on go together")
    if tenant is None and service is not None:
        raise InvalidInput("--service goes with a TENANT")
    if tenant is not None and root is not None:
        raise InvalidInput("--root goes with the test tenant: a customer has a root already")
    if plot is not None:
        check_plot(plot)
    with _stage(tenant, service, root, interval, yes) as (core, place):
        found = _perform(core, place, _lever(core, place[0], off, on), interval, rate, patience)
    if plot is not None:
        draw(found, plot)
        note(f"[dim]plot: {plain(plot)}[/]")
    answer(_document(found, plot), _table(found), _verdict(found))
    if not found.passed:
        raise typer.Exit(ExitCode.UNSAFE)


@contextlib.contextmanager
def _stage(
    tenant: str | None, service: str | None, root: str | None, interval: float, yes: bool
) -> Iterator[tuple[Core, tuple[str, str]]]:
    """The vault to drill on: this one, or one made for the drill in a folder that goes away with it."""
    from ..core import Core
    from ..errors import ServiceNotFound
    from .output import confirm, plain
    from .session import open_core

    if tenant is None:
        with tempfile.TemporaryDirectory(prefix="openkcm-drill-") as folder:
            path = Path(folder)
            with Core.open(f"sqlite:///{path / 'vault.db'}", probe_interval=interval) as core:
                core.link_tenant(TEST_TENANT, root=root or f"local:{path / 'root.key'}")
                core.create_service(TEST_TENANT, TEST_SERVICE)
                yield core, (TEST_TENANT, TEST_SERVICE)
        return
    with open_core(probe_interval=interval) as core:
        (status,) = core.status(tenant)
        if service is None and not status.services:
            raise ServiceNotFound(f"the tenant {tenant} has no service to drill with; make one first")
        place = (tenant, service or status.services[0].service)
        core.find_service(*place)
        confirm(
            f"Everything of {plain(tenant)} goes dark while its root is off, for all processes on this vault.",
            yes=yes,
            why=f"{tenant} goes dark for everybody during the drill",
        )
        yield core, place


def _lever(core: Core, tenant: str, off: str | None, on: str | None) -> Lever:
    """How to switch the root: by the commands given, by the root itself where it can, or by asking somebody."""
    from ..errors import InvalidInput
    from ..roots import Switchable, open_root
    from .drill_run import Lever

    if off is not None and on is not None:
        return Lever(lambda: _shell(off), lambda: _shell(on), True)
    root = open_root(core.status(tenant)[0].root)
    if isinstance(root, Switchable):
        return Lever(root.switch_off, root.switch_on, True)
    root.close()
    if not sys.stderr.isatty():
        raise InvalidInput("nobody is here to disable the key: give --off and --on, commands that do it")
    return Lever(lambda: _ask("disable"), lambda: _ask("enable"), False)


def _shell(line: str) -> None:
    """Run a lever's command; what it prints goes to standard error."""
    from ..errors import ConfigurationError

    try:
        done = subprocess.run(line, shell=True, stdout=sys.stderr, timeout=LEVER_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ConfigurationError(f"the command did not end within {LEVER_SECONDS} seconds: {line}") from None
    if done.returncode:
        raise ConfigurationError(f"the command failed ({done.returncode}): {line}")


def _ask(what: str) -> None:
    from .output import console

    console(stderr=True).print(
        f"[bold yellow]Now {what} the root key[/] at its provider. The drill waits and sees."
    )


def _perform(
    core: Core, place: tuple[str, str], lever: Lever, interval: float, rate: float, patience: float
) -> Findings:
    from ..gateway import Gateway
    from .drill_run import run_drill
    from .output import note, plain

    gateway = Gateway(core)
    try:
        return run_drill(
            core,
            gateway,
            place,
            lever,
            interval=interval,
            rate=rate,
            patience=patience,
            say=lambda text: note(f"[dim]{plain(text)}[/]"),
        )
    except BaseException:
        if lever.known:
            with contextlib.suppress(Exception):
                lever.on()
        raise
    finally:
        gateway.close()


# ---- what is shown ---------------------------------------------------------------------------------------


def _spans(found: Findings) -> list[tuple[str, str, float | None]]:
    """Key, label and seconds of each span that a reader wants; None for one that is not known."""

    def between(start: float | None, end: float | None) -> float | None:
        return None if start is None or end is None else max(0.0, end - start)

    return [
        ("off_to_first_no", "root off → its first no", between(found.unplugged, found.first_no)),
        (
            "first_no_to_last_decrypt",
            "first no → last successful decrypt",
            between(found.first_no, found.last_success),
        ),
        ("first_no_to_zeroed", "first no → every key zeroed", between(found.first_no, found.zeroed)),
        (
            "off_to_last_decrypt",
            "root off → last successful decrypt",
            between(found.unplugged, found.last_success),
        ),
        ("on_to_recovered", "root on → first decrypt", between(found.replugged, found.recovered)),
    ]


def _document(found: Findings, plot: str | None) -> dict[str, Any]:
    return {
        "tenant": found.tenant,
        "probe_interval": found.interval,
        "passed": found.passed,
        "seconds": {key: None if value is None else round(value, 6) for key, _, value in _spans(found)},
        "decrypts": {"succeeded": len(found.outcomes.successes()), "failed": found.outcomes.failures()},
        "plot": plot,
    }


def _table(found: Findings) -> Any:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for _, label, value in _spans(found):
        table.add_row(label, "[dim]not known[/]" if value is None else _seconds(value))
    failures = ", ".join(f"{count:,} {name}" for name, count in found.outcomes.failures().items())
    table.add_row("decrypts", f"{len(found.outcomes.successes()):,} succeeded; {failures or 'none failed'}")
    return table


def _seconds(value: float) -> str:
    return f"{value * 1000:,.1f} ms" if value < 1 else f"{value:,.2f} s"


def _verdict(found: Findings) -> str:
    bound = f"one probe interval ({found.interval:g} s) and a second"
    if found.passed:
        return f"\n[green]passed[/]: dark, and back again, within {bound}"
    return f"\n[bold red]not passed[/]: it was not dark, or not back again, within {bound}"
