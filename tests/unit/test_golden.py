# SPDX-License-Identifier: Apache-2.0
"""Golden envelopes: every version of the format that was ever written opens, on every backend, for ever."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

import openkcm
from golden import CASES, CONTEXTS, GOLDEN, PLAINTEXTS, VERSIONS, open_golden, read_case
from openkcm import envelope
from support import refused


def test_they_are_all_there() -> None:
    """A loader that finds nothing would pass for ever."""
    assert VERSIONS == ["v1"]
    for version in VERSIONS:
        named = {name for at, name, _ in CASES if at == version}
        assert {path.stem for path in (GOLDEN / version).glob("*.okc")} == named
    kinds = {read_case(version, name)[5] for version, name, case in CASES if "opens" in case}
    assert kinds == {1, 2, 3, 4}
    assert sum("error" in case for _, _, case in CASES) >= 10


@pytest.fixture(scope="module")
def handles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A handle on each version's vault."""
    with ExitStack() as stack:
        opened = {}
        for version in VERSIONS:
            _, gateway = stack.enter_context(open_golden(version, tmp_path_factory.mktemp("golden")))
            opened[version] = gateway.service("acme", "payments")
        yield opened


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
    blob = read_case(version, name)
    if "error" in case:
        refused(lambda: open_case(handles[version], case, blob), getattr(openkcm.errors, case["error"]))
        return
    assert open_case(handles[version], case, blob) == PLAINTEXTS[case["opens"]]
    assert blob.startswith(envelope.parse(blob).header)
