# SPDX-License-Identifier: Apache-2.0
"""The command line.

Invariant: importing this package costs nothing; ``main`` is the console script ``openkcm``.
"""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and exit."""
    try:
        from .app import main as run
    except KeyboardInterrupt:  # while modules are read
        sys.exit(130)
    run()
