# SPDX-License-Identifier: Apache-2.0
"""A run as plots: throughput over record size on log axes for each direction and number of threads, and bars at 64 B.

Colour says who it is: ours, a yardstick in C, a peer. Lines are named where they start, so that no legend is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from goals import HEADLINE, words_for
from results import Results

OURS, LOOP, PEER = "#c2410c", "#64748b", "#2563eb"
SHADES = {
    OURS: ("#c2410c", "#ea580c", "#9a3412", "#f59e0b", "#7c2d12"),
    LOOP: ("#334155", "#64748b", "#94a3b8", "#475569"),
    PEER: ("#2563eb", "#0891b2", "#7c3aed", "#0d9488", "#4f46e5", "#0284c7", "#9333ea", "#059669", "#1d4ed8"),
}
APART = 0.042
"""The least distance of two names, as a part of the axis."""

DRAWN_BY_SIZE = (
    "lists-each", "lists-one", "columns-each", "columns-one", "single", "single-lease",
    "c-evp-each", "c-mb-each", "c-mb-one",
    "asherah", "aesgcm-one", "aesgcm-each", "tink-one", "tink-each", "alloy", "aws-each", "aws-cached", "transit",
)  # fmt: skip


def draw(results: Results, titles: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Write the plots as SVG; returns what each shows, by file name without its ending."""
    drawn = {}
    with matplotlib.rc_context(
        {
            "svg.hashsalt": "openkcm",  # the same run gives the same file
            "svg.fonttype": "none",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#94a3b8",
        }
    ):
        if _bars(results, titles, folder / "headline.svg"):
            drawn["headline"] = "Time for one record of 64 bytes, by contender"
        for direction in ("encrypt", "decrypt"):
            for threads in (1, 2):
                name = f"{direction}-{threads}"
                if _lines(results, titles, direction, threads, folder / f"{name}.svg"):
                    drawn[name] = f"Throughput over record size, {direction}, threads: {threads}"
    return drawn


def side(name: str) -> str:
    """Whose colour a contender has."""
    if name.startswith(("c-", "loop-")):
        return LOOP
    return OURS if name.startswith(("lists", "columns", "single", "fallback")) else PEER


def colours(names: list[str]) -> dict[str, str]:
    """A shade for each, of its side's colour."""
    found: dict[str, str] = {}
    for name in names:
        shades = SHADES[side(name)]
        found[name] = shades[sum(side(other) == side(name) for other in found) % len(shades)]
    return found


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def _bars(results: Results, titles: Mapping[str, str], file: Path) -> bool:
    directions = ("encrypt", "decrypt")
    names = [name for name in results.contenders() if known_times(results, name)]
    if not names:
        return False
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(10, 0.28 * len(names) + 0.9))
    names.sort(key=lambda name: min(known_times(results, name)), reverse=True)
    for axis, direction in zip(axes, directions, strict=True):
        times = [results.time(name, direction, HEADLINE) or float("nan") for name in names]
        axis.barh([titles[name] for name in names], times, color=[side(name) for name in names], height=0.7)
        axis.set_xscale("log")
        axis.set_title(f"{direction}, one thread", loc="left", fontsize=10)
        axis.set_xlabel("time for one record of 64 B")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _nanoseconds(value)))
        axis.tick_params(axis="y", length=0)
        for at, time in enumerate(times):
            if time == time:
                axis.text(time * 1.08, at, _nanoseconds(time), va="center", fontsize=7.5, color="#334155")
    _save(figure, file)
    return True


def known_times(results: Results, name: str) -> list[float]:
    """What a contender took at the headline size on one thread, as far as it was measured."""
    times = (results.time(name, direction, HEADLINE) for direction in ("encrypt", "decrypt"))
    return [time for time in times if time is not None]


def _nanoseconds(value: float) -> str:
    for scale, unit in ((1e6, "ms"), (1e3, "us")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} ns"


def _lines(results: Results, titles: Mapping[str, str], direction: str, threads: int, file: Path) -> bool:
    sizes = results.sizes()
    names = [
        name for name in DRAWN_BY_SIZE if any(results.speed(name, direction, size, threads) for size in sizes)
    ]
    if not names:
        return False
    figure, axis = plt.subplots(figsize=(9, 6))
    starts: list[tuple[float, str, str]] = []
    for name, colour in colours(names).items():
        points = [(size, results.speed(name, direction, size, threads)) for size in sizes]
        known = [(size, speed) for size, speed in points if speed]
        dashes = "--" if side(name) == LOOP else "-"
        axis.plot(*zip(*known, strict=True), dashes, color=colour, marker="o", markersize=3, linewidth=1.5)
        starts.append((known[0][1], titles[name], colour))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(True, which="major", color="#e2e8f0", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.set_xticks(sizes, [words_for(size) for size in sizes])
    axis.set_xlabel("record size")
    axis.set_ylabel("plaintext a second")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} GB"))
    axis.set_title(f"{direction}, {'one thread' if threads == 1 else 'two threads'}", loc="left", fontsize=10)
    axis.yaxis.tick_right()
    axis.yaxis.set_label_position("right")
    axis.spines["right"].set_visible(True)
    _name_lines(axis, sorted(starts))
    _save(figure, file)
    return True


def _name_lines(axis: Any, starts: list[tuple[float, str, str]]) -> None:
    """Write each line's name left of the plot, where the lines are far apart, at the height where it starts."""
    to_axes = axis.transData + axis.transAxes.inverted()
    heights = [float(to_axes.transform((1, value))[1]) for value, _, _ in starts]
    leader = {"arrowstyle": "-", "linewidth": 0.5, "relpos": (1, 0.5)}
    for (_, title, colour), height, place in zip(starts, heights, spread(heights), strict=True):
        axis.annotate(
            title, (0, height), (-0.05, place), xycoords="axes fraction", textcoords="axes fraction", va="center",
            ha="right", fontsize=8, color=colour, arrowprops=dict(leader, color=colour),
        )  # fmt: skip


def spread(heights: list[float]) -> list[float]:
    """Move heights (ascending) apart so that names do not overlap: up from the lowest, then down from the top."""
    places = list(heights)
    for at in range(1, len(places)):
        places[at] = max(places[at], places[at - 1] + APART)
    if places:
        places[-1] = min(places[-1], 1.0)
    for at in range(len(places) - 2, -1, -1):
        places[at] = min(places[at], places[at + 1] - APART)
    return places
