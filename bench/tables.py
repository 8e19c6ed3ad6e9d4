# SPDX-License-Identifier: Apache-2.0
"""Time ``protect`` and ``unprotect`` on United's 2013 flights, from a file to a file that is on disk.

Run ``python bench/tables.py`` (or ``make bench``); pyperf's options apply. Times are for one row of three protected
values; a new key store each time, so that protecting includes making and storing a data key for each aircraft.
Peak memory is that of the whole process and is printed with ``--track-memory``.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import openkcm
from _runner import make_runner
from openkcm.cli import demo_data, files
from openkcm.cli.csv_table import CsvTable
from openkcm.cli.demo_story import COLUMNS
from openkcm.cli.tables import ColumnCipher


def convert(core: openkcm.Core, keys: Path, source: Path, target: Path, *, protect: bool) -> int:
    """Protect or unprotect a file, as the commands do; returns the number of rows."""
    with (
        openkcm.Gateway(core, keys=keys) as gateway,
        files.reading(str(source)) as here,
        files.writing(str(target), force=True, like=str(source)) as there,
    ):
        table = CsvTable(ColumnCipher(gateway.service("bench", "flights")), COLUMNS)
        counts = table.protect(here, there) if protect else table.unprotect(here, there)
        return counts.rows


def main() -> None:
    """Run both directions on whichever backend OPENKCM_BACKEND picks."""
    runner = make_runner(__file__, processes=5, values=3)
    with tempfile.TemporaryDirectory() as name, openkcm.Core.open(f"sqlite:///{name}/vault.db") as core:
        folder = Path(name)
        core.link_tenant("bench", root=f"local:{folder / 'root.key'}")
        core.create_service("bench", "flights")
        _, shares = demo_data.split_flights(folder, ["UA"])
        clear, stored, opened = shares["UA"].path, folder / "stored.csv", folder / "opened.csv"
        keys = folder / "first.db"
        rows = convert(core, keys, clear, stored, protect=True)

        def protect(loops: int) -> float:
            spent = 0.0
            for number in range(loops):
                fresh = folder / f"keys-{number}"
                fresh.mkdir()
                start = time.perf_counter()
                convert(core, fresh / "keys.db", clear, folder / "again.csv", protect=True)
                spent += time.perf_counter() - start
                shutil.rmtree(fresh)
            return spent

        def unprotect(loops: int) -> float:
            start = time.perf_counter()
            for _ in range(loops):
                convert(core, keys, stored, opened, protect=False)
            return time.perf_counter() - start

        runner.bench_time_func("protect, a row of 3 values", protect, inner_loops=rows)
        runner.bench_time_func("unprotect, a row of 3 values", unprotect, inner_loops=rows)


if __name__ == "__main__":
    main()
