# SPDX-License-Identifier: Apache-2.0
"""``kill -9`` at any moment: what was acknowledged is there afterwards, and what was not is whole or absent."""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from crash_child import CONTEXT, MARK, data_of, root_of

import openkcm
import openkcm.core.seal
from openkcm.errors import (
    DecryptError,
    KeyDestroyed,
    KeyNotFound,
    OpenKCMError,
    SealError,
    TenantDark,
)
from openkcm.keys import TenantState
from support import environment, make_vault, refused, url

CHILD = Path(__file__).with_name("crash_child.py")
ROUNDS = 20
SOAK_ROUNDS = 400
ROUNDS_OF_ONE_VAULT = 10

GONE = (KeyDestroyed, KeyNotFound, DecryptError)
"""What an envelope of an unlinked tenant answers, whether or not the name was linked anew since."""


# ---- what was acknowledged ----------------------------------------------------------------------------


@dataclass
class Envelope:
    """One acknowledged envelope and what must become of it."""

    tenant: str
    service: str
    subject: str | None
    blob: bytes
    plain: bytes
    shredded: bool = False


@dataclass
class Ledger:
    """What the killed processes said that they had done."""

    states: dict[str, TenantState] = field(default_factory=dict)
    roots: dict[str, str] = field(default_factory=dict)
    key_versions: dict[str, int] = field(default_factory=dict)
    services: dict[tuple[str, str], tuple[str, int]] = field(default_factory=dict)
    envelopes: list[Envelope] = field(default_factory=list)
    gone: list[Envelope] = field(default_factory=list)
    begun: dict[str, Any] | None = None
    done: int = 0

    def read(self, lines: list[bytes], folder: Path) -> None:
        """Take in what one process said; the last line may be cut off."""
        for line in lines:
            if not line.endswith(b"\n"):
                continue
            words = json.loads(line)
            if "begin" in words:
                self.begun = words
            elif "done" in words:
                self.begun = None
                self.done += 1
                self.apply(words, folder)

    def apply(self, words: dict[str, Any], folder: Path) -> None:
        """An act that was acknowledged."""
        act, tenant = words["done"], words["tenant"]
        place = (tenant, words.get("service", ""))
        if act == "link":
            self.linked(tenant, root_of(folder, tenant))
        elif act in ("kill", "restore"):
            self.states[tenant] = TenantState.DARK if act == "kill" else TenantState.LIVE
        elif act == "unlink":
            self.unlinked(tenant)
        elif act == "create":
            self.services[place] = (words["id"], 1)
        elif act == "rotate":
            self.services[place] = (self.services[place][0], words["version"])
        elif act == "rotate-tenant":
            self.key_versions[tenant] = words["version"]
        elif act == "replace-root":
            self.roots[tenant] = words["root"]
        elif act == "encrypt":
            plain = data_of(words["number"])
            self.envelopes.append(Envelope(*place, words["subject"], bytes.fromhex(words["blob"]), plain))
        elif act == "shred":
            for each in self.of(*place, words["subject"]):
                each.shredded = True

    def linked(self, tenant: str, root: str) -> None:
        self.states[tenant], self.roots[tenant], self.key_versions[tenant] = TenantState.LIVE, root, 1

    def unlinked(self, tenant: str) -> None:
        del self.states[tenant]
        self.services = {place: found for place, found in self.services.items() if place[0] != tenant}
        self.gone += [each for each in self.envelopes if each.tenant == tenant]
        self.envelopes = [each for each in self.envelopes if each.tenant != tenant]

    def of(self, tenant: str, service: str, subject: str) -> list[Envelope]:
        """The readable envelopes of a subject."""
        return [
            each
            for each in self.envelopes
            if (each.tenant, each.service, each.subject) == (tenant, service, subject) and not each.shredded
        ]

    # ---- the one act that was under way: either it happened or it did not -----------------------------

    def settle(self, core: openkcm.Core, gateway: openkcm.Gateway, folder: Path) -> None:
        """Look which of the two it was; ``check`` then holds the vault to it. An unlink shows as no tenant."""
        words, self.begun = self.begun, None
        if words is None:
            return
        act, tenant = words["begin"], words["tenant"]
        found = {each.tenant: each for each in core.status()}.get(tenant)
        if found is None:
            assert act in ("link", "unlink")
            if act == "unlink":
                self.unlinked(tenant)
            return
        done: dict[str, Any] = words | {"done": act}
        versions = {each.service: each for each in found.services}
        name = words.get("service", "")
        if act in ("link", "restore"):
            happened = found.state is TenantState.LIVE
        elif act == "kill":
            happened = found.state is TenantState.DARK
        elif act == "create":
            happened = name in versions
            done["id"] = versions[name].service_id.hex() if happened else ""
        elif act == "rotate":
            done["version"] = versions[name].active_version
            happened = done["version"] == self.services[tenant, name][1] + 1
        elif act == "rotate-tenant":
            done["version"] = found.key_version
            happened = found.key_version == self.key_versions[tenant] + 1
        elif act == "replace-root":
            happened = found.root == words["root"]
        elif act == "shred":
            handle = gateway.service(tenant, name)
            results = {outcome(handle, each) for each in self.of(tenant, name, words["subject"])}
            assert len(results) <= 1, "half of a subject was shredded"
            happened = results == {"KeyDestroyed"}
        else:
            return
        if happened:
            self.apply(done, folder)


