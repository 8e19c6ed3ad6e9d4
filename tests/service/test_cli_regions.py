# SPDX-License-Identifier: Apache-2.0
"""The demo of regions runs to its end, and what it says is what must be."""

from __future__ import annotations

import json
import subprocess
import sys

from support import environment


def test_the_demo_of_regions_runs_and_leaves_nothing_behind() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "openkcm.cli", "--json", "demo-regions"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["records a second"] > 0
    # A probe a second, and one second to act on what it says; twice that on a busy machine.
    assert 0 < measured["eu dark after"] < 4
    assert 0 < measured["eu live after"] < 4
    assert 0 < measured["worst read around the kill"] < 3
