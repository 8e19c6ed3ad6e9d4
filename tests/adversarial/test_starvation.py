# SPDX-License-Identifier: Apache-2.0
"""No disk, no descriptors, no right to write, no lock to be had: a named error, nothing lost, and work goes on.

A full disk is a small tmpfs, which takes the right to mount one; without it those tests are skipped, and what
stays is the limit on a file's size, /dev/full and the rest below. Other file systems' ways of being full
(quotas, copy-on-write metadata) are not tried.
"""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import openkcm
from openkcm.cli.app import run
from openkcm.cli.exits import ExitCode
from openkcm.errors import KeyDestroyed, OpenKCMError, StoreUnavailable, TenantDark
from support import environment, make_vault, refused, run_python, url

# ---- a full disk --------------------------------------------------------------------------------------


class Disk:
    """A file system of sixteen megabytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    def fill(self) -> None:
        """Leave not one byte."""
        with open(self._ballast, "ab", buffering=0) as ballast:
            for size in (1 << 20, 4096, 1):
                try:
                    while ballast.write(bytes(size)):
                        pass
                except OSError:
                    continue

    def make_room(self) -> None:
        self._ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m,mode=700", "tmpfs", str(path)],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("no right to mount a tmpfs here: a full disk is not checked")
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def until_refused(act: Callable[[int], object], *, most: int = 2000) -> tuple[int, StoreUnavailable]:
    """Repeat an act on a disk that is full, as room in files already there may last a while; the first error."""
    for number in range(most):
        try:
            act(number)
        except OpenKCMError as error:
            assert type(error) is StoreUnavailable, repr(error)
            return number, error
    raise AssertionError("a full disk has taken everything")


def acts(core: openkcm.Core) -> list[str]:
    return [record.act for record in core.audit_records()]


def told_what_to_do(error: StoreUnavailable) -> None:
    assert "make room" in str(error) or "is full" in str(error)
    assert error.retryable


def test_acts_of_key_management_on_a_full_disk(tmp_path: Path, disk: Disk) -> None:
    root = f"local:{tmp_path / 'acme.root'}"
    with make_vault(disk.path) as core, openkcm.Gateway(core) as gateway:
        handle = gateway.service("acme", "records")
        blob = handle.encrypt(b"before", subject="somebody")
        for name, act in {
            "link": lambda at: core.link_tenant(f"tenant{at}", root=root),
            "create-service": lambda at: core.create_service("acme", f"service{at}"),
            "rotate-service": lambda at: core.rotate_service("acme", "records"),
            "rotate-tenant": lambda at: core.rotate_tenant("acme"),
        }.items():
            before = acts(core).count(name)
            disk.fill()
            done, error = until_refused(act)
            told_what_to_do(error)
            assert acts(core).count(name) == before + done, "just what was acknowledged"
            assert core.verify_audit() is None
            assert handle.decrypt(blob) == b"before"
            assert handle.decrypt(handle.encrypt(b"no store is needed")) == b"no store is needed"
            disk.make_room()
            act(done)
    with openkcm.Core.open(url(disk.path)) as core, openkcm.Gateway(core) as gateway:
        assert gateway.service("acme", "records").decrypt(blob) == b"before"
        assert core.verify_audit() is None


def test_subjects_on_a_full_disk(disk: Disk) -> None:
    with make_vault(disk.path) as core, openkcm.Gateway(core) as gateway:
        handle = gateway.service("acme", "records")
        blobs: dict[int, bytes] = {}

        def encrypt(at: int) -> None:
            blobs[at] = handle.encrypt(b"%d" % at, subject=f"person{at}")

        for at in range(5):
            encrypt(at)
        disk.fill()
        done, error = until_refused(lambda at: encrypt(at + 5), most=20_000)
        told_what_to_do(error)
        assert [handle.decrypt(blob) for blob in blobs.values()] == [b"%d" % at for at in blobs]
        disk.make_room()
        encrypt(done + 5)
    with openkcm.Core.open(url(disk.path)) as core, openkcm.Gateway(core) as gateway:
        handle = gateway.service("acme", "records")
        assert [handle.decrypt(blob) for blob in blobs.values()] == [b"%d" % at for at in blobs]


def test_shredding_on_a_full_disk(disk: Disk) -> None:
    """A shred that was acknowledged is one; one that was refused can be repeated, and then is one."""
    with make_vault(disk.path) as core, openkcm.Gateway(core) as gateway:
        handle = gateway.service("acme", "records")
        blobs = [handle.encrypt(b"x", subject=f"person{at}") for at in range(600)]
        disk.fill()
        done, error = until_refused(lambda at: handle.shred(f"person{at}"), most=len(blobs))
        told_what_to_do(error)
        disk.make_room()
        assert handle.decrypt(blobs[done + 1]) == b"x"
        handle.shred(f"person{done}")
    with openkcm.Core.open(url(disk.path)) as core, openkcm.Gateway(core) as gateway:
        handle = gateway.service("acme", "records")
        for blob in blobs[: done + 1]:
            refused(lambda blob=blob: handle.decrypt(blob), KeyDestroyed)
        assert [handle.decrypt(blob) for blob in blobs[done + 1 :]] == [b"x"] * (len(blobs) - done - 1)
        assert core.verify_audit() is None


def test_a_kill_on_a_full_disk_is_dark_at_once(disk: Disk) -> None:
    with make_vault(disk.path) as core, openkcm.Gateway(core) as gateway:
        handle = gateway.service("acme", "records")
        blob = handle.encrypt(b"x")
        disk.fill()
        until_refused(lambda at: core.create_service("acme", f"service{at}"))
        error = refused(lambda: core.kill("acme"), StoreUnavailable)
        assert "Repeat the kill" in str(error)
        refused(lambda: handle.decrypt(blob), TenantDark)
        disk.make_room()
        core.kill("acme")
    with openkcm.Core.open(url(disk.path)) as core:
        refused(lambda: core.create_service("acme", "more"), TenantDark)
        core.restore("acme")
        with openkcm.Gateway(core) as gateway:
            assert gateway.service("acme", "records").decrypt(blob) == b"x"


def test_a_new_vault_on_a_full_disk(disk: Disk) -> None:
    disk.fill()
    with pytest.raises(OpenKCMError, match=r"No space left|is full") as caught:
        openkcm.Core.open(url(disk.path))
    assert caught.value.code in ("seal", "store_unavailable")
    disk.make_room()
    with make_vault(disk.path) as core:
        assert core.verify_audit() is None


@pytest.mark.parametrize("pages", range(1, 20, 3))
def test_a_new_vault_on_a_disk_that_fills(disk: Disk, pages: int) -> None:
    """Whatever is the last page that fits, the next open makes the vault, or finds it, with the same seal."""
    disk.fill()
    os.truncate(disk.path / "ballast", (disk.path / "ballast").stat().st_size - pages * 4096)
    with pytest.raises(OpenKCMError, match=r"No space left|is full"):
        make_vault(disk.path).close()
    seal = disk.path / "vault.seal"
    before = seal.read_bytes() if seal.exists() else None
    disk.make_room()
    with openkcm.Core.open(url(disk.path)) as core:
        assert before in (None, seal.read_bytes())
        core.link_tenant("another", root=f"local:{disk.path / 'another.root'}")


def test_a_development_root_on_a_full_disk(tmp_path: Path, disk: Disk) -> None:
    with make_vault(tmp_path) as core:
        disk.fill()
        root = f"local:{disk.path / 'globex.root'}"
        with pytest.raises(OpenKCMError, match="No space left"):
            core.link_tenant("globex", root=root)
        disk.make_room()
        core.link_tenant("globex", root=root)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A vault for the commands, and ``people.csv`` in the folder."""
    make_vault(tmp_path).close()
    monkeypatch.setenv("OPENKCM_VAULT", str(tmp_path / "vault.db"))
    rows = b"id,name\n" + b"".join(b"%d,somebody\n" % at for at in range(20_000))
    (tmp_path / "people.csv").write_bytes(rows)
    return rows


