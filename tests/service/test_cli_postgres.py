# SPDX-License-Identifier: Apache-2.0
"""The command line on a vault in PostgreSQL; its password is shown nowhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openkcm.cli.app import run
from openkcm.cli.exits import ExitCode
from openkcm.testing.postgres import PostgresServer

Call = Callable[..., Any]


@pytest.fixture
def call(
    postgres_server: PostgresServer,
    postgres_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Call:
    """Run a command; its exit code and document."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENKCM_VAULT", postgres_url)
    monkeypatch.setenv("OPENKCM_SEAL", str(tmp_path / "vault.seal"))
    monkeypatch.setenv("OPENKCM_KEYS", str(tmp_path / "keys.db"))

    def call(*arguments: str) -> tuple[int, Any]:
        code = run(["--json", *arguments])
        captured = capsys.readouterr()
        assert postgres_server.password not in captured.out + captured.err
        return code, json.loads(captured.out or captured.err)

    return call


def test_a_vault_is_made_once(call: Call, tmp_path: Path) -> None:
    code, refused = call("status")
    assert code != 0 and "openkcm init" in refused["error"]["message"]
    assert not (tmp_path / "vault.seal").exists()
    code, made = call("init", "--region", "eu")
    assert code == 0
    assert made["region"] == "eu"
    assert made["vault"].startswith("postgresql://openkcm@127.0.0.1:")
    code, refused = call("init")
    assert code != 0 and refused["error"]["code"] == "already_exists"


def test_the_tree_is_shown_and_records_pass(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("init")[0] == 0
    assert call("tenant", "link", "acme", "--root", f"local:{tmp_path / 'root'}")[0] == 0
    assert call("service", "create", "acme", "records")[0] == 0
    code, document = call("status")
    assert code == 0
    assert [tenant["tenant"] for tenant in document["tenants"]] == ["acme"]
    (tmp_path / "plain").write_bytes(b"hello")
    assert run(["encrypt", "acme", "records", "plain", "--subject", "u"]) == 0
    assert run(["decrypt", "acme", "records", "plain.okc", "-o", "again"]) == 0
    capsys.readouterr()
    assert (tmp_path / "again").read_bytes() == b"hello"
    code, plan = call("plan", "unplug", "acme")
    assert (code, plan["wrapped_keys"]["named_data_keys"]) == (0, 1)


def test_doctor(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> dict[str, tuple[str, str]]:
        _, document = call("doctor")
        return {
            each["name"]: (each["level"], each["found"])
            for each in document["checks"]
            if each["area"] == "vault"
        }

    assert "no vault yet" in found()["database"][1]
    assert call("init")[0] == 0
    checks = found()
    assert {name: checks[name][0] for name in ("database", "seal file", "connection")} == {
        "database": "ok",
        "seal file": "ok",
        "connection": "ok",
    }
    monkeypatch.delenv("OPENKCM_SEAL")
    assert found()["seal file"][0] == "unsafe"
    assert call("doctor")[0] == ExitCode.UNSAFE


def test_plan_without_a_key_store(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call("init")[0] == 0
    assert call("tenant", "link", "acme", "--root", f"local:{tmp_path / 'root'}")[0] == 0
    monkeypatch.delenv("OPENKCM_KEYS")
    code, plan = call("plan", "unplug", "acme")
    assert (code, plan["key_store"]) == (0, None)
