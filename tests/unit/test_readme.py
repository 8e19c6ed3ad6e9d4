# SPDX-License-Identifier: Apache-2.0
"""The README's tour runs as it is printed, in order, in an empty folder."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import openkcm
from rpc_support import Replica
from support import environment

ROOT = Path(__file__).resolve().parents[2]


def blocks(language: str, text: str) -> list[str]:
    """Return every block of a language in a text, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    """Return a section of the README."""
    return (ROOT / "README.md").read_text().partition(f"## {title}")[2].partition("\n## ")[0]


def test_the_tour_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = blocks("python", section("Five minutes"))
    assert len(snippets) >= 7
    names: dict[str, object] = {}
    for block in snippets:
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
    (block,) = blocks("console", section("On the command line"))
    lines = [line.partition("  #")[0].rstrip() for line in block.splitlines()]
    assert len(lines) >= 9
    (tmp_path / "people.csv").write_text("id,name,email\n41,Ann,ann@a.example\n42,Bob,bob@b.example\n")
    for line in lines:
        more = next((text for start, text in ADDED.items() if line.startswith(start)), "")
        run(line + more, tmp_path)
    assert (tmp_path / "people.opened.csv").read_bytes() == (tmp_path / "people.csv").read_bytes()


def run(line: str, folder: Path) -> None:
    """Run a command of the README as it is printed."""
    done = subprocess.run(
        [sys.executable, "-m", "openkcm.cli", *shlex.split(line)[1:]],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{line}: {done.stdout}{done.stderr}"


def test_a_core_and_a_gateway_on_a_network_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = section("On several machines")
    (console,), (config,), (snippet,) = (blocks(each, text) for each in ("console", "toml", "python"))
    with openkcm.Core.open("sqlite:///vault.db") as core:
        core.link_tenant("acme", root="local:acme-root.key")
        core.create_service("acme", "payments")
    *prepare, serve = console.splitlines()
    for line in prepare:
        run(line, tmp_path)
    assert serve == "openkcm serve core --config core.toml"
    assert config.count(":7443") == 1 and snippet.count(":7443") == 1
    (tmp_path / "core.toml").write_text(config.replace(":7443", ":0"))
    with Replica(tmp_path / "core.toml") as replica:
        names: dict[str, Any] = {"openkcm": openkcm}
        exec(compile(snippet.replace(":7443", f":{replica.ports['data']}"), "README.md", "exec"), names)
        names["gateway"].close()
        names["gateway"]._core.close()


def test_the_two_commands_stand_at_the_top() -> None:
    head = (ROOT / "README.md").read_text().split("## ")[0]
    assert "make demo" in head and "make test" in head


@pytest.mark.parametrize("name", sorted(re.findall(r"\]\(([\w/.]+\.md)\)", (ROOT / "README.md").read_text())))
def test_links_lead_somewhere(name: str) -> None:
    assert (ROOT / name).is_file()
