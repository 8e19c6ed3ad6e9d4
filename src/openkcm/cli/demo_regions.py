# SPDX-License-Identifier: Apache-2.0
"""`openkcm demo-regions`: two regions, their replicas and their applications on one screen, while things go wrong.

Invariant: that of ``regions``; it says what it needs where something is missing.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import typer

from ..errors import ConfigurationError
from .commands import INSIGHT, command


class Missing(ConfigurationError):
    """A part that the demo runs is not installed."""

    hint = "pip install 'openkcm[pkcs11,postgres]', and apt-get install postgresql softhsm2"


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "demo-regions", rich_help_panel=INSIGHT)(demo_regions)


def demo_regions() -> None:
    """Watch two regions under load while a root is unplugged, a Core killed and the database restarted."""
    from .output import answer, note

    try:
        from .regions.site import RegionsSite
        from .regions.story import RegionsStory
    except ImportError as error:
        raise Missing(f"{error.name} is not installed") from None
    folder = Path(tempfile.mkdtemp(prefix="openkcm-regions-"))
    site = RegionsSite(folder)
    try:
        note("[dim]starting PostgreSQL, a customer's HSM, four Cores and four applications ...[/]")
        try:
            site.start()
        except RuntimeError as error:
            raise Missing(str(error)) from None
        answer(RegionsStory(site).tell(), "")
    finally:
        site.close()
        shutil.rmtree(folder, ignore_errors=True)
