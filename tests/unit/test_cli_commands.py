# SPDX-License-Identifier: Apache-2.0
"""The commands on a real vault: what they do and tell machines, and that they ask before destroying."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openkcm.cli.app import run
from openkcm.cli.exits import ExitCode
from support import run_python

Call = Callable[..., Any]
FLIGHTS = b"carrier,tailnum,flight\nUA,N1,10\nUA,N2,11\nDL,,12\n"
PROTECT = ["--column", "tailnum", "--column", "flight", "--subject-column", "tailnum"]


class _Stream:
    """Standard input or output as bytes, neither of them a terminal."""

    def __init__(self, data: bytes = b"") -> None:
        self.buffer = io.BytesIO(data)

    def isatty(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def read(self) -> str:
        return self.buffer.read().decode()

    def write(self, text: str) -> int:
        return self.buffer.write(text.encode())


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command with --json: the document if it succeeds, else its exit code and error code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENKCM_VAULT", raising=False)

    def call(*arguments: str) -> Any:
        code = run(["--json", *arguments])
        captured = capsys.readouterr()
        if code == ExitCode.OK:
            assert captured.err == ""
            return json.loads(captured.out)
        assert captured.out == ""
        return code, json.loads(captured.err)["error"]["code"]

    return call


@pytest.fixture
def vault(call: Call) -> Call:
    """A vault with the tenant acme and its service payments."""
    call("init")
    call("tenant", "link", "acme", "--root", "local:acme.key")
    call("service", "create", "acme", "payments")
    return call


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, bytes]]:
    """Run a command between pipes: its exit code and what it wrote."""

    def pipe(data: bytes, *arguments: str) -> tuple[int, bytes]:
        output = _Stream()
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdin", _Stream(data))
            patch.setattr("sys.stdout", output)
            code = run([*arguments])
        return code, output.buffer.getvalue()

    return pipe


def test_init_makes_a_vault_once(call: Call, tmp_path: Path) -> None:
    made = call("init", "--region", "eu")
    assert (made["vault"], made["region"]) == ("sqlite:///vault.db", "eu")
    assert Path(made["seal"]).stat().st_size == 32
    before = (tmp_path / "vault.seal").read_bytes()
    assert call("init") == (ExitCode.EXISTS, "already_exists")
    assert (tmp_path / "vault.seal").read_bytes() == before


def test_tenants(vault: Call) -> None:
    (tenant,) = vault("tenant", "list")["tenants"]
    assert (tenant["tenant"], tenant["state"], tenant["development"]) == ("acme", "live", True)
    assert vault("tenant", "link", "acme", "--root", "local:acme.key") == (ExitCode.EXISTS, "already_exists")
    assert vault("tenant", "kill", "nobody") == (ExitCode.NOT_FOUND, "tenant_not_found")
    assert vault("tenant", "link", "x", "--root", "ftp:x") == (ExitCode.CONFIGURATION, "root_misconfigured")
    assert vault("tenant", "link", "no/slash", "--root", "local:x") == (ExitCode.USAGE, "invalid_input")


def test_kill_and_restore(vault: Call, tmp_path: Path) -> None:
    assert vault("tenant", "kill", "acme", "--reason", "drill")["state"] == "dark"
    (tenant,) = vault("status")["tenants"]
    assert (tenant["state"], "drill" in tenant["reason"]) == ("dark", True)
    (tmp_path / "file").write_bytes(b"data")
    assert vault("encrypt", "acme", "payments", "file") == (ExitCode.DISABLED, "tenant_dark")
    assert not (tmp_path / "file.okc").exists()
    assert vault("tenant", "restore", "acme")["state"] == "live"
    assert vault("encrypt", "acme", "payments", "file")["output"] == "file.okc"


def test_unlink_asks_first(vault: Call) -> None:
    assert vault("tenant", "unlink", "acme") == (ExitCode.USAGE, "invalid_input")
    assert len(vault("tenant", "list")["tenants"]) == 1
    assert vault("tenant", "unlink", "acme", "--yes") == {"tenant": "acme", "unlinked": True}
    assert vault("status", "acme")[0] == ExitCode.NOT_FOUND


def test_services(vault: Call) -> None:
    assert vault("service", "create", "acme", "payments") == (ExitCode.EXISTS, "already_exists")
    vault("service", "create", "acme", "audit")
    assert vault("service", "rotate", "acme", "audit")["version"] == 2
    services = {each["service"]: each for each in vault("service", "list", "acme")["services"]}
    assert [each["state"] for each in services["audit"]["versions"]] == ["deactivated", "active"]
    assert services["payments"]["active_version"] == 1
    assert vault("service", "rotate", "acme", "nothing")[0] == ExitCode.NOT_FOUND
    assert len(vault("status", "acme")["tenants"][0]["services"]) == 2


@pytest.mark.parametrize("size", [0, 5, 200_000])
def test_a_file_there_and_back(vault: Call, tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(b"x" * size)
    (tmp_path / "file").chmod(0o640)
    done = vault("encrypt", "acme", "payments", "file", "--context", "a=b", "--subject", "ann")
    assert (done["read"], done["written"]) == (size, (tmp_path / "file.okc").stat().st_size)
    assert vault("inspect", "file.okc")["plaintext_bytes"] == size
    assert vault("decrypt", "acme", "payments", "file.okc", "--context", "a=b")[0] == ExitCode.EXISTS
    (tmp_path / "file").unlink()
    assert vault("decrypt", "acme", "payments", "file.okc") == (ExitCode.DECRYPT, "decrypt")
    assert not (tmp_path / "file").exists()
    vault("decrypt", "acme", "payments", "file.okc", "--context", "a=b")
    assert (tmp_path / "file").read_bytes() == b"x" * size
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_truncated_file_leaves_no_plaintext(vault: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 200_000)
    vault("encrypt", "acme", "payments", "file", "--output", "sealed.okc")
    sealed = (tmp_path / "sealed.okc").read_bytes()
    (tmp_path / "sealed.okc").write_bytes(sealed[:150_000])
    before = sorted(tmp_path.iterdir())
    assert vault("decrypt", "acme", "payments", "sealed.okc")[0] in (ExitCode.DECRYPT, ExitCode.FORMAT)
    assert sorted(tmp_path.iterdir()) == before


def test_pipes(vault: Call, pipe: Callable[..., tuple[int, bytes]]) -> None:
    code, sealed = pipe(b"secret", "encrypt", "acme", "payments")
    assert (code, b"secret" in sealed) == (0, False)
    assert pipe(sealed, "decrypt", "acme", "payments", "-") == (0, b"secret")
    assert pipe(b"junk", "decrypt", "acme", "payments") == (ExitCode.FORMAT, b"")


def test_decrypt_needs_a_name_for_its_result(vault: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert vault("decrypt", "acme", "payments", "file") == (ExitCode.USAGE, "invalid_input")
    assert vault("encrypt", "acme", "payments", "nothing") == (ExitCode.NOT_FOUND, "file_not_found")
    assert vault("encrypt", "acme", "payments", "file", "-c", "x") == (ExitCode.USAGE, "invalid_input")


def test_a_table_there_and_back(vault: Call, tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_bytes(FLIGHTS)
    done = vault("protect", "acme", "payments", "f.csv", "-o", "safe.csv", *PROTECT)
    assert (done["rows"], done["values"], done["without_subject"]) == (3, 6, 2)
    found = vault("inspect", "safe.csv")["columns"]
    assert found["flight"]["stored"] == 2
    assert found["flight"]["inline"] == 1
    vault("unprotect", "acme", "payments", "safe.csv", "-o", "back.csv")
    assert (tmp_path / "back.csv").read_bytes() == FLIGHTS


def test_one_value_of_a_table_opens_by_itself(
    vault: Call, tmp_path: Path, pipe: Callable[..., tuple[int, bytes]]
) -> None:
    (tmp_path / "f.csv").write_bytes(FLIGHTS)
    vault("protect", "acme", "payments", "f.csv", "-o", "safe.csv", *PROTECT)
    value = (tmp_path / "safe.csv").read_bytes().splitlines()[2].split(b",")[2]
    opened = pipe(value + b"\n", "decrypt", "acme", "payments", "--context", "column=flight")
    assert opened == (0, b"11")


def test_in_place(vault: Call, tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_bytes(FLIGHTS)
    path.chmod(0o604)
    vault("protect", "acme", "payments", "f.csv", "--in-place", *PROTECT)
    assert b",N1," not in path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o604
    vault("unprotect", "acme", "payments", "f.csv", "-i")
    assert path.read_bytes() == FLIGHTS
    assert vault("protect", "acme", "payments", "-", "-i", *PROTECT)[0] == ExitCode.USAGE


def test_a_failure_in_place_leaves_the_file(vault: Call, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "f.csv"
    path.write_bytes(FLIGHTS + b"one,too,many,fields\n")
    assert vault("protect", "acme", "payments", str(path), "-i", *PROTECT) == (ExitCode.FORMAT, "format")
    assert path.read_bytes() == FLIGHTS + b"one,too,many,fields\n"
    assert list(path.parent.iterdir()) == [path]


def test_tables_in_pipes(vault: Call, pipe: Callable[..., tuple[int, bytes]]) -> None:
    code, safe = pipe(FLIGHTS, "protect", "acme", "payments", *PROTECT)
    assert (code, safe.count(b"\n")) == (0, 4)
    assert pipe(safe, "unprotect", "acme", "payments") == (0, FLIGHTS)
    rows = b'{"id": 1, "pay": 5.00}\n'
    code, safe = pipe(rows, "protect", "acme", "payments", "--format", "ndjson", "--column", "pay")
    assert code == 0
    assert pipe(safe, "unprotect", "acme", "payments", "--format", "ndjson") == (0, rows)


def test_another_service_cannot_open_a_table(vault: Call, tmp_path: Path) -> None:
    vault("service", "create", "acme", "audit")
    (tmp_path / "f.csv").write_bytes(FLIGHTS)
    vault("protect", "acme", "payments", "f.csv", "-i", *PROTECT)
    assert vault("unprotect", "acme", "audit", "f.csv", "-o", "back.csv") == (ExitCode.DECRYPT, "decrypt")
    assert not (tmp_path / "back.csv").exists()


def test_shredding(vault: Call, tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_bytes(FLIGHTS)
    vault("protect", "acme", "payments", "f.csv", "-i", *PROTECT)
    assert vault("shred", "acme", "payments", "N1") == (ExitCode.USAGE, "invalid_input")
    done = vault("shred", "acme", "payments", "N1", "N9", "--yes")
    assert (done["shredded"], done["not_found"]) == (1, ["N9"])
    assert vault("shred", "acme", "payments", "N9", "--yes")[0] == ExitCode.NOT_FOUND
    assert vault("unprotect", "acme", "payments", "f.csv", "-o", "b.csv") == (
        ExitCode.DESTROYED,
        "key_destroyed",
    )
    done = vault("unprotect", "acme", "payments", "f.csv", "-o", "b.csv", "--shredded", "blank")
    assert done["shredded"] == 2
    assert (tmp_path / "b.csv").read_bytes() == FLIGHTS.replace(b"UA,N1,10", b"UA,,")
    assert vault("status")["tenants"][0]["shredded"] == 1


def test_subjects_from_standard_input(vault: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f.csv").write_bytes(FLIGHTS)
    vault("protect", "acme", "payments", "f.csv", "-i", *PROTECT)
    monkeypatch.setattr("sys.stdin", _Stream(b"N1\nN2\n\nN1\n"))
    assert vault("shred", "acme", "payments", "-", "--yes")["shredded"] == 2


def test_doctor_calls_a_development_root_unsafe(vault: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--json", "doctor"]) == ExitCode.UNSAFE
    checks = {(each["area"], each["name"]): each for each in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["roots", "acme"]["level"] == "unsafe"
    assert checks["vault", "seal file"]["level"] == "ok"
    assert run(["--json", "doctor", "--allow-development"]) == ExitCode.OK


def test_doctor_calls_an_open_seal_file_unsafe(vault: Call, tmp_path: Path) -> None:
    (tmp_path / "vault.seal").chmod(0o644)
    assert run(["doctor", "--allow-development"]) == ExitCode.UNSAFE
    (tmp_path / "vault.seal").unlink()
    assert run(["doctor", "--allow-development"]) == ExitCode.UNSAFE


def test_doctor_without_a_vault_looks_at_the_machine(call: Call) -> None:
    checks = {each["name"] for each in call("doctor")["checks"]}
    assert {"backend", "OpenSSL", "secret memory", "RLIMIT_MEMLOCK"} <= checks


def test_the_texts_for_people(vault: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tenant", "link", "beta", "--root", "local:beta.key"]) == 0
    captured = capsys.readouterr()
    assert "linked beta" in captured.out
    assert "warning: a local: root is for development only" in captured.err
    assert run(["status"]) == 0
    assert "payments  version 1 active" in capsys.readouterr().out
    (tmp_path / "f.csv").write_bytes(FLIGHTS)
    assert run(["protect", "acme", "payments", "f.csv", "-i", "-q", *PROTECT]) == 0
    assert capsys.readouterr() == ("", "")


def test_an_empty_file_is_no_vault(call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "empty.db"
    path.touch(0o644)
    for command in ("status", "doctor"):
        run(["--vault", str(path), command])
    capsys.readouterr()
    assert call("--vault", str(path), "status") == (ExitCode.CONFIGURATION, "configuration")
    assert path.stat().st_size == 0
    assert sorted(each.name for each in tmp_path.iterdir()) == ["empty.db"]
    call("--vault", str(path), "init")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_hint_does_not_name_the_command_that_was_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nothing"
    path.write_bytes(b"nothing of ours")
    assert run(["inspect", str(path)]) == ExitCode.FORMAT
    assert "hint:" not in capsys.readouterr().err


def test_a_missing_native_backend_is_said_where_nobody_asked_for_the_other(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['openkcm._fast.aead'] = None; from openkcm.cli.app import run; "
        "sys.exit(run(['init', '--vault', sys.argv[1]]))"
    )
    for choice, said in (("", True), ("python", False)):
        done = run_python(code, str(tmp_path / f"{said}.db"), OPENKCM_BACKEND=choice)
        assert ("the native backend is missing" in done.stderr) is said
