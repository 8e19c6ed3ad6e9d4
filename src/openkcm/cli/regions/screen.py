# SPDX-License-Identifier: Apache-2.0
"""The one screen of the demo: regions, replicas, applications, the database, and what happened.

Invariant: it shows what was reported, and ``-`` where nothing was.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .site import Application, RegionsSite

WIDTH: Final = 100
RECENT_SECONDS: Final = 1.0
BARS: Final = " ▁▂▃▄▅▆▇█"
HISTORY: Final = 40
_STATES: Final = {
    "ok": "[green]ok[/]",
    "tenant_dark": "[red]dark[/]",
    "core_unavailable": "[yellow]no Core[/]",
    "starting": "[dim]starting[/]",
}


def recent(application: Application) -> dict[str, float | None]:
    """Records a second, median and worst latency of the last second; None where there is none."""
    now = time.monotonic()
    reports = [each for each in list(application.reports) if now - each["at"] < RECENT_SECONDS]
    seconds = sum(each["seconds"] for each in reports)
    medians = sorted(each["p50"] for each in reports if each["p50"] is not None)
    worst = [each["worst"] for each in reports if each["worst"] is not None]
    return {
        "rate": sum(each["records"] for each in reports) / seconds if seconds else None,
        "p50": medians[len(medians) // 2] if medians else None,
        "worst": max(worst) if worst else None,
    }


def draw(site: RegionsSite, roots: dict[str, str], happened: Sequence[str]) -> RenderableType:
    """The screen as it is now."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    from .site import REGIONS

    database = "[green]up[/]" if site.database.running else "[red]down[/]"
    parts: list[RenderableType] = [Text.from_markup(f"PostgreSQL {database}", justify="right")]
    for region in REGIONS:
        root = "[green]allows[/]" if roots[region] == "allows" else f"[red]{roots[region]}[/]"
        replicas = "   ".join(
            f"{each.name} {'[green]up[/]' if each.is_up else '[red]killed[/]'}"
            for each in site.replicas
            if each.region == region
        )
        title = f"[bold]region {region}[/]   acme's root key {root}   {replicas}"
        applications = [each for each in site.applications if each.region == region]
        parts.append(Panel(_table(applications), title=title, title_align="left", width=WIDTH))
    story = Text.from_markup("\n".join(happened[-9:]))
    parts.append(Panel(story, title="what happened", title_align="left", width=WIDTH, height=11))
    return Group(*parts)


def _table(applications: Sequence[Application]) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, expand=True)
    for name, right in (
        ("application", False),
        ("records/s", True),
        ("p50", True),
        ("worst", True),
        ("reads", False),
        ("records, last 10 s", False),
    ):
        table.add_column(name, justify="right" if right else "left", header_style="dim", no_wrap=True)
    for each in applications:
        found = recent(each)
        state = each.reports[-1]["state"] if each.reports else "starting"
        table.add_row(
            each.name,
            "-" if found["rate"] is None else f"{found['rate']:,.0f}",
            _milliseconds(found["p50"]),
            _milliseconds(found["worst"]),
            _STATES.get(state, f"[yellow]{state}[/]"),
            spark([report["records"] for report in list(each.reports)[-HISTORY:]]),
        )
    return table


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.2f} ms"


def spark(values: Sequence[float]) -> str:
    """A line of bars, the tallest for the largest value."""
    top = max(values, default=0) or 1
    return "".join(BARS[round(value / top * (len(BARS) - 1))] for value in values).rjust(HISTORY)
