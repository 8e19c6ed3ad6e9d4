# SPDX-License-Identifier: Apache-2.0
"""A drill as a picture: decrypts a second over time, and the moments that count.

Invariant: it shows what ``Findings`` holds and nothing else; SVG or PNG, by the file's name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from ..errors import ConfigurationError, InvalidInput
from .drill_run import Findings

BIN_SECONDS: Final = 0.1
FORMATS: Final = (".svg", ".png")
_MOMENTS: Final = (
    ("unplugged", "root off", "#444444", "--"),
    ("first_no", "first no", "#c0392b", "-"),
    ("zeroed", "zeroed", "#8e44ad", ":"),
    ("replugged", "root on", "#444444", "--"),
    ("recovered", "recovered", "#1e8449", "-"),
)


class NoPlot(ConfigurationError):
    """matplotlib is not installed."""

    hint = "pip install 'openkcm[plot]', or leave --plot out"


def check_plot(path: str) -> None:
    """Say before a drill whether its plot can be made.

    Raises:
        InvalidInput: the file's name ends in neither .svg nor .png.
        NoPlot: matplotlib is missing.
    """
    if Path(path).suffix.lower() not in FORMATS:
        raise InvalidInput("--plot takes a file name that ends in .svg or .png")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise NoPlot("plots need matplotlib") from None


def draw(found: Findings, path: str) -> None:
    """Draw a drill into a file."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    _bars(axes, found)
    for name, label, colour, style in _MOMENTS:
        at = getattr(found, name)
        if at is not None:
            axes.axvline(at - found.started, color=colour, linestyle=style, linewidth=1.4, label=label)
    axes.set_xlabel("seconds")
    axes.set_ylabel("decrypts a second")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{found.tenant}: {_headline(found)}", loc="left", fontsize=11)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=7, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _bars(axes: Any, found: Findings) -> None:
    import matplotlib

    good = [at - found.started for at in found.outcomes.successes()]
    bad = [
        at - found.started
        for at, error in zip(found.outcomes.at, found.outcomes.error, strict=False)
        if error
    ]
    end = max([*good, *bad], default=1.0)
    edges = [number * BIN_SECONDS for number in range(int(end / BIN_SECONDS) + 2)]
    weight = 1 / BIN_SECONDS
    axes.hist(
        [good, bad],
        bins=edges,
        weights=[[weight] * len(good), [weight] * len(bad)],
        stacked=True,
        color=[matplotlib.colors.to_hex("#2e86c1"), matplotlib.colors.to_hex("#f1948a")],
        label=["decrypted", "refused"],
    )


def _headline(found: Findings) -> str:
    if found.first_no is None or found.zeroed is None:
        return "the root never said no"
    return f"zeroed {(found.zeroed - found.first_no) * 1000:.1f} ms after the root's first no"
