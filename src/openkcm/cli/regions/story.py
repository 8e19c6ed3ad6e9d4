# SPDX-License-Identifier: Apache-2.0
"""What happens in the demo of regions: a plug is pulled, a replica is killed, the database restarts.

Invariant: each scene does what its line says and then waits for what must follow, which is measured; where it does not
follow within its bound the demo fails.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from ...errors import InternalError, Unavailable
from ..output import console, settings
from .screen import WIDTH, draw, recent
from .site import PROBE_SECONDS, REGIONS, SERVICE, TENANT, RegionsSite

if TYPE_CHECKING:
    from .site import Application

CALM_SECONDS: Final = 4.0
OUTAGE_SECONDS: Final = 3.0
BOUND_SECONDS: Final = 20.0
FRAME_SECONDS: Final = 0.1


class RegionsStory:
    """Tells it on one screen, or line by line where there is no terminal; ``tell`` returns what was measured."""

    def __init__(self, site: RegionsSite) -> None:
        self._site = site
        self._roots = dict.fromkeys(REGIONS, "allows")
        self._happened: list[str] = []
        self._measured: dict[str, Any] = {}
        self._began = time.monotonic()
        self._refresh: Callable[[], None] = lambda: None

    def tell(self) -> dict[str, Any]:
        """Play every scene.

        Raises:
            InternalError: what must follow did not.
        """
        with self._screen():
            self._say("four applications write and read acme's records; keys never leave their region")
            self._watch(CALM_SECONDS)
            self._measured["records a second"] = round(
                sum(recent(each)["rate"] or 0 for each in self._site.applications)
            )
            self._unplug("eu")
            self._kill_replica()
            self._restart_database()
            self._say("[bold green]all is well again[/]")
            self._watch(CALM_SECONDS / 2)
        return self._measured

    # ---- scenes --------------------------------------------------------------------------------------

    def _unplug(self, region: str) -> None:
        key = self._site.keys[region]
        self._say(f"[bold red]acme takes its root key in {region} away[/] (CKA_DECRYPT off, in its own HSM)")
        pulled = time.monotonic()
        key.disable()
        self._roots[region] = "refuses"
        seconds = self._until(lambda: self._all(region, "tenant_dark"), "went dark") - pulled
        self._measure(f"{region} dark after", seconds, "no record of acme can be read there")
        others = [
            region for region in REGIONS if region not in self._roots or self._roots[region] == "allows"
        ]
        if not all(self._all(other, "ok") for other in others):
            raise InternalError("the other region felt it")
        self._say(f"region {', '.join(others)} did not notice: it has a root and keys of its own")
        self._watch(CALM_SECONDS / 2)
        self._say(f"[bold green]acme allows it again in {region}[/]")
        allowed = time.monotonic()
        key.enable()
        self._roots[region] = "allows"
        seconds = self._until(lambda: self._all(region, "ok"), "came back") - allowed
        self._measure(f"{region} live after", seconds, f"roots are asked every {PROBE_SECONDS:g} s")

    def _kill_replica(self) -> None:
        replica = next(each for each in self._site.replicas if each.region == "us")
        self._say(f"[bold red]kill -9 {replica.name}[/]")
        killed = time.monotonic()
        replica.kill()
        self._watch(CALM_SECONDS)
        if not self._all("us", "ok"):
            raise InternalError("the other replica did not take over")
        worst = max(
            (
                report["worst"] or 0
                for each in self._of("us")
                for report in list(each.reports)
                if report["at"] > killed
            ),
            default=0.0,
        )
        self._measure("worst read around the kill", worst, "the other replica answered; nothing failed")
        replica.start()
        self._say(f"{replica.name} is started again")
        self._watch(CALM_SECONDS / 4)

    def _restart_database(self) -> None:
        self._say(
            f"[bold red]PostgreSQL stops[/] for {OUTAGE_SECONDS:g} s: loaded keys go on opening records"
        )
        self._site.database.stop()
        self._watch(OUTAGE_SECONDS)
        if not all(self._all(region, "ok") for region in REGIONS):
            raise InternalError("an outage of the database was felt by readers")
        try:
            with self._site.core("eu") as core:
                core.create_service(TENANT, "during-the-outage")
            raise InternalError("something was written without a database")
        except Unavailable as error:
            self._say(f"creating a service meanwhile: [yellow]{error.code}[/], to be tried again")
        self._site.database.start()
        self._say("PostgreSQL is back")
        with self._site.core("eu") as core:
            version = core.rotate_service(TENANT, SERVICE)
        self._say(f"the service key is rotated to version {version}; nobody has to restart")
        self._watch(CALM_SECONDS / 2)
        if not all(self._all(region, "ok") for region in REGIONS):
            raise InternalError("the outage left something behind")

    # ---- what is seen and measured -------------------------------------------------------------------

    def _of(self, region: str) -> list[Application]:
        return [each for each in self._site.applications if each.region == region]

    def _all(self, region: str, state: str) -> bool:
        return all(each.reports and each.reports[-1]["state"] == state for each in self._of(region))

    def _until(self, reached: Callable[[], bool], what: str) -> float:
        end = time.monotonic() + BOUND_SECONDS
        while not reached():
            if time.monotonic() > end:
                raise InternalError(f"no region {what} within {BOUND_SECONDS:g} s")
            self._watch(FRAME_SECONDS)
        return time.monotonic()

    def _watch(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._refresh()
            time.sleep(FRAME_SECONDS)

    def _measure(self, what: str, seconds: float, why: str) -> None:
        self._measured[what] = round(seconds, 3)
        shown = f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1000:.1f} ms"
        self._say(f"{what} [bold]{shown}[/]: {why}")

    def _say(self, text: str) -> None:
        line = f"[dim]{time.monotonic() - self._began:5.1f} s[/]  {text}"
        self._happened.append(line)
        if not self._live and not settings.json and not settings.quiet:
            console().print(line, soft_wrap=True)

    _live = False

    @contextlib.contextmanager
    def _screen(self) -> Iterator[None]:
        out = console()
        if settings.json or settings.quiet or not out.is_terminal:
            yield
            return
        from rich.live import Live

        out.width = min(out.width, WIDTH)
        self._live = True
        with Live(draw(self._site, self._roots, self._happened), console=out, auto_refresh=False) as live:

            def refresh() -> None:
                live.update(draw(self._site, self._roots, self._happened), refresh=True)

            self._refresh = refresh
            yield
            refresh()