def outcome(handle: openkcm.ServiceHandle, each: Envelope) -> str:
    """What decrypting gives: "right", "wrong" or the error's class."""
    try:
        return "right" if handle.decrypt(each.blob, context=CONTEXT) == each.plain else "wrong"
    except OpenKCMError as error:
        return type(error).__name__


def check(ledger: Ledger, core: openkcm.Core, gateway: openkcm.Gateway) -> None:
    """Hold the vault to everything that was acknowledged."""
    assert core.verify_audit() is None
    tree = {each.tenant: each for each in core.status()}
    assert {name: each.state for name, each in tree.items()} == ledger.states
    for tenant, status in tree.items():
        assert status.root == ledger.roots[tenant]
        assert status.key_version == ledger.key_versions[tenant]
    found = {
        (each.tenant, each.service): (each.service_id.hex(), each.active_version)
        for status in tree.values()
        for each in status.services
    }
    assert found == ledger.services
    for each in ledger.envelopes:
        if ledger.states[each.tenant] is TenantState.DARK:
            expected = TenantDark.__name__
        else:
            expected = KeyDestroyed.__name__ if each.shredded else "right"
        got = outcome(gateway.service(each.tenant, each.service), each)
        # Of a shredded key and a dark tenant, either may be told.
        assert got == expected or (each.shredded and got == "KeyDestroyed"), (each, got, expected)
    for each in ledger.gone:
        with pytest.raises(GONE):
            gateway.service(each.tenant, each.service).decrypt(each.blob, context=CONTEXT)


def go_on(ledger: Ledger, core: openkcm.Core, gateway: openkcm.Gateway, folder: Path) -> None:
    """Everything can be done to the vault that could be before; the ledger learns of it."""
    for tenant, state in list(ledger.states.items()):
        if state is not TenantState.LIVE:
            continue
        for place, (identity, version) in ledger.services.items():
            if place[0] == tenant:
                assert core.rotate_service(*place) == version + 1
                ledger.services[place] = (identity, version + 1)
                plain = b"after the crash"
                blob = gateway.service(*place).encrypt(plain, context=CONTEXT, subject="person0")
                ledger.envelopes.append(Envelope(*place, "person0", blob, plain))
    for tenant in ("tenant0", "tenant1"):
        if tenant not in ledger.states:
            core.link_tenant(tenant, root=root_of(folder, tenant))
            ledger.linked(tenant, root_of(folder, tenant))
            made = core.create_service(tenant, "first")
            ledger.services[tenant, "first"] = (made.service_id.hex(), 1)


def bring_back(ledger: Ledger, core: openkcm.Core) -> None:
    """Restore what is killed, so that its envelopes can be looked at too."""
    for tenant, state in ledger.states.items():
        if state is TenantState.DARK:
            core.restore(tenant)
            ledger.states[tenant] = TenantState.LIVE


# ---- killing ------------------------------------------------------------------------------------------


