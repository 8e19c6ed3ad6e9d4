# SPDX-License-Identifier: Apache-2.0
"""Who may do what: nobody by default, exactly what was granted, everywhere within a second, and through an outage."""

from __future__ import annotations

import itertools
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.x509 import load_der_x509_certificate
from cryptography.x509.verification import PolicyBuilder, Store

import openkcm
from openkcm import CoreUnavailable, FormatError, InvalidInput, StoreUnavailable, Verb
from openkcm.core import Grants, schema
from openkcm.core import grants as module
from openkcm.core.grants import OUTAGE_SECONDS, READ_SECONDS, RETRY_SECONDS
from openkcm.identity import fingerprints_of
from openkcm.pki import DevelopmentCA
from support import Clock, environment, make_vault, refused, run_python, url

ONE = "spiffe://example/gateway/one"
TWO = "cn:gateway-two"
EVERYTHING = [*itertools.product((ONE, TWO), ("acme", "umbra", "*"), ("payments", "audit", "*"), Verb)]


@pytest.fixture
def core(tmp_path: Path) -> Iterator[openkcm.Core]:
    with make_vault(tmp_path) as core:
        yield core


def allowed(core: openkcm.Core) -> set[tuple[str, str, str, Verb]]:
    """Everything that is allowed of all that these tests ask about."""
    return {each for each in EVERYTHING if core.access.allows(*each)}


def acts(core: openkcm.Core) -> list[tuple[str, str, str, str]]:
    return [(each.act, each.tenant, each.service, each.detail) for each in core.audit_records()]


# ---- what is allowed ------------------------------------------------------------------------------------------


def test_nobody_may_do_anything_by_default(core: openkcm.Core) -> None:
    assert allowed(core) == set()
    assert core.grants() == []


@pytest.mark.parametrize("verb", list(Verb))
@pytest.mark.parametrize("tenant", ["acme", "*"])
@pytest.mark.parametrize("service", ["payments", "*"])
def test_exactly_what_was_granted_is_allowed(
    core: openkcm.Core, tenant: str, service: str, verb: Verb
) -> None:
    assert core.grant(ONE, tenant, service, [verb]) == (verb,)
    assert allowed(core) == {
        each
        for each in EVERYTHING
        if each[0] == ONE
        and each[3] is verb
        and (tenant == "*" or each[1] == tenant)
        and (service == "*" or each[2] == service)
    }
    assert core.withdraw(ONE, tenant, service, [verb]) == (verb,)
    assert allowed(core) == set()


def test_who_may_administer_may_not_decrypt(core: openkcm.Core) -> None:
    core.grant(ONE, "*", "*", [Verb.ADMINISTER])
    assert core.access.allows(ONE, "*", "*", Verb.ADMINISTER)
    assert not any(core.access.allows(ONE, "acme", "payments", verb) for verb in (Verb.WRAP, Verb.UNWRAP))
    core.withdraw(ONE, "*", "*")
    core.grant(ONE, "acme", "*", Verb)
    assert core.access.allows(ONE, "acme", "*", Verb.ADMINISTER)
    assert not core.access.allows(ONE, "*", "*", Verb.ADMINISTER)  # may not link tenants


def test_grants_add_up_and_are_taken_back_one_by_one(core: openkcm.Core) -> None:
    core.grant(ONE, "acme", "payments", ["wrap", "unwrap"])
    core.grant(ONE, "*", "*", "wrap")
    assert core.withdraw(ONE, "acme", "payments", ["wrap", "shred"]) == (Verb.WRAP,)
    assert core.access.allows(ONE, "acme", "payments", Verb.WRAP)  # by the other one
    assert core.access.allows(ONE, "acme", "payments", Verb.UNWRAP)
    assert core.withdraw(ONE, "*", "*") == (Verb.WRAP,)
    assert allowed(core) == {(ONE, "acme", "payments", Verb.UNWRAP)}
    found = core.grants()
    assert [(each.identity, each.tenant, each.service, each.verb) for each in found] == [
        (ONE, "acme", "payments", Verb.UNWRAP)
    ]
    assert core.grants(TWO) == []
    assert core.grants(ONE) == found


