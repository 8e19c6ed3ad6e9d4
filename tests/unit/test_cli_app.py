# SPDX-License-Identifier: Apache-2.0
"""The command line as a whole: options in either place, errors in one line, documented exit codes."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from openkcm import errors
from openkcm.cli import app
from openkcm.cli.app import run
from openkcm.cli.exits import ExitCode, error_name, exit_code

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "cli.md"

COMMANDS = [
    ["init"],
    ["tenant", "link"],
    ["tenant", "list"],
    ["tenant", "kill"],
    ["tenant", "restore"],
    ["tenant", "unlink"],
    ["service", "create"],
    ["service", "list"],
    ["service", "rotate"],
    ["encrypt"],
    ["decrypt"],
    ["protect"],
    ["unprotect"],
    ["shred"],
    ["grant", "add"],
    ["grant", "remove"],
    ["grant", "list"],
    ["pki", "init"],
    ["pki", "issue", "server"],
    ["pki", "issue", "gateway"],
    ["pki", "issue", "operator"],
    ["pki", "renew"],
    ["pki", "revoke"],
    ["pki", "list"],
    ["pki", "revoked"],
    ["inspect"],
    ["status"],
    ["doctor"],
    ["demo"],
]


@pytest.fixture(autouse=True)
def _plain_output(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENKCM_VAULT", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")


def test_help_and_completion_import_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['openkcm', '--help']\n"
        "from openkcm.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'sqlalchemy', 'alembic', 'cryptography', 'pkcs11', 'openkcm.core', 'openkcm.crypto'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Encrypt your customers' data" in done.stdout


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_takes_the_global_options(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in ("--vault", "--json", "--quiet"))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_is_documented(words: list[str]) -> None:
    assert f"openkcm {' '.join(words)}" in DOCUMENTATION.read_text()


def test_every_exit_code_is_documented() -> None:
    text = DOCUMENTATION.read_text()
    for code in ExitCode:
        assert f"| {code.value} | {code.__doc__} |" in text


def test_every_error_has_an_exit_code_of_its_own_family() -> None:
    every = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, Exception)]
    assert len(every) > 20
    for error in every:
        code = exit_code(error("x"))
        if error in (errors.OpenKCMError, errors.InternalError):
            assert code is ExitCode.INTERNAL
        else:
            assert code not in (ExitCode.OK, ExitCode.INTERNAL)


def test_operating_system_errors_have_codes() -> None:
    assert exit_code(FileNotFoundError()) is ExitCode.NOT_FOUND
    assert exit_code(FileExistsError()) is ExitCode.EXISTS
    assert exit_code(PermissionError()) is ExitCode.IO
    assert error_name(FileExistsError()) == "file_exists"
    assert error_name(ZeroDivisionError()) == "internal"


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["tenant", "kill"], ["status", "--frob"], ["tenant", "frob"]]
)
def test_a_mistake_in_the_command_line_is_one_line_and_a_hint(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    error, hint = captured.err.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint:  `openkcm")
    assert hint.endswith("--help` shows what it takes")


def test_a_mistake_in_the_command_line_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--json", "tenant", "kill"]) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert json.loads(captured.err)["error"]["code"] == "usage"


@pytest.mark.parametrize("arguments", [["--json", "status"], ["status", "--json"]])
def test_an_error_for_machines_in_either_place(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == ExitCode.CONFIGURATION
    captured = capsys.readouterr()
    assert captured.out == ""
    error = json.loads(captured.err)["error"]
    assert (error["code"], error["retryable"], error["exit_code"]) == ("configuration", False, 10)
    assert "openkcm init" in error["hint"]


def test_no_command_but_init_makes_a_vault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tenant", "list"]) == ExitCode.CONFIGURATION
    assert "there is no vault at vault.db" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("openkcm.cli.session.vault_path", fail)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), ExitCode.INTERRUPTED, "error: interrupted"),
        (app.Terminated(), ExitCode.TERMINATED, "error: terminated"),
        (
            PermissionError(13, "Permission denied", "a\nfile"),
            ExitCode.IO,
            "error: a file: permission denied",
        ),
        (errors.RootUnavailable("no\nanswer"), ExitCode.UNAVAILABLE, "error: no answer"),
        (ZeroDivisionError("secret"), ExitCode.INTERNAL, "error: unexpected ZeroDivisionError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_no_failure_shows_a_traceback(
    error: BaseException,
    code: ExitCode,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("OPENKCM_TRACEBACK", raising=False)
    raising(monkeypatch, error)
    assert run(["tenant", "list"]) == code
    captured = capsys.readouterr()
    assert captured.err.splitlines()[0].startswith(text)
    assert "Traceback" not in captured.err
    assert "secret" not in captured.err


def test_an_outage_is_retryable_for_machines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, errors.RootUnavailable("no answer"))
    assert run(["tenant", "list", "--json"]) == ExitCode.UNAVAILABLE
    assert json.loads(capsys.readouterr().err)["error"]["retryable"] is True


def test_the_environment_names_the_vault_and_the_option_wins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENKCM_VAULT", "elsewhere.db")
    run(["tenant", "list"])
    assert "there is no vault at elsewhere.db" in capsys.readouterr().err
    run(["tenant", "list", "--vault", "here.db"])
    assert "there is no vault at here.db" in capsys.readouterr().err
    run(["--vault", "there.db", "tenant", "list"])
    assert "there is no vault at there.db" in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("openkcm ")


def test_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from openkcm.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            "PATH": "",
            "PYTHONPATH": ":".join(sys.path),
            "_OPENKCM_COMPLETE": "complete_bash",
            "COMP_WORDS": "openkcm te",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["tenant"]