def killed_after(folder: Path, seed: int, seconds: float, word: bytes) -> list[bytes]:
    """Let a process change the vault, and kill it some time after it said a word; what it said."""
    lines: list[bytes] = []
    heard = threading.Event()
    with subprocess.Popen(
        [sys.executable, str(CHILD), "loop", str(folder), str(seed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as process:

        def listen() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if word in line:
                    heard.set()
            heard.set()

        reader = threading.Thread(target=listen)
        reader.start()
        assert heard.wait(60)
        time.sleep(seconds)
        process.kill()
        reader.join(60)
        assert process.stderr is not None
        errors = process.stderr.read().decode()
    assert process.returncode == -signal.SIGKILL, errors
    return lines


def crash_rounds(tmp_path: Path, rounds: int, seed: int) -> None:
    """Kill one process after another; each vault goes through ten of them."""
    done = 0
    for vault in range(-(-rounds // ROUNDS_OF_ONE_VAULT)):
        folder = tmp_path / f"vault{vault}"
        folder.mkdir()
        ledger = Ledger()
        for turn in range(ROUNDS_OF_ONE_VAULT):
            one_round(ledger, folder, seed + vault * ROUNDS_OF_ONE_VAULT + turn)
        with openkcm.Core.open(url(folder)) as core, openkcm.Gateway(core) as gateway:
            bring_back(ledger, core)
            check(ledger, core, gateway)
        assert not list(folder.glob(".*.part"))
        done += ledger.done
    assert done >= rounds // 2


def one_round(ledger: Ledger, folder: Path, seed: int) -> None:
    generator = random.Random(seed)
    # From the first act on, or from before the vault is opened: opening is to be hit too.
    word = b'"done"' if seed % 2 else b'"ready"'
    lines = killed_after(folder, seed, generator.uniform(0.02, 0.4), word)
    ledger.read(lines, folder)
    try:
        with openkcm.Core.open(url(folder)) as core, openkcm.Gateway(core) as gateway:
            ledger.settle(core, gateway, folder)
            check(ledger, core, gateway)
            go_on(ledger, core, gateway, folder)
            check(ledger, core, gateway)
    except BaseException as error:
        error.add_note(f"seed {seed}; the last that was said: {lines[-3:]}")
        raise


def test_killed_at_any_moment(tmp_path: Path) -> None:
    crash_rounds(tmp_path, ROUNDS, random.SystemRandom().randrange(1 << 40))


@pytest.mark.slow
def test_killed_at_any_moment_for_long(tmp_path: Path) -> None:
    crash_rounds(tmp_path, SOAK_ROUNDS, random.SystemRandom().randrange(1 << 40))


# ---- the first open -----------------------------------------------------------------------------------


def killed_opens(folder: Path, start: int, stride: int) -> list[Path]:
    """Folders in which the making of a vault was killed, each a step further than the one before."""
    done = subprocess.run(
        [sys.executable, str(CHILD), "open", str(folder), str(start), str(stride)],
        capture_output=True,
        env=environment(),
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return sorted(folder.iterdir())


def unnamed_files(folder: Path) -> bool:
    """Whether the file system has files without a name; on others a kill can leave one with a second name."""
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
    except (OSError, AttributeError):
        return False
    return True


def check_first_open(folder: Path) -> None:
    """What a killed making of a vault left opens, with the seal that is there if one is."""
    seal = folder / "vault.seal"
    before = seal.read_bytes() if seal.exists() else None
    assert before is None or len(before) == 32
    if (folder / "vault.db").exists():
        assert before is not None, "a database without a seal"
    with openkcm.Core.open(url(folder)) as core, openkcm.Gateway(core) as gateway:
        assert before in (None, seal.read_bytes())
        core.link_tenant("acme", root=f"local:{folder / 'acme.root'}")
        core.create_service("acme", "records")
        blob = gateway.service("acme", "records").encrypt(b"x", subject="somebody")
        assert core.verify_audit() is None
        assert [record.act for record in core.audit_records()].count("init") == 1
    kept = seal.read_bytes()
    with openkcm.Core.open(url(folder)) as core, openkcm.Gateway(core) as gateway:
        assert gateway.service("acme", "records").decrypt(blob) == b"x"
    assert seal.read_bytes() == kept
    for path in folder.iterdir():
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path
    assert seal.stat().st_nlink == 1 or not unnamed_files(folder), "the seal has a second name"
    seal.rename(folder / "elsewhere")
    error = refused(lambda: openkcm.Core.open(url(folder)), SealError)
    assert "Put the copy you kept back there" in str(error)
    assert not seal.exists(), "a second seal beside a vault that is there"


def test_killed_while_a_vault_is_made(tmp_path: Path) -> None:
    folders = killed_opens(tmp_path, random.SystemRandom().randrange(9), 9)
    assert len(folders) > 5
    for folder in folders:
        check_first_open(folder)


@pytest.mark.slow
def test_killed_at_every_step_of_making_a_vault(tmp_path: Path) -> None:
    folders = killed_opens(tmp_path, 0, 1)
    assert len(folders) > 50
    for folder in folders:
        check_first_open(folder)


def test_where_every_file_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without unnamed files a new vault leaves nothing more behind."""
    monkeypatch.setattr(openkcm.core.seal, "_open_unnamed", lambda folder: None)
    make_vault(tmp_path).close()
    assert (tmp_path / "vault.seal").stat().st_nlink == 1
    assert not list(tmp_path.glob(".*"))


# ---- openkcm protect ----------------------------------------------------------------------------------

ROWS = 12_000


@contextmanager
def command(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    vault = {"OPENKCM_VAULT": str(folder / "vault.db")}
    with subprocess.Popen(
        [sys.executable, "-m", "openkcm.cli", "-q", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment(**vault),
    ) as process:
        yield process


def finish(folder: Path, *arguments: str) -> float:
    """Run a command to its end; how long it took."""
    start = time.monotonic()
    with command(folder, *arguments) as process:
        errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors.decode()
    return time.monotonic() - start


def kill_protects(tmp_path: Path, rounds: int, seed: int) -> None:
    """Kill protect and unprotect, in place and to another file, at moments spread over how long they take."""
    make_vault(tmp_path).close()
    data = tmp_path / "data"
    data.mkdir()
    original = b"id,name\n" + b"".join(b"%d,%s%d\n" % (at, MARK, at) for at in range(ROWS))
    table, whole = data / "people.csv", tmp_path / "whole.csv"
    table.write_bytes(original)
    options = ("acme", "records", str(table), "-C", "name")
    taken = finish(tmp_path, "protect", *options, "--subject-column", "id", "-o", str(whole))
    protected = whole.read_bytes()
    assert MARK not in protected
    generator = random.Random(seed)
    for turn in range(rounds):
        forward, in_place = turn % 4 < 2, turn % 2 == 0
        table.write_bytes(original if forward else protected)
        target = table if in_place else data / "new.csv"
        verb = ("protect", *options, "--subject-column", "id") if forward else ("unprotect", *options)
        with command(
            tmp_path, *verb, *(("--in-place",) if in_place else ("-o", str(target), "--force"))
        ) as process:
            time.sleep(generator.uniform(0.2, 1.1) * taken)
            process.kill()
            process.wait(60)
        check_killed_protect(tmp_path, table, target, original, protected, forward=forward)
        target.unlink()


def check_killed_protect(
    folder: Path, table: Path, target: Path, original: bytes, protected: bytes, *, forward: bool
) -> None:
    before = original if forward else protected
    if target is not table:
        assert table.read_bytes() == before
    left = target.read_bytes() if target.exists() else before
    if left != before:
        # It was done already: then the new file is whole.
        if forward:
            assert MARK not in left
            copy = folder / "copy.csv"
            copy.write_bytes(left)
            finish(folder, "unprotect", "acme", "records", str(copy), "-C", "name", "--in-place")
            left = copy.read_bytes()
        assert left == original
    for path in table.parent.iterdir():
        if path not in (table, target):
            assert not (forward and MARK in path.read_bytes()), f"{path.name} holds plaintext"
            assert not stat.S_IMODE(path.stat().st_mode) & 0o077, f"{path.name} is readable by others"
            path.unlink()
    if not target.exists():
        target.write_bytes(b"")


def test_protect_is_killed(tmp_path: Path) -> None:
    kill_protects(tmp_path, 8, random.SystemRandom().randrange(1 << 40))


@pytest.mark.slow
def test_protect_is_killed_again_and_again(tmp_path: Path) -> None:
    kill_protects(tmp_path, 80, random.SystemRandom().randrange(1 << 40))
