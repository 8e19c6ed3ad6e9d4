# SPDX-License-Identifier: Apache-2.0
"""The demo's seven steps.

Invariant: each step does what its caption says, with the public interface, before the next one begins; a step
that does not come out as told stops the demo with an error.
"""

from __future__ import annotations

import csv
import filecmp
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..errors import InternalError, KeyDestroyed, OpenKCMError, TenantDark
from . import files
from .csv_table import CsvTable
from .demo_data import SUBJECT_COLUMN, Share, split_flights
from .demo_token import make_token
from .output import console, plain, settings
from .progress import meter
from .tables import ColumnCipher, Columns, Counts, Shredded

if TYPE_CHECKING:
    from ..core import Core
    from ..gateway import Gateway

SERVICE: Final = "flights"
PROTECTED: Final = (SUBJECT_COLUMN, "flight", "dep_time")
COLUMNS: Final = Columns(PROTECTED, SUBJECT_COLUMN)
WIDTH: Final = 96


@dataclass(slots=True)
class Airline:
    """One tenant of the demo, and its files."""

    tenant: str
    name: str
    root: str
    share: Share

    @property
    def clear(self) -> Path:
        """The flights as they came."""
        return self.share.path

    @property
    def stored(self) -> Path:
        """The flights as they are kept."""
        return self.share.path.with_suffix(".protected.csv")

    @property
    def opened(self) -> Path:
        """The flights, opened again."""
        return self.share.path.with_suffix(".opened.csv")


