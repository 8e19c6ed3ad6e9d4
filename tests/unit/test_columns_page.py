# SPDX-License-Identifier: Apache-2.0
"""The page on columns runs as it is printed, in order, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "columns.md"


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("polars")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "columns.md", "exec"), names)
    assert list(names["frame"]["card"].dropna()) == ["4111", "5500"]  # type: ignore[index]
    assert (tmp_path / "cards.parquet").stat().st_size > 0
