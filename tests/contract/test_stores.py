# SPDX-License-Identifier: Apache-2.0
"""What a vault promises, whichever database its store is in: one suite over all."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

import openkcm
from openkcm.core import schema
from openkcm.core.migrations import upgrade
from openkcm.core.setup import _seal_check
from openkcm.core.store import Store, open_store
from openkcm.crypto import generate_wrapping_key, wrap_key
from openkcm.envelope import parse
from openkcm.errors import (
    ConfigurationError,
    DecryptError,
    KeyDestroyed,
    SealError,
    StoreUnavailable,
    TenantDark,
    TenantNotFound,
)
from support import environment, refused

PRELUDE = """
import os, sys, openkcm
from pathlib import Path
url, seal, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
"""


@dataclass
class Place:
    """Where a vault is, or will be."""

    url: str
    folder: Path

    @property
    def seal(self) -> Path:
        return self.folder / "vault.seal"

    def open(self, **options: Any) -> openkcm.Core:
        return openkcm.Core.open(self.url, seal=self.seal, **{"create": True, **options})

    def gateway(self, core: openkcm.Core) -> openkcm.Gateway:
        return openkcm.Gateway(core, keys=self.folder / "keys.db")

    def spawn(self, code: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PRELUDE + code, self.url, str(self.seal), str(self.folder), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Each database, empty."""
    if request.param == "sqlite":
        return Place(f"sqlite:///{tmp_path / 'vault.db'}", tmp_path)
    return Place(request.getfixturevalue("postgres_url"), tmp_path)


@pytest.fixture
def core(place: Place) -> Iterator[openkcm.Core]:
    """A vault with tenant acme and service records."""
    with place.open() as core:
        core.link_tenant("acme", root=f"local:{place.folder / 'acme.root'}")
        core.create_service("acme", "records")
        yield core


def finish(processes: list[subprocess.Popen[str]], expected: int = 0) -> list[str]:
    """Wait for all; what they wrote."""
    written = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == expected, err
        written.append(out.strip())
    return written


# ---- acts --------------------------------------------------------------------------------------------------


def test_a_vault_lives_its_life(place: Place, core: openkcm.Core) -> None:
    with place.gateway(core) as gateway:
        records = gateway.service("acme", "records")
        blobs = records.encrypt_many([b"one", b"two"])
        mine = records.encrypt(b"three", subject="user-1")
        assert core.rotate_service("acme", "records") == 2
        assert core.rotate_tenant("acme") == 2
        core.replace_root("acme", root=f"local:{place.folder / 'other.root'}")
        assert records.decrypt_many(blobs) == [b"one", b"two"]
        assert records.decrypt(mine) == b"three"
        core.kill("acme", reason="a\0b \ud800 drill")
        refused(lambda: records.decrypt(blobs[0]), TenantDark)
        core.restore("acme")
        records.shred("user-1")
        refused(lambda: records.decrypt(mine), KeyDestroyed)
        assert records.decrypt(blobs[0]) == b"one"
        (status,) = core.status("acme")
        assert (status.key_version, status.shredded, status.services[0].active_version) == (2, 1, 2)
        core.unlink("acme")
        refused(lambda: records.decrypt(blobs[0]), KeyDestroyed)
    assert core.verify_audit() is None
    acts = [record.act for record in core.audit_records()]
    assert acts == [
        *("init", "link", "create-service", "rotate-service", "rotate-tenant", "replace-root"),
        *("kill", "restore", "shred", "unlink"),
    ]


def test_what_was_closed_is_there_again(place: Place, core: openkcm.Core) -> None:
    with place.gateway(core) as gateway:
        blob = gateway.service("acme", "records").encrypt(b"kept")
    core.close()
    with place.open(create=False) as again, place.gateway(again) as gateway:
        assert gateway.service("acme", "records").decrypt(blob) == b"kept"


def test_tenants_are_sorted_as_python_sorts(place: Place, core: openkcm.Core) -> None:
    for name in ("b", "B", "a-b", "a.b", "0"):
        core.link_tenant(name, root=f"local:{place.folder / 'acme.root'}")
    assert [each.tenant for each in core.status()] == sorted(["acme", "b", "B", "a-b", "a.b", "0"])


def test_a_version_that_never_was_does_not_open(place: Place, core: openkcm.Core) -> None:
    with place.gateway(core) as gateway:
        records = gateway.service("acme", "records")
        blob = bytearray(records.encrypt(b"x"))
        at = 20  # behind magic, suite, kind, reserved and service id
        for version in (2, 2**31 - 1, 2**31, 2**32 - 1):
            blob[at : at + 4] = version.to_bytes(4, "big")
            refused(lambda: records.decrypt(bytes(blob)), DecryptError)


