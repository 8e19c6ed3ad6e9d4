# SPDX-License-Identifier: Apache-2.0
"""The command line.

Invariant: importing this package costs nothing; ``main`` is the console script ``openkcm``.
"""

from __future__ import annotations

from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and exit."""
    from .app import main as run

    run()