class Story:
    """Tells and does; ``tell`` returns what was measured."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._out = console()
        self._out.width = min(self._out.width, WIDTH)
        self._measured: dict[str, Any] = {}
        self._step = 0
        self._core: Core | None = None
        self._gateway: Gateway | None = None

    def close(self) -> None:
        """Close what is open; harmless twice."""
        if self._gateway is not None:
            self._gateway.close()
            self._gateway = None
        if self._core is not None:
            self._core.close()
            self._core = None

    def tell(self) -> dict[str, Any]:
        """Run all steps.

        Raises:
            OpenKCMError: something that the demo needs is missing, or a step did not come out as told.
        """
        united, delta = self._link()
        airlines = (united, delta)
        self._protect(airlines)
        self._show_stored(united)
        self._kill(united, delta)
        self._restore(united)
        self._shred(united)
        self._restore_backup(united)
        return self._measured

    # What the reader sees

    def _begin(self, title: str, text: str) -> None:
        self._step += 1
        self._print(f"\n[bold cyan]{self._step}[/]  [bold]{title}[/]", f"   {text}")

    def _command(self, *lines: str) -> None:
        """Show what to type for what comes next."""
        self._shell("openkcm " + " \\\n       ".join(lines))

    def _shell(self, text: str) -> None:
        if not settings.json and not settings.quiet:
            from rich.text import Text

            self._out.print(Text(f"   $ {text}", style="dim"), soft_wrap=True)

    def _unprotect_command(self, airline: Airline, *options: str) -> None:
        names = f"{airline.stored.name} -o {airline.opened.name}"
        self._command(" ".join(("unprotect", airline.tenant, SERVICE, names)), *options)

    def _good(self, text: str) -> None:
        self._print(f"   [green]ok[/]  {text}")

    def _refused(self, error: OpenKCMError) -> None:
        self._print(f"   [red]no[/]  {type(error).__name__}: {plain(str(error))}")

    def _print(self, *lines: str) -> None:
        if settings.json or settings.quiet:
            return
        from rich.padding import Padding

        for line in lines:
            text = line.lstrip(" ")
            self._out.print(Padding(text, (0, 0, 0, len(line) - len(text)), expand=False))

    # The steps

    def _link(self) -> tuple[Airline, Airline]:
        from ..core import Core
        from ..gateway import Gateway

        total, shares = split_flights(self._directory, ("UA", "DL"))
        self._print(
            "[bold]Two customers, two root keys.[/]",
            f"{total:,} flights left New York City in 2013; {shares['UA'].rows:,} were United's and "
            f"{shares['DL'].rows:,} Delta's. Airlines play the customers, and an aircraft plays a person.",
        )
        airlines = (
            Airline("united", "United", make_token(self._directory), shares["UA"]),
            Airline("delta", "Delta", f"local:{self._directory / 'delta-root.key'}", shares["DL"]),
        )
        self._begin(
            "Each customer links a root key",
            "United's is an AES key inside an HSM (SoftHSM2): it cannot be read out, only used. Delta's is a "
            "file, [red]for development only[/].",
        )
        url = f"sqlite:///{self._directory / 'vault.db'}"
        self._core = Core.open(url)
        for airline in airlines:
            self._command(f"tenant link {airline.tenant} --root '{_short(airline.root)}'")
            self._core.link_tenant(airline.tenant, root=airline.root)
            self._core.create_service(airline.tenant, SERVICE)
        self._gateway = Gateway(self._core)
        return airlines

    def _protect(self, airlines: tuple[Airline, ...]) -> None:
        self._begin(
            "Three columns are encrypted",
            "Tail number, flight and departure time. Each aircraft gets a data key of its own.",
        )
        rates = {}
        for airline in airlines:
            self._command(
                f"protect {airline.tenant} {SERVICE} {airline.clear.name} -o {airline.stored.name}",
                " ".join(f"--column {name}" for name in PROTECTED),
                f"--subject-column {SUBJECT_COLUMN}",
            )
            started = time.perf_counter()
            counts = self._convert(airline, protect=True)
            seconds = time.perf_counter() - started
            rates[airline.tenant] = round(counts.rows / seconds)
            keys = len(airline.share.aircraft)
            self._good(
                f"{counts.rows:,} rows, {counts.values:,} values, {keys} aircraft in {seconds:.2f} s: "
                f"[bold]{counts.rows / seconds:,.0f} rows/s[/]"
            )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        self._good(f"never more than {peak} MiB of memory for the whole process")
        self._measured.update(rows_per_second=rates, peak_mib=peak)

    def _show_stored(self, airline: Airline) -> None:
        from rich.table import Table

        self._begin("What is stored", "The other columns stay readable. Each value is bound to its column.")
        table = Table(box=None, pad_edge=False, header_style="dim")
        shown = ("carrier", "origin", "dest", *PROTECTED)
        for name in ("", *shown):
            table.add_column(name, no_wrap=True, style="cyan" if name in PROTECTED else "")
        for path, label in ((airline.clear, "clear"), (airline.stored, "stored")):
            with path.open(newline="") as lines:
                rows = csv.DictReader(lines)
                for _ in range(3):
                    row = next(rows)
                    table.add_row(f"   [dim]{label}[/]", *(_middle_out(row[name]) for name in shown))
        if not settings.json and not settings.quiet:
            self._out.print(table)

    def _kill(self, killed: Airline, other: Airline) -> None:
        assert self._core is not None
        self._begin(f"{killed.name} pulls the plug", "All their keys are zeroed before the command returns.")
        self._command(f"tenant kill {killed.tenant}")
        started = time.perf_counter()
        self._core.kill(killed.tenant, reason="the demo")
        took = (time.perf_counter() - started) * 1000
        self._measured["kill_ms"] = round(took, 1)
        self._good(f"dark after {took:.0f} ms")
        self._unprotect_command(killed)
        self._expect(killed, TenantDark)
        self._unprotect_command(other)
        self._open_whole(other)

    def _restore(self, airline: Airline) -> None:
        assert self._core is not None
        self._begin(
            f"{airline.name} comes back", "Only because the HSM agrees to open the tenant key once more."
        )
        self._command(f"tenant restore {airline.tenant}")
        self._core.restore(airline.tenant)
        self._unprotect_command(airline)
        self._open_whole(airline)

    def _shred(self, airline: Airline) -> None:
        assert self._gateway is not None
        ((subject, flights),) = airline.share.aircraft.most_common(1)
        self._begin(
            f"Aircraft {subject} is forgotten",
            f"Its one data key is destroyed; its {flights} flights stay in the file, unreadable.",
        )
        self._shell("cp vault.keys.db yesterday.keys.db")
        self._gateway.close()
        shutil.copyfile(self._key_store, self._backup)
        self._reopen()
        self._command(f"shred {airline.tenant} {SERVICE} {subject}")
        self._gateway.service(airline.tenant, SERVICE).shred(subject)
        self._unprotect_command(airline)
        self._expect(airline, KeyDestroyed)
        self._open_without(airline, flights)

    def _restore_backup(self, airline: Airline) -> None:
        assert self._gateway is not None
        ((_, flights),) = airline.share.aircraft.most_common(1)
        self._begin(
            "Yesterday's key store is restored",
            "The old data key is back in the Gateway's key store, but the Core remembers that it was "
            "shredded, and will not open it.",
        )
        self._shell("cp yesterday.keys.db vault.keys.db")
        self._gateway.close()
        for suffix in ("-wal", "-shm"):
            self._key_store.with_name(self._key_store.name + suffix).unlink(missing_ok=True)
        shutil.copyfile(self._backup, self._key_store)
        self._reopen()
        self._unprotect_command(airline)
        self._expect(airline, KeyDestroyed)
        self._open_without(airline, flights)

    # How it is done

    @property
    def _key_store(self) -> Path:
        assert (
            self._core is not None and self._core.default_key_store is not None
        )  # the demo's vault is a file
        return self._core.default_key_store

    @property
    def _backup(self) -> Path:
        return self._directory / "yesterday.keys.db"

    def _reopen(self) -> None:
        from ..gateway import Gateway

        assert self._core is not None
        self._gateway = Gateway(self._core)

    def _convert(self, airline: Airline, *, protect: bool, shredded: Shredded = Shredded.FAIL) -> Counts:
        """Protect or unprotect an airline's file, as the commands do."""
        assert self._gateway is not None
        here, there = (airline.clear, airline.stored) if protect else (airline.stored, airline.opened)
        service = self._gateway.service(airline.tenant, SERVICE)
        with (
            files.reading(str(here)) as source,
            files.writing(str(there), force=True, like=str(here)) as target,
            meter(here.name, files.size_of(source)) as shown,
        ):
            cipher = ColumnCipher(service, shredded)
            table = CsvTable(cipher, COLUMNS, progress=shown.advance_to)
            return table.protect(source, target) if protect else table.unprotect(source, target)

    def _open_whole(self, airline: Airline) -> None:
        counts = self._convert(airline, protect=False)
        if not filecmp.cmp(airline.clear, airline.opened, shallow=False):
            raise InternalError("an opened file differs from its original")
        self._good(f"{counts.rows:,} rows open, byte for byte as they were")

    def _open_without(self, airline: Airline, flights: int) -> None:
        self._unprotect_command(airline, "--shredded mark")
        counts = self._convert(airline, protect=False, shredded=Shredded.MARK)
        if counts.shredded != flights * len(PROTECTED):
            raise InternalError("other values than those of the shredded subject were lost")
        self._good(f"{flights} flights are unreadable, the other {counts.rows - flights:,} open as before")
        self._measured["shredded_flights"] = flights

    def _expect(self, airline: Airline, refusal: type[OpenKCMError]) -> None:
        try:
            self._convert(airline, protect=False)
        except OpenKCMError as error:
            if type(error) is not refusal:
                raise
            self._refused(error)
        else:
            raise InternalError(f"{airline.tenant}'s data opened where it must not")


def _short(uri: str) -> str:
    """Leave out of a root URI what only this demo needs."""
    scheme, _, rest = uri.partition(":")
    return f"local:{Path(rest).name}" if scheme == "local" else uri.partition("?")[0]


def _middle_out(value: str) -> str:
    """Cut a long value in its middle: envelopes of one service all begin alike."""
    return plain(value if len(value) <= 20 else f"{value[:4]}…{value[-8:]}")
