# SPDX-License-Identifier: Apache-2.0
"""The README's tour runs as it is printed, in order, in an empty folder."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support import environment

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
    assert len(printed.splitlines()) == 5, printed
    assert printed.endswith("\ndark\nlive\n")


# What a person answers at a terminal, and what would take a test too long.
ADDED = {
    "openkcm shred": " --yes",
    "openkcm drill": " --interval 0.5",
    "openkcm doctor": " --allow-development",
}


def test_the_commands_run(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text().partition("## On the command line")[2]
    block = re.search(r"^```console\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    lines = [line.partition("  #")[0].rstrip() for line in block[1].splitlines()]
    assert len(lines) >= 9
    (tmp_path / "people.csv").write_text("id,name,email\n41,Ann,ann@a.example\n42,Bob,bob@b.example\n")
    for line in lines:
        more = next((text for start, text in ADDED.items() if line.startswith(start)), "")
        done = subprocess.run(
            [sys.executable, "-c", "from openkcm.cli import main; main()", *shlex.split(line + more)[1:]],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"
    assert (tmp_path / "people.opened.csv").read_bytes() == (tmp_path / "people.csv").read_bytes()


def test_the_two_commands_stand_at_the_top() -> None:
    head = (ROOT / "README.md").read_text().split("## ")[0]
    assert "make demo" in head and "make test" in head


@pytest.mark.parametrize("name", sorted(re.findall(r"\]\(([\w/.]+\.md)\)", (ROOT / "README.md").read_text())))
def test_links_lead_somewhere(name: str) -> None:
    assert (ROOT / name).is_file()
