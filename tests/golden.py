# SPDX-License-Identifier: Apache-2.0
"""The golden vaults: what ``make_golden.py`` wrote once for each format version, opened from a private copy."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openkcm
from support import url

GOLDEN = Path(__file__).resolve().parent / "vectors" / "golden"
VERSIONS = sorted(path.parent.name for path in GOLDEN.glob("*/cases.json"))
CASES: list[tuple[str, str, dict[str, Any]]] = [
    (version, name, case)
    for version in VERSIONS
    for name, case in json.loads((GOLDEN / version / "cases.json").read_text()).items()
]
CONTEXTS: dict[str, Any] = {
    "none": None,
    "bytes": b"\x00\x01raw",
    "mapping": {"table": "cards", "row": "7", "": "ü"},
}
PLAINTEXTS = {
    "empty": b"",
    "record": "Grüezi, OpenKCM".encode(),
    "long": hashlib.shake_128(b"golden").digest(2 * 65_536 + 100),
}


def read_case(version: str, name: str) -> bytes:
    """The envelope of a case."""
    return (GOLDEN / version / f"{name}.okc").read_bytes()


@contextmanager
def open_golden(version: str, folder: Path) -> Iterator[tuple[openkcm.Core, openkcm.Gateway]]:
    """Copy a version's vault below ``folder`` and open it."""
    copy = folder / version
    shutil.copytree(GOLDEN / version, copy)
    for path in copy.iterdir():
        path.chmod(0o600)
    with sqlite3.connect(copy / "vault.db") as connection:
        connection.execute("UPDATE tenants SET root_uri = ? || '/' || tenant || '.root'", (f"local:{copy}",))
    connection.close()
    with openkcm.Core.open(url(copy)) as core, openkcm.Gateway(core) as gateway:
        yield core, gateway
