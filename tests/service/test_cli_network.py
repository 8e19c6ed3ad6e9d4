# SPDX-License-Identifier: Apache-2.0
"""`openkcm grant` and `openkcm pki`: what they do and tell, machines too, and that nothing fails quietly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import openkcm
from openkcm import Verb
from openkcm.cli.app import run
from openkcm.cli.exits import ExitCode
from openkcm.identity import fingerprints_of
from openkcm.pki import DevelopmentCA
from support import url

Call = Callable[..., Any]
ONE = "spiffe://example/gateway/one"


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command with --json: the document if it succeeds, else its exit code and error code."""
    monkeypatch.chdir(tmp_path)
    for name in ("OPENKCM_VAULT", "OPENKCM_PKI"):
        monkeypatch.delenv(name, raising=False)

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
def say(call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a command for people: what it printed on each stream."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("COLUMNS", raising=False)  # a pipe then, whose lines are not folded

    def say(*arguments: str) -> tuple[str, str]:
        assert run([*arguments]) == ExitCode.OK
        captured = capsys.readouterr()
        return captured.out, captured.err

    return say


@pytest.fixture
def vault(call: Call) -> Call:
    """A vault, and a development CA with a server and a gateway."""
    call("init")
    call("pki", "init")
    call("pki", "issue", "server", "core", "--dns", "localhost", "--ip", "127.0.0.1")
    call("pki", "issue", "gateway", "one", "--spiffe", ONE)
    return call


# ---- grants ---------------------------------------------------------------------------------------------------


def test_grants_are_given_listed_and_taken_back(vault: Call, tmp_path: Path) -> None:
    given = vault("grant", "add", ONE, "acme", "payments", "unwrap", "wrap")
    assert given == {"identity": ONE, "tenant": "acme", "service": "payments", "added": ["wrap", "unwrap"]}
    assert vault("grant", "add", ONE, "acme", "payments", "wrap")["added"] == []
    vault("grant", "add", "cn:ann", "*", "*", "administer")
    listed = vault("grant", "list")["grants"]
    assert [(each["identity"], each["tenant"], each["service"], each["verb"]) for each in listed] == [
        ("cn:ann", "*", "*", "administer"),
        (ONE, "acme", "payments", "unwrap"),
        (ONE, "acme", "payments", "wrap"),
    ]
    assert all(each["created_at"].endswith("Z") for each in listed)
    assert vault("grant", "list", "cn:ann")["grants"] == listed[:1]
    with openkcm.Core.open(url(tmp_path)) as core:
        assert core.access.allows(ONE, "acme", "payments", Verb.UNWRAP)
    taken = vault("grant", "remove", ONE, "acme", "payments", "wrap")
    assert (taken["removed"], taken["still_granted"]) == (["wrap"], [])
    assert vault("grant", "remove", ONE, "acme", "payments")["removed"] == ["unwrap"]
    assert vault("grant", "list", ONE)["grants"] == []


def test_what_was_not_granted_is_not_said_to_be_taken_back(vault: Call) -> None:
    vault("grant", "add", ONE, "*", "*", "wrap")
    for arguments in (
        (ONE, "acme", "payments"),
        (ONE, "*", "*", "unwrap"),
        ("cn:one", "*", "*"),
        (ONE, "*", "payments"),
    ):
        assert vault("grant", "remove", *arguments) == (ExitCode.NOT_FOUND, "key_not_found")
    assert len(vault("grant", "list")["grants"]) == 1


def test_what_another_grant_still_allows_is_said(vault: Call, say: Call) -> None:
    vault("grant", "add", ONE, "*", "payments", "wrap")
    vault("grant", "add", ONE, "acme", "audit", "wrap")
    vault("grant", "add", ONE, "acme", "*", "wrap", "unwrap")
    out, err = say("grant", "remove", ONE, "acme", "*", "wrap")
    assert out == f"{ONE} no longer has wrap on every service of tenant acme\n"
    assert err.splitlines() == [
        "warning: wrap stays allowed by the grant on service payments of every tenant",
        "warning: wrap stays allowed by the grant on service audit of tenant acme",
    ]
    vault("grant", "add", ONE, "acme", "*", "wrap")
    still = vault("grant", "remove", ONE, "acme", "*", "wrap")["still_granted"]
    assert [(each["tenant"], each["service"]) for each in still] == [("*", "payments"), ("acme", "audit")]


@pytest.mark.parametrize(
    "arguments",
    [
        ("gateway-one", "acme", "payments", "wrap"),
        (ONE, "acme", "payments", "decrypt"),
        (ONE, "acme", "payments"),
        (ONE, "ac me", "payments", "wrap"),
        ("SPIFFE://example/x", "acme", "payments", "wrap"),
    ],
)
def test_what_is_no_grant_is_a_usage_error(vault: Call, arguments: tuple[str, ...]) -> None:
    code, name = vault("grant", "add", *arguments)
    assert code == ExitCode.USAGE
    assert name in ("usage", "invalid_input")
    assert vault("grant", "list")["grants"] == []


def test_grants_for_people(vault: Call, say: Call) -> None:
    assert "nobody may do anything" in say("grant", "list")[0]
    out, _ = say("grant", "add", ONE, "acme", "payments", "wrap", "unwrap")
    assert out == f"{ONE} may now wrap, unwrap on service payments of tenant acme\n"
    assert "could do that already" in say("grant", "add", ONE, "acme", "payments", "wrap")[0]
    table, _ = say("grant", "list")
    assert [line.split() for line in table.splitlines()] == [
        ["identity", "tenant", "service", "verbs"],
        [ONE, "acme", "payments", "unwrap,", "wrap"],
    ]


# ---- certificates ---------------------------------------------------------------------------------------------


def test_a_ca_says_that_it_is_for_development(call: Call, say: Call, tmp_path: Path) -> None:
    out, err = say("pki", "init")
    assert err.startswith("warning: this is a development CA")
    assert str(tmp_path / "pki") in out
    assert call("pki", "init") == (ExitCode.EXISTS, "already_exists")
    made = call("pki", "init", "--pki", "other", "--days", "10")
    assert made["development"] is True
    assert Path(made["certificate"]) == tmp_path / "other" / "ca.crt"


def test_certificates_are_issued_and_listed(vault: Call, tmp_path: Path) -> None:
    issued = vault("pki", "issue", "operator", "ann", "--days", "1")
    assert (issued["name"], issued["role"], issued["identity"]) == ("ann", "client", "cn:ann")
    assert Path(issued["certificate"]) == tmp_path / "pki" / "ann" / "tls.crt"
    assert Path(issued["key"]).stat().st_mode & 0o777 == 0o600
    listed = vault("pki", "list")["certificates"]
    assert listed[0] == issued
    assert [(each["name"], each["role"], each["identity"], each["state"]) for each in listed] == [
        ("ann", "client", "cn:ann", "valid"),
        ("core", "server", "cn:core", "valid"),
        ("one", "client", ONE, "valid"),
    ]
    assert listed[1]["sans"] == ["dns:localhost", "ip:127.0.0.1"]
    assert all(each["not_after"].endswith("Z") for each in listed)
    renewed = vault("pki", "renew", "one")
    assert renewed["identity"] == ONE
    assert renewed["serial"] != listed[2]["serial"]
    states = [
        (each["name"], each["state"], each["key"] is None) for each in vault("pki", "list")["certificates"]
    ]
    assert states[2:] == [("one", "valid", False), ("one", "replaced", True)]


def test_the_ca_is_found_by_option_and_environment(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("pki", "list") == (ExitCode.NOT_FOUND, "key_not_found")
    monkeypatch.setenv("OPENKCM_PKI", str(tmp_path / "named"))
    assert call("pki", "init")["pki"] == str(tmp_path / "named")
    assert call("pki", "list")["certificates"] == []
    assert call("pki", "list", "--pki", "nowhere") == (ExitCode.NOT_FOUND, "key_not_found")


def test_certificates_for_people(vault: Call, say: Call, tmp_path: Path) -> None:
    out, err = say("pki", "issue", "gateway", "two", "--days", "5")
    assert err == ""
    assert "identity     cn:two" in out
    assert f"key          {tmp_path / 'pki' / 'two' / 'tls.key'}" in out
    table, _ = say("pki", "list")
    head, *rows = (line.split() for line in table.splitlines())
    assert head == ["name", "role", "identity", "names", "until", "state"]
    assert [(row[0], row[-1]) for row in rows] == [("core", "valid"), ("one", "valid"), ("two", "valid")]
    assert "refuses no certificate" in say("pki", "revoked")[0]
    out, err = say("pki", "revoke", "one", "--reason", "[bold]lost[/]")
    assert out == "revoked one in the vault and the CRL: 1 certificate\n"
    assert f"{ONE} keeps its grants" in err
    assert "[bold]lost[/]" in say("pki", "revoked")[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ("issue", "server", "x"),
        ("issue", "server", "x", "--dns", "a b"),
        ("issue", "server", "x", "--ip", "localhost"),
        ("issue", "server", "../x", "--dns", "localhost"),
        ("issue", "gateway", "x", "--spiffe", "cn:x"),
        ("issue", "gateway", "x", "--days", "0"),
        ("issue", "gateway"),
        ("init", "--days", "4000"),
        ("revoke",),
        ("revoke", "one", "--fingerprint", "00" * 32),
        ("revoke", "--fingerprint", "00"),
        ("revoke", "--fingerprint", "x" * 64),
        ("revoke", "--fingerprint", "00" * 32, "--crl-only"),
    ],
)
def test_mistakes_are_usage_errors(vault: Call, arguments: tuple[str, ...]) -> None:
    before = vault("pki", "list")
    code, name = vault("pki", *arguments)
    assert code == ExitCode.USAGE
    assert name in ("usage", "invalid_input")
    assert vault("pki", "list") == before
    assert vault("pki", "revoked") == {"revoked": []}


# ---- revoking -------------------------------------------------------------------------------------------------


def test_a_name_is_revoked_in_the_vault_and_the_crl(vault: Call, tmp_path: Path) -> None:
    vault("pki", "renew", "one")
    ders = [each.der for each in DevelopmentCA.open("pki").unexpired("one")]
    document = vault("pki", "revoke", "one", "--reason", "laptop stolen")
    fingerprints = {fingerprints_of(der)[0].hex() for der in ders}
    assert {each["fingerprint"] for each in document["revoked"]} == fingerprints
    assert {(each["state"], each["vault"], each["key"]) for each in document["revoked"]} == {
        ("revoked", True, None)
    }
    refused = vault("pki", "revoked")["revoked"]
    assert {each["fingerprint"] for each in refused} == fingerprints
    assert {(each["identity"], each["reason"]) for each in refused} == {(ONE, "laptop stolen")}
    with openkcm.Core.open(url(tmp_path)) as core:
        assert all(core.access.is_revoked(*fingerprints_of(der)) for der in ders)
        assert [each.act for each in core.audit_records()[-2:]] == ["revoke-certificate"] * 2
    assert vault("pki", "revoke", "one") == (ExitCode.NOT_FOUND, "key_not_found")
    assert vault("pki", "renew", "one") == (ExitCode.NOT_FOUND, "key_not_found")
    assert vault("pki", "issue", "gateway", "one", "--spiffe", ONE)["state"] == "valid"


def test_without_a_vault_nothing_is_revoked_unless_that_is_meant(vault: Call) -> None:
    before = vault("pki", "list")
    assert vault("pki", "revoke", "one", "--vault", "nowhere.db") == (ExitCode.CONFIGURATION, "configuration")
    assert vault("pki", "list") == before
    document = vault("pki", "revoke", "one", "--crl-only", "--vault", "nowhere.db")
    assert [each["vault"] for each in document["revoked"]] == [False]
    assert vault("pki", "revoked") == {"revoked": []}


@pytest.mark.parametrize("form", ["pem", "der", "fingerprint", "colons"])
def test_a_certificate_of_any_ca_is_revoked(vault: Call, tmp_path: Path, form: str) -> None:
    one = DevelopmentCA.create(tmp_path / "other").issue_client("one", spiffe=ONE)
    (tmp_path / "one.der").write_bytes(one.der)
    fingerprint = fingerprints_of(one.der)[0].hex()
    colons = ":".join(fingerprint[at : at + 2].upper() for at in range(0, 64, 2))
    arguments = {
        "pem": ("--certificate", str(one.certificate)),
        "der": ("--certificate", "one.der"),
        "fingerprint": ("--fingerprint", fingerprint),
        "colons": ("--fingerprint", colons),
    }[form]
    assert vault("pki", "revoke", *arguments, "--reason", "sold") == {
        "revoked": [{"fingerprint": fingerprint}]
    }
    (found,) = vault("pki", "revoked")["revoked"]
    assert (found["fingerprint"], found["reason"]) == (fingerprint, "sold")
    assert found["identity"] == (ONE if form in ("pem", "der") else "")


def test_a_file_that_is_no_certificate_is_not_revoked(vault: Call, tmp_path: Path) -> None:
    for data in (b"", b"x", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"f" * 32):
        (tmp_path / "bad").write_bytes(data)
        assert vault("pki", "revoke", "--certificate", "bad") == (ExitCode.FORMAT, "format")
    assert vault("pki", "revoke", "--certificate", "missing") == (ExitCode.NOT_FOUND, "file_not_found")
    assert vault("pki", "revoked") == {"revoked": []}
