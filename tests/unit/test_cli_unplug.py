# SPDX-License-Identifier: Apache-2.0
"""`root`, `tenant probe`, `plan`, `drill` and `service lease`, as an operator types them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import openkcm
from openkcm.cli import drill_run
from openkcm.cli.drill_run import Findings, Lever, run_drill
from openkcm.errors import RootUnavailable
from openkcm.testing.aws import AWSKMS
from support import environment, make_vault, refused, url

OPENKCM = [sys.executable, "-c", "from openkcm.cli import main; main()"]


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Path]:
    """A folder with a vault: tenant acme on a file root, with services payments and audit."""
    with make_vault(tmp_path, "acme", service="payments") as core:
        core.create_service("acme", "audit")
        with openkcm.Gateway(core) as gateway:
            gateway.service("acme", "payments").encrypt_many([b"x"] * 3, subjects=["a", "b", "c"])
    yield tmp_path


def run(vault: Path, *arguments: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*OPENKCM, *arguments],
        cwd=vault,
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def answer(vault: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run(vault, *arguments, "--json", code=code).stdout)
    return document


def unplug(vault: Path) -> None:
    (vault / "acme.root").rename(vault / "away")


def plug(vault: Path) -> None:
    (vault / "away").rename(vault / "acme.root")


# ---- probe, push -------------------------------------------------------------------------------------------


def test_probing_a_tenant(vault: Path) -> None:
    found = answer(vault, "tenant", "probe", "acme")
    assert (found["state"], found["reason"]) == ("live", "")
    assert found["milliseconds"] > 0
    unplug(vault)
    found = answer(vault, "tenant", "probe", "acme", code=7)
    assert found["state"] == "dark"
    assert "is not there" in found["reason"]
    assert "dark" in run(vault, "tenant", "probe", "acme", code=7).stdout
    run(vault, "tenant", "probe", "nobody", code=5)


def test_a_push_makes_dark_and_light(vault: Path) -> None:
    uri = f"local:{vault / 'acme.root'}"
    with openkcm.Core.open(url(vault), probe_interval=3600) as core:
        service = openkcm.Gateway(core).service("acme", "payments")
        blob = service.encrypt(b"x")
        service.decrypt(blob)
        unplug(vault)
        # Relative, as an operator would type it.
        (found,) = answer(vault, "root", "changed", "local:acme.root")["tenants"]
        assert (found["tenant"], found["state"]) == ("acme", "dark")
        core.poll()
        assert not core._vault.ring.is_open("acme")
        refused(lambda: service.decrypt(blob), openkcm.TenantDark)
        plug(vault)
        (found,) = answer(vault, "root", "changed", uri)["tenants"]
        assert found["state"] == "live"
        core.poll()
        core._vault.liveness.run_due(run=lambda call: call())
        assert service.decrypt(blob) == b"x"
    assert answer(vault, "root", "changed", f"local:{vault / 'other'}")["tenants"] == []


def test_what_to_allow(vault: Path) -> None:
    found = answer(vault, "root", "grant", "local:some.key", "--identity", "alice")
    assert found["identity"] == "alice"
    assert found["text"] == f"chown alice {vault}/some.key\nchmod 600 {vault}/some.key"
    assert not (vault / "some.key").exists()
    assert "chmod 600" in run(vault, "root", "grant", "local:some.key").stdout
    run(vault, "root", "grant", "nonsense", code=10)


# ---- plan ----------------------------------------------------------------------------------------------------


def test_planning_an_unplug(vault: Path) -> None:
    run(vault, "service", "rotate", "acme", "payments")
    run(vault, "service", "lease", "acme", "audit", "30")
    found = answer(vault, "plan", "unplug", "acme")
    assert found["wrapped_keys"] == {"tenant_keys": 1, "service_keys": 3, "named_data_keys": 3}
    assert {each["service"]: each["subjects"] for each in found["services"]} == {"payments": 3, "audit": 0}
    assert {each["service"]: each["lease"] for each in found["services"]} == {"payments": 0, "audit": 30}
    assert found["state"] == "live"
    text = run(vault, "plan", "unplug", "acme").stdout
    assert "payments" in text
    assert "3 named data keys" in text
    run(vault, "plan", "unplug", "nobody", code=5)


def test_planning_without_a_key_store(vault: Path) -> None:
    (vault / "vault.keys.db").unlink()
    found = answer(vault, "plan", "unplug", "acme")
    assert found["wrapped_keys"]["named_data_keys"] is None
    assert not (vault / "vault.keys.db").exists()


def test_a_lease_is_set_and_shown(vault: Path) -> None:
    run(vault, "service", "lease", "acme", "payments", "12.5")
    assert "open-lease 12.5 s" in run(vault, "status").stdout
    run(vault, "service", "lease", "acme", "payments", "0")
    assert "open-lease" not in run(vault, "status").stdout
    run(vault, "service", "lease", "acme", "payments", "3601", code=2)


# ---- drill ---------------------------------------------------------------------------------------------------


def test_a_drill_on_a_test_tenant(tmp_path: Path) -> None:
    found = answer(tmp_path, "drill", "unplug", "--interval", "0.5", "--rate", "200", "--plot", "drill.svg")
    assert found["passed"]
    assert found["decrypts"]["succeeded"] > 100
    assert found["decrypts"]["failed"]["TenantDark"] > 20
    seconds = found["seconds"]
    assert None not in seconds.values()
    assert seconds["off_to_last_decrypt"] <= 1.5
    words = {text.strip() for text in ElementTree.parse(tmp_path / "drill.svg").getroot().itertext()}
    assert {"root off", "first no", "zeroed", "root on", "recovered", "decrypts a second"} <= words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drill.svg"]


def test_a_drill_on_a_real_tenant(vault: Path) -> None:
    run(vault, "drill", "unplug", "acme", code=2)  # nobody is there to say that it is meant
    assert (vault / "acme.root").exists()
    done = run(vault, "drill", "unplug", "acme", "--yes", "--interval", "0.5", "--rate", "100")
    assert "passed" in done.stdout
    assert re.search(r"first no → every key zeroed\s+[\d.]+ ms", done.stdout)
    assert (vault / "acme.root").exists()
    with openkcm.Core.open(url(vault)) as core:
        acts = [each.act for each in core.audit_records()]
        assert acts[-2:] == ["root-dark", "root-live"]
        assert acts.count("root-dark") == 1


def test_a_drill_by_commands(vault: Path) -> None:
    found = answer(
        vault,
        *("drill", "unplug", "acme", "--yes", "--interval", "0.5", "--rate", "100", "--service", "audit"),
        *("--off", "mv acme.root gone", "--on", "mv gone acme.root"),
    )
    assert found["passed"]
    assert found["tenant"] == "acme"


def test_a_drill_that_fails_gives_the_root_back(vault: Path) -> None:
    """Its no never comes."""
    code = """
