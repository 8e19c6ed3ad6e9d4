# SPDX-License-Identifier: Apache-2.0
"""Importing this lets a script use what the tests start their servers with."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