# ---- several processes ---------------------------------------------------------------------------------------


def test_another_core_follows(place: Place, core: openkcm.Core) -> None:
    with place.open() as other, place.gateway(core) as here, place.gateway(other) as there:
        records, same = here.service("acme", "records"), there.service("acme", "records")
        blob, mine = records.encrypt(b"x"), records.encrypt(b"y", subject="user-1")
        assert (same.decrypt(blob), same.decrypt(mine)) == (b"x", b"y")
        core.kill("acme")
        other.poll()
        refused(lambda: same.decrypt(blob), TenantDark)
        core.restore("acme")
        other.poll()
        assert same.decrypt(blob) == b"x"
        core.rotate_service("acme", "records")
        other.poll()
        assert parse(same.encrypt(b"z")).version == 2
        core.shred_keys(core.find_service("acme", "records"), parse(mine).data_key)
        other.poll()
        refused(lambda: same.decrypt(mine), KeyDestroyed)


WRITER = """
from openkcm.errors import StoreUnavailable
with openkcm.Core.open(url, seal=seal) as core:
    service = core.find_service("acme", "records")
    for number in range(15):
        while True:
            try:
                core.shred_keys(service, os.urandom(16))
                if number % 5 == 0:
                    core.rotate_service("acme", "records")
                break
            except StoreUnavailable as error:
                assert error.retryable, error
"""


def test_writers_of_several_processes_keep_the_chain_whole(place: Place, core: openkcm.Core) -> None:
    finish([place.spawn(WRITER) for _ in range(4)])
    assert core.verify_audit() is None
    acts = [record.act for record in core.audit_records()]
    assert acts.count("rotate-service") == 12
    assert acts.count("shred") >= 60
    assert core.status("acme")[0].services[0].active_version == 13


CRASHER = """
with openkcm.Core.open(url, seal=seal) as core, core._vault.store.write() as connection:
    from openkcm.core import audit, schema
    connection.execute(schema.tenants.update().values(state="killed"))
    audit.append(connection, "now", "kill", "acme")
    print("written", flush=True)
    sys.stdin.read()
"""


def test_a_process_that_dies_while_writing_leaves_nothing(place: Place, core: openkcm.Core) -> None:
    before = core.audit_records()
    child = place.spawn(CRASHER)
    assert child.stdout is not None
    assert child.stdout.readline() == "written\n"
    os.kill(child.pid, signal.SIGKILL)
    child.communicate(timeout=60)
    assert core.audit_records() == before
    core.rotate_service("acme", "records")  # nobody holds the lock any more
    assert core.verify_audit() is None
    assert core.status("acme")[0].state is openkcm.TenantState.LIVE


def test_a_writing_that_raises_leaves_nothing(core: openkcm.Core) -> None:
    store, before = core._vault.store, core.audit_records()
    with pytest.raises(ZeroDivisionError), store.write() as connection:
        connection.execute(schema.tenants.update().values(state="killed"))
        raise ZeroDivisionError
    assert core.audit_records() == before
    assert core.status("acme")[0].state is openkcm.TenantState.LIVE


def test_a_reading_is_of_one_moment(place: Place, core: openkcm.Core) -> None:
    with place.open() as other, other._vault.store.read() as connection:
        names = sql.select(schema.tenants.c.generation)
        before = connection.execute(names).scalars().all()
        core.rotate_service("acme", "records")
        assert connection.execute(names).scalars().all() == before
    with core._vault.store.read() as connection:
        assert connection.execute(names).scalars().all() != before


def test_what_a_reading_writes_is_not_kept(core: openkcm.Core) -> None:
    with contextlib.suppress(StoreUnavailable), core._vault.store.read() as connection:
        connection.execute(schema.tenants.update().values(state="killed"))
    assert core.status("acme")[0].state is openkcm.TenantState.LIVE


def test_writers_wait_for_each_other(place: Place, core: openkcm.Core) -> None:
    inside, order = threading.Event(), []

    def second() -> None:
        inside.wait(20)
        with place.open() as other, other._vault.store.write():
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with core._vault.store.write():
        inside.set()
        thread.join(0.5)  # long enough for a second writer who does not wait
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]


FORKER = """
with openkcm.Core.open(url, seal=seal, poll_interval=0.05) as core, openkcm.Gateway(core, keys=folder / "keys.db") as g:
    records = g.service("acme", "records")
    blob = records.encrypt(b"x")
    for _ in range(4):
        child = os.fork()
        if not child:
            assert records.decrypt(blob) == b"x"
            core.rotate_service("acme", "records")
            with core._vault.store.read() as connection:
                if os.fork() == 0:
                    os._exit(0)
                os.wait()
            sys.exit(0)  # in order, with all that an interpreter's end may close
        core.rotate_service("acme", "records")
        assert os.waitpid(child, 0)[1] == 0
        assert records.decrypt(blob) == b"x"
    assert core.verify_audit() is None
    print(core.status("acme")[0].services[0].active_version)
"""