import sys
from openkcm.cli import drill_run
drill_run.BASELINE_SECONDS = 0.1
from openkcm.roots.local import LocalRoot
LocalRoot.switch_off = lambda root: None
LocalRoot.switch_on = lambda root: print("given back", flush=True)
from openkcm.cli.app import run
sys.exit(run(["drill", "unplug", "acme", "--yes", "--interval", "60", "--patience", "1"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=vault,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 11, done.stdout + done.stderr
    assert "given back" in done.stdout
    assert "did not say no within 1 seconds" in done.stderr


@pytest.mark.parametrize(
    "wrong",
    [
        ["--off", "true"],
        ["--plot", "drill.pdf"],
        ["--service", "x"],
        ["acme", "--root", "local:x", "--yes"],
        ["--rate", "0"],
    ],
)
def test_a_drill_that_makes_no_sense_is_refused_before_it_begins(vault: Path, wrong: list[str]) -> None:
    run(vault, "drill", "unplug", *wrong, code=2)


def test_a_lever_that_fails_ends_the_drill(vault: Path) -> None:
    done = run(vault, "drill", "unplug", "acme", "--yes", "--off", "false", "--on", "true", code=10)
    assert "the command failed (1): false" in done.stderr


def test_an_interrupted_drill_gives_the_root_back(vault: Path) -> None:
    import signal
    import time

    process = subprocess.Popen(
        [*OPENKCM, "drill", "unplug", "acme", "--yes", "--interval", "30"],
        cwd=vault,
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    end = time.monotonic() + 60
    while (vault / "acme.root").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert not (vault / "acme.root").exists()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert (vault / "acme.root").exists()
    assert not os.path.exists(vault / "acme.root.unplugged")


def test_the_verdict_is_about_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Core that goes on for too long is not passed, and one that never hears the no ends the drill."""
    kept = Findings("acme", 1.0, 0.0, 1.0, 1.5, 1.6, 1.7, 3.0, 3.5)
    assert kept.passed
    assert not Findings("acme", 1.0, 0.0, 1.0, 1.5, 1.6, 3.1, 4.0, 4.5).passed
    assert not Findings("acme", 1.0, 0.0, 1.0, 1.5, 2.6, 1.7, 4.0, 4.5).passed
    assert not Findings("acme", 1.0, 0.0, 1.0, 1.5, 1.6, 1.7, 4.0, 6.5).passed
    assert not Findings("acme", 1.0, 0.0, 1.0, 1.5, 1.6, 1.7, 4.0, None).passed
    monkeypatch.setattr(drill_run, "BASELINE_SECONDS", 0.05)
    with make_vault(tmp_path) as core, openkcm.Gateway(core) as gateway:
        lever = Lever(lambda: None, lambda: None, True)
        refused(
            lambda: run_drill(
                core,
                gateway,
                ("acme", "records"),
                lever,
                interval=10,
                rate=100,
                patience=0.2,
                say=lambda text: None,
            ),
            RootUnavailable,
        )


# ---- the handshake, with a real provider's SDK -----------------------------------------------------------------


def test_linking_says_which_single_permission_is_missing(vault: Path, aws_kms: AWSKMS) -> None:
    key = aws_kms.make_key("globex")
    for permission in aws_kms.permissions:
        key.deny(permission)
        done = run(vault, "tenant", "link", "globex", "--root", key.uri, "--json", code=9)
        error = json.loads(done.stderr)["error"]
        assert (error["code"], error["permission"]) == ("root_denied", permission)
        assert permission in error["message"]
        assert "openkcm root grant" in error["hint"]
        run(vault, "status", "globex", code=5)
        key.allow()
    run(vault, "tenant", "link", "globex", "--root", key.uri)
    key.disable()
    found = answer(vault, "tenant", "probe", "globex", code=7)
    assert (found["state"], found["root"]) == ("dark", key.uri)
    assert "DisabledException" in found["reason"]


def test_the_grant_names_who_we_are(vault: Path, aws_kms: AWSKMS) -> None:
    found = answer(vault, "root", "grant", aws_kms.make_key("globex").uri)
    assert found["permissions"] == list(aws_kms.permissions)
    assert found["identity"] in found["text"]
    assert found["identity"].endswith(":role/openkcm-core")
    assert json.loads(found["text"].partition("\n\n")[0])["Action"] == list(aws_kms.permissions)


def test_an_outage_is_worth_another_try_and_says_so(vault: Path, aws_kms: AWSKMS) -> None:
    key = aws_kms.make_key("globex")
    key.fail(503)
    error = json.loads(run(vault, "tenant", "link", "globex", "--root", key.uri, "--json", code=11).stderr)[
        "error"
    ]
    assert (error["code"], error["retryable"]) == ("root_unavailable", True)
    key.heal()
    run(vault, "tenant", "link", "globex", "--root", key.uri)
    key.throttle()
    found = answer(vault, "tenant", "probe", "globex", code=11)
    assert found["state"] == "grace"


def test_a_drill_on_a_test_key_of_a_provider(tmp_path: Path, aws_kms: AWSKMS) -> None:
    """The customer's levers are commands; here they are the provider's own API, called by its own SDK."""
    key = aws_kms.make_key("drill")
    lever = (
        f"{sys.executable} -c 'import botocore.session as s; "
        's.get_session().create_client("kms", region_name="eu-central-1").{}(KeyId="' + key.arn + "\")'"
    )
    done = run(
        tmp_path,
        *("drill", "unplug", "--root", key.uri, "--interval", "1", "--rate", "100", "--json"),
        *("--off", lever.format("disable_key"), "--on", lever.format("enable_key")),
    )
    found = json.loads(done.stdout)
    assert found["passed"]
    assert found["decrypts"]["failed"]