def test_each_change_is_recorded_and_nothing_else_is(core: openkcm.Core) -> None:
    before = len(acts(core))
    assert core.grant(ONE, "acme", "payments", ["unwrap", "wrap"]) == (Verb.WRAP, Verb.UNWRAP)
    assert core.grant(ONE, "acme", "payments", ["wrap"]) == ()
    assert core.grant(ONE, "acme", "payments", ["wrap", "shred"]) == (Verb.SHRED,)
    assert core.grant(TWO, "*", "*", ["administer"]) == (Verb.ADMINISTER,)
    assert core.withdraw(ONE, "acme", "payments") == (Verb.WRAP, Verb.UNWRAP, Verb.SHRED)
    assert core.withdraw(ONE, "acme", "payments") == ()
    assert core.withdraw(TWO, "acme", "*") == ()
    assert acts(core)[before:] == [
        ("grant", "acme", "payments", f"{ONE}: wrap, unwrap on acme payments"),
        ("grant", "acme", "payments", f"{ONE}: shred on acme payments"),
        ("grant", "", "", f"{TWO}: administer on * *"),
        ("withdraw", "acme", "payments", f"{ONE}: wrap, unwrap, shred on acme payments"),
    ]
    assert core.verify_audit() is None


def test_a_grant_that_cannot_be_recorded_is_none(core: openkcm.Core, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise StoreUnavailable("full")

    with monkeypatch.context() as patch:
        patch.setattr("openkcm.core.audit.append", fail)
        refused(lambda: core.grant(ONE, "acme", "payments", ["wrap"]), StoreUnavailable)
        refused(lambda: core.revoke_certificate(b"f" * 32), StoreUnavailable)
    assert core.grants() == []
    assert core.revoked() == []


@pytest.mark.parametrize(
    ("identity", "tenant", "service", "verbs"),
    [
        ("gateway", "acme", "payments", ["wrap"]),
        ("*", "acme", "payments", ["wrap"]),
        (ONE + "\n", "acme", "payments", ["wrap"]),
        ("cn:g\u0430teway", "acme", "payments", ["wrap"]),
        (ONE, "", "payments", ["wrap"]),
        (ONE, "**", "payments", ["wrap"]),
        (ONE, "ac*", "payments", ["wrap"]),
        (ONE, "acme", "pay ments", ["wrap"]),
        (ONE, None, "payments", ["wrap"]),
        (ONE, "acme", "payments", []),
        (ONE, "acme", "payments", ["decrypt"]),
        (ONE, "acme", "payments", ["WRAP"]),
        (ONE, "acme", "payments", ["wrap", "*"]),
        (ONE, "acme", "payments", "wr"),
    ],
)
def test_what_is_no_grant_is_refused(
    core: openkcm.Core, identity: str, tenant: str, service: str, verbs: list[str]
) -> None:
    before = acts(core)
    refused(lambda: core.grant(identity, tenant, service, verbs), InvalidInput)
    refused(lambda: core.withdraw(identity, tenant, service, verbs), InvalidInput)
    assert (core.grants(), acts(core)) == ([], before)


def test_hostile_questions_are_answered_no(core: openkcm.Core) -> None:
    core.grant(ONE, "acme", "payments", ["wrap"])
    for identity in (ONE + "\n", ONE + "/", ONE.upper(), "", "*", ONE + "\0", "SPIFFE" + ONE[6:], "cn:one"):
        assert not core.access.allows(identity, "acme", "payments", Verb.WRAP)
    for tenant, service in (("acme\n", "payments"), ("ACME", "payments"), ("acme", "*"), ("*", "payments")):
        assert not core.access.allows(ONE, tenant, service, Verb.WRAP)


def test_an_unlinked_tenants_grants_end_with_it(core: openkcm.Core, tmp_path: Path) -> None:
    core.grant(ONE, "acme", "records", ["wrap"])
    core.grant(ONE, "umbra", "records", ["wrap"])
    assert core.access.allows(ONE, "acme", "records", Verb.WRAP)
    core.unlink("acme")
    core.link_tenant("acme", root=f"local:{tmp_path / 'other.root'}")
    core.access.look()
    assert not core.access.allows(ONE, "acme", "records", Verb.WRAP)
    assert core.access.allows(ONE, "umbra", "records", Verb.WRAP)


def test_a_newer_versions_verb_is_passed_over(core: openkcm.Core, tmp_path: Path) -> None:
    core.grant(ONE, "acme", "payments", ["wrap"])
    _change(tmp_path, "INSERT INTO grants VALUES (?, 'acme', 'payments', 'fly', '')", ONE)
    core.access.look()
    assert allowed(core) == {(ONE, "acme", "payments", Verb.WRAP)}
    assert [each.verb for each in core.grants()] == [Verb.WRAP]


def test_a_closed_core_answers_nothing_and_its_thread_ends(tmp_path: Path) -> None:
    core = make_vault(tmp_path)
    assert not core.access.allows(ONE, "acme", "payments", Verb.WRAP)
    assert "openkcm-grants" in {thread.name for thread in threading.enumerate()}
    core.close()
    for call in (
        lambda: core.access,
        core.grants,
        core.revoked,
        lambda: core.grant(ONE, "acme", "payments", ["wrap"]),
        lambda: core.withdraw(ONE, "acme", "payments"),
        lambda: core.revoke_certificate(b"f" * 32),
    ):
        refused(call, CoreUnavailable)
    assert "openkcm-grants" not in {thread.name for thread in threading.enumerate()}


# ---- other processes, and an older vault ----------------------------------------------------------------------

CHILD = """
import sys, openkcm
from openkcm import Verb
with openkcm.Core.open(sys.argv[1]) as core:
    for line in sys.stdin:
        fingerprint = bytes.fromhex(line)
        print(core.access.allows(sys.argv[2], "acme", "payments", Verb.UNWRAP),
              core.access.is_revoked(fingerprint), flush=True)
"""


def test_another_process_goes_by_every_change(core: openkcm.Core, tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, url(tmp_path), ONE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert child.stdin is not None
    assert child.stdout is not None
    fingerprint = b"f" * 32

    def wait_for(expected: str) -> float:
        started = time.monotonic()
        while time.monotonic() < started + 30:
            child.stdin.write(fingerprint.hex() + "\n")
            child.stdin.flush()
            if child.stdout.readline() == expected + "\n":
                return time.monotonic() - started
        raise AssertionError(f"the other process never said {expected}")

    try:
        wait_for("False False")
        core.grant(ONE, "acme", "payments", ["unwrap"])
        granted = wait_for("True False")
        core.withdraw(ONE, "acme", "payments", ["unwrap"])
        withdrawn = wait_for("False False")
        core.revoke_certificate(fingerprint)
        revoked = wait_for("False True")
        print(f"granted {granted:.3f} s, withdrawn {withdrawn:.3f} s, revoked {revoked:.3f} s")
    finally:
        child.stdin.close()
        child.wait(30)
        child.stdout.close()
    assert child.returncode == 0


def test_a_forked_child_answers_for_itself(tmp_path: Path) -> None:
    make_vault(tmp_path).close()
    code = f"""
import os, sys, openkcm
from openkcm import Verb
core = openkcm.Core.open({url(tmp_path)!r})
ask = lambda: core.access.allows("cn:one", "acme", "records", Verb.WRAP)
assert not ask()
core.access._looking.acquire()  # as a thread of the parent's may hold it
child = os.fork()
if not child:
    core.grant("cn:one", "acme", "records", ["wrap"])
    os._exit(0 if ask() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
core.access._looking.release()
core.access.look()
assert ask()
core.close()
"""
    run_python(code)


def test_a_vault_of_the_schema_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(schema, "HEAD", "0003")
        with make_vault(tmp_path) as old, openkcm.Gateway(old) as gateway:
            blob = gateway.service("acme", "records").encrypt(b"before")
            records = old.audit_records()
    with sqlite3.connect(tmp_path / "vault.db") as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("0003",)
    connection.close()
    assert not {"grants", "revoked_certificates"} & tables
    with openkcm.Core.open(url(tmp_path)) as core, openkcm.Gateway(core) as gateway:
        assert gateway.service("acme", "records").decrypt(blob) == b"before"
        assert allowed(core) == set()
        core.grant(ONE, "acme", "records", ["wrap"])
        assert core.access.allows(ONE, "acme", "records", Verb.WRAP)
        assert core.audit_records()[: len(records)] == records
        assert core.verify_audit() is None


# ---- revoked certificates -------------------------------------------------------------------------------------


def test_a_revoked_certificate_is_refused(core: openkcm.Core, tmp_path: Path) -> None:
    ca = DevelopmentCA.create(tmp_path / "pki")
    one, two = ca.issue_client("one", spiffe=ONE), ca.issue_client("two")
    assert not core.access.is_revoked(*fingerprints_of(one.der))
    fingerprint = core.revoke_certificate(one.der, "stolen \u2603\udcff" + "x" * 500)
    assert fingerprint == fingerprints_of(one.der)[0]
    assert core.access.is_revoked(*fingerprints_of(one.der))
    assert not core.access.is_revoked(*fingerprints_of(two.der))
    (found,) = core.revoked()
    assert (found.fingerprint, found.identity) == (fingerprint, ONE)
    assert int(found.serial, 16) == one.serial
    assert found.reason.startswith("stolen ")
    assert len(found.reason) == 256
    before = acts(core)
    assert before[-1][:3] == ("revoke-certificate", "", "")
    assert before[-1][3].startswith(f"{ONE}, SHA-256 {fingerprint.hex()}: stolen")
    core.revoke_certificate(one.der, "again")
    core.revoke_certificate(fingerprint, "again")
    assert core.revoked() == [found]
    assert acts(core) == before


def test_a_certificate_is_revoked_by_its_fingerprint_and_then_by_itself(
    core: openkcm.Core, tmp_path: Path
) -> None:
    one = DevelopmentCA.create(tmp_path / "pki").issue_client("one", spiffe=ONE)
    whole, signed = fingerprints_of(one.der)
    assert core.revoke_certificate(whole) == whole
    assert core.access.is_revoked(whole, signed)
    assert not core.access.is_revoked(signed)
    assert [each.identity for each in core.revoked()] == [""]
    core.revoke_certificate(one.der)
    assert core.access.is_revoked(signed)
    assert [each.identity for each in core.revoked()] == [ONE]


def forged_twin(der: bytes) -> bytes:
    """The same certificate with the other one of its two valid ECDSA signatures."""
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    found = load_der_x509_certificate(der)
    r, s = decode_dss_signature(found.signature)
    algorithm = bytes.fromhex("300a06082a8648ce3d040302")
    signature = b"\0" + encode_dss_signature(r, order - s)
    body = found.tbs_certificate_bytes + algorithm + b"\x03" + bytes([len(signature)]) + signature
    return b"\x30\x82" + len(body).to_bytes(2, "big") + body


def test_a_revoked_certificate_cannot_be_shown_in_another_form(core: openkcm.Core, tmp_path: Path) -> None:
    ca = DevelopmentCA.create(tmp_path / "pki")
    one = ca.issue_client("one", spiffe=ONE)
    twin = forged_twin(one.der)
    verifier = PolicyBuilder().store(Store([load_der_x509_certificate(ca.certificate_der)]))
    assert verifier.build_client_verifier().verify(load_der_x509_certificate(twin), []).subjects
    assert fingerprints_of(twin)[0] != fingerprints_of(one.der)[0]
    core.revoke_certificate(one.der)
    assert core.access.is_revoked(*fingerprints_of(twin))


@pytest.mark.parametrize("bad", [b"", b"x" * 31, b"x" * 33, b"x" * 500])
def test_what_is_no_certificate_cannot_be_revoked(core: openkcm.Core, bad: bytes) -> None:
    refused(lambda: core.revoke_certificate(bad), FormatError)


@pytest.mark.parametrize("bad", [None, "x" * 32, 32, bytearray(32)])
def test_a_certificate_is_bytes(core: openkcm.Core, bad: bytes) -> None:
    refused(lambda: core.revoke_certificate(bad), InvalidInput)


def test_a_ca_can_be_revoked_although_it_is_nobody(core: openkcm.Core, tmp_path: Path) -> None:
    ca = DevelopmentCA.create(tmp_path / "pki")
    core.revoke_certificate(ca.certificate_der)
    assert [each.identity for each in core.revoked()] == [""]
    assert core.access.is_revoked(*fingerprints_of(ca.certificate_der))


# ---- how old an answer may be ---------------------------------------------------------------------------------


class Watched:
    """A vault's grants with a clock that the test moves, a store that it can cut off, and a count of readings."""

    def __init__(self, core: openkcm.Core, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        self.store = core._vault.store
        self.grants = Grants(self.store, self.clock, 0.25)
        self.cut = self.stale = False
        self.asked = self.read = 0
        ask, read = self.store.data_version, module.read_grants

        def data_version() -> int:
            self.asked += 1
            self._fail_if(self.cut and not self.stale)
            return 7 if self.stale else ask()

        def read_grants(*arguments: object) -> object:
            self.read += 1
            return read(*arguments)  # type: ignore[arg-type]

        open_read = self.store.read

        def read_store() -> object:
            self._fail_if(self.cut)
            return open_read()

        monkeypatch.setattr(self.store, "data_version", data_version)
        monkeypatch.setattr(self.store, "read", read_store)
        monkeypatch.setattr(module, "read_grants", read_grants)

    def _fail_if(self, failing: bool) -> None:
        if failing:
            raise StoreUnavailable("cut off")

    def ask(self) -> bool:
        return self.grants.allows(ONE, "acme", "payments", Verb.UNWRAP)


@pytest.fixture
def watched(core: openkcm.Core, monkeypatch: pytest.MonkeyPatch) -> Watched:
    core.grant(ONE, "acme", "payments", ["unwrap"])
    return Watched(core, monkeypatch)


def test_without_a_first_reading_there_is_no_answer(watched: Watched) -> None:
    watched.cut = True
    for _ in range(20):
        assert refused(watched.ask, StoreUnavailable).retryable
        refused(lambda: watched.grants.is_revoked(b"f" * 32), StoreUnavailable)
    assert watched.asked == 1  # who asks does not wait for the store again and again
    refused(watched.grants.look, StoreUnavailable)
    watched.cut = False
    watched.clock.now += 2 * RETRY_SECONDS
    assert watched.ask()


def test_an_outage_is_bridged_for_an_hour_and_no_longer(watched: Watched) -> None:
    assert watched.ask()
    watched.cut = True
    started = watched.clock.now
    while (watched.clock.now - started) < OUTAGE_SECONDS:
        assert watched.ask()
        watched.clock.now += 7.0
    assert watched.asked < 600
    for _ in range(3):
        refused(watched.ask, StoreUnavailable)
        watched.clock.now += 7.0
    watched.cut = False
    assert watched.ask()


def test_a_store_that_only_remembers_its_version_does_not_stretch_the_hour(watched: Watched) -> None:
    watched.stale = True
    assert watched.ask()
    watched.cut = True
    last = started = watched.clock.now
    while watched.clock.now < started + 2 * OUTAGE_SECONDS:
        try:
            assert watched.ask()
            last = watched.clock.now
        except StoreUnavailable:
            break
        watched.clock.now += 1.0
    assert OUTAGE_SECONDS - READ_SECONDS < last - started <= OUTAGE_SECONDS


def test_who_asks_looks_himself_where_no_thread_does(watched: Watched, core: openkcm.Core) -> None:
    assert watched.ask()
    core.withdraw(ONE, "acme", "payments")
    watched.clock.now += 0.4
    assert watched.ask()  # not yet
    watched.clock.now += 0.2
    assert not watched.ask()


def test_who_asks_never_waits_for_another_who_looks(watched: Watched) -> None:
    assert watched.ask()
    watched.clock.now += 10.0
    with watched.grants._looking:
        assert watched.ask()  # would hang, were it to wait
    assert watched.asked == 1


def test_only_what_changes_grants_has_them_read_again(
    watched: Watched, core: openkcm.Core, tmp_path: Path
) -> None:
    look = watched.grants.look
    look()
    assert watched.read == 1
    for act in (
        lambda: core.create_service("acme", "more"),
        lambda: core.rotate_service("acme", "records"),
        lambda: core.kill("acme"),
        lambda: core.restore("acme"),
    ):
        act()
        look()
    assert watched.read == 1
    for number, change in enumerate(
        (
            lambda: core.grant(ONE, "acme", "payments", ["shred"]),
            lambda: core.withdraw(ONE, "acme", "payments", ["shred"]),
            lambda: core.revoke_certificate(b"f" * 32),
            # Not by one of ours, and without a record.
            lambda: _change(tmp_path, "DELETE FROM grants"),
            lambda: _change(tmp_path, "DELETE FROM audit WHERE number > 1"),
        ),
        2,
    ):
        change()
        look()
        assert watched.read == number
    assert not watched.ask()


def _change(folder: Path, statement: str, *values: str) -> None:
    """Change a vault's database behind every Core's back."""
    with sqlite3.connect(folder / "vault.db") as connection:
        connection.execute(statement, values)
    connection.close()


def test_many_threads_ask_while_grants_change(core: openkcm.Core) -> None:
    core.grant(ONE, "acme", "payments", ["unwrap"])
    wrong: list[object] = []
    done = threading.Event()

    def ask(identity: str, verb: Verb, expected: bool) -> None:
        while not done.is_set():
            if core.access.allows(identity, "acme", "payments", verb) is not expected:
                wrong.append((identity, verb))

    questions = [(ONE, Verb.UNWRAP, True), (ONE, Verb.ADMINISTER, False), (TWO, Verb.UNWRAP, False)]
    threads = [threading.Thread(target=ask, args=each) for each in questions]
    for thread in threads:
        thread.start()
    for _ in range(10):
        core.grant(ONE, "acme", "payments", ["wrap"])
        core.grant(TWO, "*", "*", ["shred"])
        core.withdraw(ONE, "acme", "payments", ["wrap"])
        core.withdraw(TWO, "*", "*")
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
