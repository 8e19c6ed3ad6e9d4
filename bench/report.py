# SPDX-License-Identifier: Apache-2.0
"""A run as a page of Markdown: the goals with their verdicts, then every figure, then what each peer does less of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from goals import HEADLINE, Verdict, words_for
from results import Figure, Results

INTRODUCTION = (
    "One run of `make bench`. Times are medians for one record, with the standard deviation over all values of all "
    "processes; contenders took turns in processes of their own."
)
MARKS = {True: "yes", False: "**no**", None: "not measured"}


def page(
    machine: Mapping[str, Any],
    results: Results,
    found: Sequence[Verdict],
    cards: Mapping[str, Mapping[str, Any]],
    failures: Mapping[str, str],
    drawn: Mapping[str, str],
    *,
    quick: bool,
) -> str:
    """The whole page.

    Args:
        cards: title and what it does less of, by contender.
        failures: why a contender did not run, by contender.
        drawn: the plots' files and what each shows.
    """
    parts = [
        "# Benchmarks",
        INTRODUCTION,
        *(["**A quick run, to see that the suite works: its figures are no claims.**"] if quick else []),
        _machine(machine),
        "## Goals",
        goals_table(found),
        "## At 64 bytes",
        _plot(drawn, "headline"),
        _headline(results, cards),
        "## By size",
        "Gigabytes of plaintext a second; a dash where it was not measured.",
    ]
    for direction in ("encrypt", "decrypt"):
        for threads in (1, 2):
            parts += [
                f"### {direction}, {'one thread' if threads == 1 else 'two threads'}",
                _plot(drawn, f"{direction}-{threads}"),
                _by_size(results, cards, direction, threads),
            ]
    parts += ["## What is compared", _compared(results, cards)]
    if failures:
        parts += ["## Did not run", table(("contender", "why"), sorted(failures.items()))]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; whatever could end a cell is replaced."""
    lines = [list(heads)]
    lines += [["---"] * len(lines[0]), *([cell.replace("|", "/") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def goals_table(found: Sequence[Verdict]) -> str:
    """Every goal, what was wanted, what was measured, and whether it is met."""
    rows = []
    for verdict in found:
        sign = "at most" if verdict.at_most else "at least"
        unit = "" if verdict.unit == "x" else f" {verdict.unit}"
        measured = "-" if verdict.measured is None else f"{verdict.measured:.2f}{unit}"
        wanted = f"{sign} {verdict.wanted:g}{unit}"
        rows.append((verdict.work, verdict.against, wanted, measured, MARKS[verdict.met]))
    return table(("work", "against", "wanted", "measured", "met"), rows)


def _machine(machine: Mapping[str, Any]) -> str:
    return table(
        ("", ""),
        (
            (name.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
            for name, value in machine.items()
        ),
    )


def _headline(results: Results, cards: Mapping[str, Mapping[str, Any]]) -> str:
    places = [(direction, threads) for direction in ("encrypt", "decrypt") for threads in (1, 2)]
    rows = []
    for name in results.contenders():
        figures = [results.find(name, direction, HEADLINE, threads) for direction, threads in places]
        if any(figures):
            rows.append((cards[name]["title"], *map(_time, figures)))
    heads = (f"{direction}, {'1 thread' if threads == 1 else '2 threads'}" for direction, threads in places)
    return table(("", *heads), rows)


def _time(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    for scale, unit in ((1e6, "ms"), (1e3, "us")):
        if figure.median >= scale:
            return f"{figure.median / scale:.3g} ± {figure.deviation / scale:.3g} {unit}"
    return f"{figure.median:.0f} ± {figure.deviation:.0f} ns"


def _by_size(results: Results, cards: Mapping[str, Mapping[str, Any]], direction: str, threads: int) -> str:
    sizes = results.sizes()
    rows = []
    for name in results.contenders():
        speeds = [results.speed(name, direction, size, threads) for size in sizes]
        if any(speeds):
            cells = ("-" if speed is None else f"{speed:.3g}" for speed in speeds)
            rows.append((cards[name]["title"], *cells))
    return table(("GB/s", *map(words_for, sizes)), rows)


def _compared(results: Results, cards: Mapping[str, Mapping[str, Any]]) -> str:
    rows = (
        (cards[name]["title"], results.ran_on[name], cards[name]["less"] or "-")
        for name in results.contenders()
    )
    return table(("contender", "ran on", "does less of"), rows)


def _plot(drawn: Mapping[str, str], name: str) -> str:
    return f"![{drawn[name]}]({name}.svg)" if name in drawn else ""