def test_a_forked_child_leaves_its_parents_connections_alone(place: Place, core: openkcm.Core) -> None:
    assert finish([place.spawn(FORKER)]) == ["9"]


# ---- making and changing it ----------------------------------------------------------------------------------

MAKER = """
sys.stdin.readline()
with openkcm.Core.open(url, seal=seal, create=True, region="eu") as core:
    with core._vault.store.read() as connection:
        print(connection.exec_driver_sql("SELECT vault_id FROM vault").scalar_one().hex())
"""


def _at_once(place: Place, code: str, count: int = 4) -> list[str]:
    makers = [place.spawn(code) for _ in range(count)]
    for maker in makers:
        assert maker.stdin is not None
        maker.stdin.write("go\n")
        maker.stdin.flush()
    return finish(makers)


def test_who_makes_it_at_once_makes_one(place: Place) -> None:
    made = _at_once(place, MAKER)
    assert len(set(made)) == 1
    with place.open(create=False) as core:
        assert [record.act for record in core.audit_records()] == ["init"]


def _old_vault(place: Place) -> Store:
    """A vault as the first schema had it."""
    store = open_store(place.url)
    store.make_place()
    with store._change_schema() as connection:
        upgrade(connection, "0001")
    return store


def test_who_migrates_at_once_migrates_once(place: Place) -> None:
    store = _old_vault(place)
    assert not store._is_current()
    store.close()
    assert len(set(_at_once(place, MAKER))) == 1
    with place.open(create=False) as core:
        assert core.verify_audit() is None
        assert core._vault.store._is_current()


def test_the_migrations_make_the_tables_that_the_code_knows(core: openkcm.Core) -> None:
    with core._vault.store.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        found = [each for each in compare_metadata(context, schema.metadata) if each[0] != "remove_table"]
    assert not found


def test_a_newer_schema_is_refused(place: Place, core: openkcm.Core) -> None:
    with core._vault.store.write() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    assert "newer" in str(refused(place.open, StoreUnavailable))


def test_without_create_none_is_made(place: Place) -> None:
    error = refused(lambda: place.open(create=False), ConfigurationError)
    assert "openkcm init" in str(error)
    assert not place.seal.exists()


# ---- regions -------------------------------------------------------------------------------------------------


def _set(core: openkcm.Core, table: sql.Table, **values: object) -> None:
    with core._vault.store.write() as connection:
        connection.execute(table.update().values(**values))


def test_a_vault_of_another_region_does_not_open(place: Place) -> None:
    with place.open(region="de") as core:
        assert core.region == "de"
    refused(lambda: place.open(region="us"), ConfigurationError)


def test_a_vault_whose_region_was_changed_does_not_open(place: Place) -> None:
    with place.open(region="de") as core:
        _set(core, schema.vault, region="us")
    for region in ("us", None):
        refused(lambda region=region: place.open(region=region), SealError)  # type: ignore[misc]


def test_a_tenant_of_another_region_is_not_opened(place: Place, core: openkcm.Core) -> None:
    with place.gateway(core) as gateway:
        blob = gateway.service("acme", "records").encrypt(b"x")
    _set(core, schema.tenants, region="us", generation=sql.text("generation + 1"))
    core.poll()
    with place.gateway(core) as gateway:
        records = gateway.service("acme", "records")
        refused(lambda: records.decrypt(blob), ConfigurationError)
    refused(lambda: core.create_service("acme", "more"), ConfigurationError)


def test_a_vault_of_before_regions_were_sealed_opens(place: Place, core: openkcm.Core) -> None:
    with core._vault.store.read() as connection:
        vault_id = connection.execute(sql.select(schema.vault.c.vault_id)).scalar_one()
    probe = generate_wrapping_key()
    old = wrap_key(core._vault.seal(), probe, b"openkcm/v1/seal-check" + vault_id)
    probe.wipe()
    _set(core, schema.vault, seal_check=old)
    with place.open() as again:
        assert again.status("acme")
    _set(core, schema.vault, seal_check=_seal_check(core._vault.seal(), b"another vault's", "local"))
    refused(place.open, SealError)


def test_names_are_told_apart_by_case(core: openkcm.Core) -> None:
    refused(lambda: core.find_service("ACME", "records"), TenantNotFound)
