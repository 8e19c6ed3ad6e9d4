# SPDX-License-Identifier: Apache-2.0
"""The README's tour runs as it is printed, in order, in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def snippets() -> list[str]:
    """Return every Python block of the README, in order."""
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_tour_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = snippets()
    assert len(blocks) >= 7
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "decryption failed" in printed
    assert len(printed.splitlines()) == 3, printed


def test_the_two_commands_stand_at_the_top() -> None:
    head = (ROOT / "README.md").read_text().split("## ")[0]
    assert "make demo" in head and "make test" in head


@pytest.mark.parametrize("name", sorted(re.findall(r"\]\(([\w/.]+\.md)\)", (ROOT / "README.md").read_text())))
def test_links_lead_somewhere(name: str) -> None:
    assert (ROOT / name).is_file()
