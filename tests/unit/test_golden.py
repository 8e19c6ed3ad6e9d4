# SPDX-License-Identifier: Apache-2.0
"""Golden envelopes: every version of the format that was ever written opens, on every backend, for ever."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import openkcm
from openkcm import envelope
from support import refused, url

GOLDEN = Path(__file__).resolve().parents[1] / "vectors" / "golden"
VERSIONS = sorted(path.parent.name for path in GOLDEN.glob("*/cases.json"))
CASES = [
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


def test_they_are_all_there() -> None:
    """A loader that finds nothing would pass for ever."""
    assert VERSIONS == ["v1"]
    for version in VERSIONS:
        named = {name for at, name, _ in CASES if at == version}
        assert {path.stem for path in (GOLDEN / version).glob("*.okc")} == named
    kinds = {
        (GOLDEN / version / f"{name}.okc").read_bytes()[5] for version, name, case in CASES if "opens" in case
    }
    assert kinds == {1, 2, 3, 4}
    assert sum("error" in case for _, _, case in CASES) >= 10


@pytest.fixture(scope="module")
def handles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Each version's vault, copied to a private folder and opened."""
    opened: dict[str, Any] = {}
    closing: list[Any] = []
    for version in VERSIONS:
        folder = tmp_path_factory.mktemp(version) / "vault"
        shutil.copytree(GOLDEN / version, folder)
        for path in folder.iterdir():
            path.chmod(0o600)
        with sqlite3.connect(folder / "vault.db") as connection:
            connection.execute(
                "UPDATE tenants SET root_uri = ? || '/' || tenant || '.root'", (f"local:{folder}",)
            )
        connection.close()
        core = openkcm.Core.open(url(folder))
        gateway = openkcm.Gateway(core)
        opened[version] = gateway.service("acme", "payments")
        closing += [gateway, core]
    yield opened
    for thing in closing:
        thing.close()


def open_case(handle: Any, case: dict[str, Any], blob: bytes) -> bytes:
    context = CONTEXTS[case["context"]]
    if not case["stream"]:
        result: bytes = handle.decrypt(blob, context=context)
        return result
    target = io.BytesIO()
    handle.decrypt_stream(io.BytesIO(blob), target, context=context)
    return target.getvalue()


@pytest.mark.parametrize(("version", "name", "case"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_each_case(handles: dict[str, Any], version: str, name: str, case: dict[str, Any]) -> None:
    blob = (GOLDEN / version / f"{name}.okc").read_bytes()
    if "error" in case:
        refused(lambda: open_case(handles[version], case, blob), getattr(openkcm.errors, case["error"]))
        return
    assert open_case(handles[version], case, blob) == PLAINTEXTS[case["opens"]]
    assert blob.startswith(envelope.parse(blob).header)