def protect(source: Path, *options: str) -> int:
    return run(["-q", "protect", "acme", "records", str(source), "-C", "name", *options])


def test_protect_onto_a_full_disk(
    tmp_path: Path, table: bytes, disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    target = disk.path / "protected.csv"
    disk.fill()
    there = sorted(os.listdir(disk.path))
    assert protect(tmp_path / "people.csv", "-o", str(target)) == ExitCode.IO
    assert "no space left" in capsys.readouterr().err
    assert sorted(os.listdir(disk.path)) == there
    assert (tmp_path / "people.csv").read_bytes() == table
    disk.make_room()
    (tmp_path / "few.csv").write_bytes(table[:1000].rpartition(b"\n")[0])
    assert protect(tmp_path / "few.csv", "-o", str(target)) == ExitCode.OK


def test_protect_in_place_on_a_full_disk(table: bytes, disk: Disk) -> None:
    source = disk.path / "people.csv"
    source.write_bytes(table)
    disk.fill()
    assert protect(source, "--in-place") == ExitCode.IO
    assert source.read_bytes() == table
    assert sorted(os.listdir(disk.path)) == ["ballast", "people.csv"]


def test_protect_into_dev_full(tmp_path: Path, table: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    assert protect(tmp_path / "people.csv", "-o", "/dev/full", "--force") == ExitCode.IO
    assert "no space left" in capsys.readouterr().err
    assert (tmp_path / "people.csv").read_bytes() == table
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


# ---- in a process of its own --------------------------------------------------------------------------

PRELUDE = """
import json, os, resource, sys
import openkcm
from pathlib import Path
folder = Path(sys.argv[1])
url = f"sqlite:///{folder / 'vault.db'}"
root = f"local:{folder / 'acme.root'}"
said = {}

def attempt(name, call):
    try:
        call()
    except openkcm.OpenKCMError as error:
        said[name] = [type(error).__name__, str(error), error.retryable]
    except BaseException as error:
        said[name] = [f"untyped {type(error).__name__}", str(error), False]
    else:
        said[name] = ["done", "", False]
"""

EPILOGUE = "\nprint(json.dumps(said))\n"


def say(code: str, folder: Path, *before: str) -> dict[str, Any]:
    """Run the code; what each attempt came to."""
    if before:
        done = subprocess.run(
            [sys.executable, "-c", *before, sys.executable, "-c", PRELUDE + code + EPILOGUE, str(folder)],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    else:
        done = run_python(PRELUDE + code + EPILOGUE, str(folder))
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


FILE_SIZE = """
with openkcm.Core.open(url) as core, openkcm.Gateway(core) as gateway:
    handle = gateway.service("acme", "records")
    blob = handle.encrypt(b"before", subject="somebody")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    attempt("link", lambda: core.link_tenant("other", root=root))
    attempt("create", lambda: core.create_service("acme", "other"))
    attempt("subject", lambda: handle.encrypt(b"x", subject="another"))
    attempt("shred", lambda: handle.shred("somebody"))
    attempt("plain", lambda: handle.decrypt(handle.encrypt(b"x")))
    attempt("old", lambda: handle.decrypt(blob))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    core.link_tenant("other", root=root)
    core.create_service("acme", "other")
    assert handle.decrypt(handle.encrypt(b"x", subject="another")) == b"x"
    assert handle.decrypt(blob) == b"before"
    assert handle.shred("somebody")
    attempt("shredded", lambda: handle.decrypt(blob))
    assert core.verify_audit() is None
"""


def test_no_file_may_grow(tmp_path: Path) -> None:
    make_vault(tmp_path).close()
    said = say(FILE_SIZE, tmp_path)
    for name in ("link", "create", "subject", "shred"):
        kind, text, retryable = said[name]
        assert kind == "StoreUnavailable", (name, said[name])
        assert "full" in text, text
        assert retryable
    assert said["plain"][0] == said["old"][0] == "done"
    assert said["shredded"][0] == "KeyDestroyed"


NO_DESCRIPTORS = """
def take_all():
    held = []
    try:
        while True:
            held.append(os.dup(0))
    except OSError:
        return held

resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
with openkcm.Core.open(url) as core, openkcm.Gateway(core) as gateway:
    handle = gateway.service("acme", "records")
    blob = handle.encrypt(b"before", subject="somebody")
    assert handle.decrypt(blob) == b"before"
    core.create_service("acme", "warmed")
    for drop in (False, True):
        # A second time without the connections that were open already.
        if drop:
            core._vault.store.close()
            gateway._keys.before_fork()
            gateway._keys.after_fork_in_parent()
        held = take_all()
        attempt(f"link {drop}", lambda: core.link_tenant(f"linked{drop}", root=root))
        attempt(f"new root {drop}", lambda: core.link_tenant(f"new{drop}", root=f"local:{folder / 'new.root'}"))
        attempt(f"create {drop}", lambda: core.create_service("acme", f"created{drop}"))
        attempt(f"subject {drop}", lambda: handle.encrypt(b"x", subject=f"subject{drop}"))
        attempt(f"decrypt {drop}", lambda: handle.decrypt(blob))
        attempt(f"many {drop}", lambda: [handle.encrypt(b"x") for _ in range(3000)])
        attempt(f"shred {drop}", lambda: handle.shred(f"nobody{drop}"))
        attempt(f"open {drop}", lambda: openkcm.Core.open(url))
        attempt(f"gateway {drop}", lambda: openkcm.Gateway(core))
        attempt(f"new vault {drop}", lambda: openkcm.Core.open(f"sqlite:///{folder / 'new.db'}"))
        for descriptor in held:
            os.close(descriptor)
        core.create_service("acme", f"after{drop}")
        assert handle.decrypt(handle.encrypt(b"x", subject=f"after{drop}")) == b"x"
        assert handle.decrypt(blob) == b"before"
        assert core.verify_audit() is None
        with openkcm.Core.open(url) as again, openkcm.Gateway(again) as other:
            assert other.service("acme", "records").decrypt(blob) == b"before"
with openkcm.Core.open(f"sqlite:///{folder / 'new.db'}") as core:
    assert core.verify_audit() is None
"""


def test_no_descriptors_are_left(tmp_path: Path) -> None:
    make_vault(tmp_path).close()
    said = say(NO_DESCRIPTORS, tmp_path)
    for name, (kind, text, _) in said.items():
        assert not kind.startswith("untyped"), (name, kind, text)
    for name in ("link", "create", "subject", "decrypt", "shred", "open", "gateway"):
        kind, text, _ = said[f"{name} True"]
        assert kind in ("StoreUnavailable", "SealError"), (name, kind, text)
        assert "open files" in text or "open-file limit" in text, text
    assert said["many False"][0] == said["many True"][0] == "done"


# ---- no right to write --------------------------------------------------------------------------------

UNPRIVILEGED = """
import ctypes, os, sys
# Root reads and writes what modes forbid; without these two capabilities it does not.
for capability in (1, 2) if os.geteuid() == 0 else ():
    if ctypes.CDLL(None).prctl(24, capability, 0, 0, 0):
        raise SystemExit("cannot drop a capability")
os.execv(sys.argv[1], sys.argv[1:])
"""

READ_ONLY = """
def all_files():
    return [each for each in folder.iterdir() if each.is_file()]

def use(name):
    try:
        core = openkcm.Core.open(url)
    except openkcm.OpenKCMError as error:
        said[f"{name} open"] = [type(error).__name__, str(error), error.retryable]
        return
    with core:
        attempt(f"{name} link", lambda: core.link_tenant("other", root=root))
        attempt(f"{name} create", lambda: core.create_service("acme", "other"))
        attempt(f"{name} kill", lambda: core.kill("acme"))
        attempt(f"{name} gateway", lambda: openkcm.Gateway(core))

files = [folder / "vault.db", folder / "vault.keys.db"]
for name, places, modes in (
    ("files", files, (0o400, 0o600)),
    ("folder", [folder], (0o500, 0o700)),
    ("both", [*files, folder], (0o500, 0o700)),
    ("closed", [folder], (0o000, 0o700)),
):
    for path in places:
        path.chmod(modes[0])
    use(name)
    for path in places:
        path.chmod(modes[1])
    # SQLite gives its -wal and -shm the mode of the database.
    for path in all_files():
        path.chmod(0o600)
    # Closing folds them in and removes them, so that the next case starts without.
    with openkcm.Core.open(url) as core, openkcm.Gateway(core):
        core.status()
folder.chmod(0o500)
attempt("new vault", lambda: openkcm.Core.open(f"sqlite:///{folder / 'new.db'}"))
folder.chmod(0o000)
attempt("unseen vault", lambda: openkcm.Core.open(f"sqlite:///{folder / 'new.db'}"))
folder.chmod(0o300)
attempt("unlisted vault", lambda: openkcm.Core.open(f"sqlite:///{folder / 'new.db'}"))
folder.chmod(0o700)
(folder / "shut").mkdir(mode=0o000)
attempt(
    "shut seal", lambda: openkcm.Core.open(f"sqlite:///{folder / 'new.db'}", seal=folder / "shut" / "seal")
)
with openkcm.Core.open(url) as core:
    attempt("shut root", lambda: core.link_tenant("shut", root=f"local:{folder / 'shut' / 'root'}"))
    core.create_service("acme", "after")
    with openkcm.Gateway(core) as gateway:
        handle = gateway.service("acme", "after")
        assert handle.decrypt(handle.encrypt(b"x", subject="somebody")) == b"x"
    assert core.verify_audit() is None
(folder / "shut").chmod(0o700)
"""


def test_nothing_may_be_written(tmp_path: Path) -> None:
    folder = tmp_path / "vault"
    folder.mkdir(mode=0o700)
    with make_vault(folder) as core:
        openkcm.Gateway(core).close()
    said = say(READ_ONLY, folder, UNPRIVILEGED)
    for name, (kind, text, _) in said.items():
        assert not kind.startswith("untyped"), (name, kind, text)
        assert kind != "done", name
    assert "-wal and -shm" in said["files create"][1]


# ---- a locked database --------------------------------------------------------------------------------

LOCK = """
import sqlite3, sys
held = [sqlite3.connect(path, isolation_level=None) for path in sys.argv[1:]]
for connection in held:
    connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


def test_another_process_holds_the_lock(tmp_path: Path) -> None:
    """Longer than a writer waits for it."""
    with make_vault(tmp_path) as core, openkcm.Gateway(core) as gateway:
        handle = gateway.service("acme", "records")
        blob = handle.encrypt(b"x", subject="somebody")
        acts: dict[str, Callable[[], object]] = {
            "link": lambda: core.link_tenant("other", root=f"local:{tmp_path / 'acme.root'}"),
            "create": lambda: core.create_service("acme", "other"),
            "rotate": lambda: core.rotate_tenant("acme"),
            "subject": lambda: handle.encrypt(b"x", subject="another"),
            "shred": lambda: handle.shred("somebody"),
            "gateway": lambda: openkcm.Gateway(core),
        }
        errors: dict[str, BaseException] = {}

        def attempt(name: str) -> None:
            try:
                acts[name]()
            except BaseException as error:
                errors[name] = error

        with subprocess.Popen(
            [sys.executable, "-c", LOCK, str(tmp_path / "vault.db"), str(tmp_path / "vault.keys.db")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as blocker:
            assert blocker.stdout is not None
            assert blocker.stdout.readline() == b"locked\n"
            threads = [threading.Thread(target=attempt, args=(name,)) for name in acts]
            for thread in threads:
                thread.start()
            assert handle.decrypt(blob) == b"x"
            for thread in threads:
                thread.join(120)
            blocker.communicate(timeout=60)
        for name in acts:
            error = errors[name]
            assert type(error) is StoreUnavailable, (name, error)
            assert error.retryable, name
            assert "locked by another" in str(error), (name, str(error))
        for name in ("link", "create", "rotate", "subject", "shred"):
            acts[name]()
        refused(lambda: handle.decrypt(blob), KeyDestroyed)
        assert core.verify_audit() is None
        assert len(core.status()) == 2
    assert sqlite3.connect(tmp_path / "vault.db").execute("PRAGMA integrity_check").fetchone() == ("ok",)
