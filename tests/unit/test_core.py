# SPDX-License-Identifier: Apache-2.0
"""The embedded Core: linking, opening, killing, rotating, and what it refuses."""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import time
from pathlib import Path

import pytest

import openkcm
from openkcm import crypto
from openkcm.core import schema
from openkcm.errors import (
    AlreadyExists,
    ConfigurationError,
    CoreUnavailable,
    DecryptError,
    InvalidInput,
    KeyDestroyed,
    LimitExceeded,
    RootMisconfigured,
    SealError,
    ServiceNotFound,
    StoreUnavailable,
    TenantDark,
    TenantNotFound,
)
from openkcm.keys import Change, Event, KeyState, Kind, Service, TenantState, WrappedKeys
from openkcm.limits import MAX_KEYS_PER_CALL
from softhsm import Token
from support import make_vault, refused, run_python, url


@pytest.fixture
def records(core: openkcm.Core) -> Service:
    return core.find_service("acme", "records")


def wrapped(core: openkcm.Core, service: Service, count: int = 3) -> WrappedKeys:
    return core.wrap_keys(service, crypto.generate_keys(count), Kind.INLINE)


def opens(core: openkcm.Core, service: Service, keys: WrappedKeys) -> bool:
    return not core.unwrap_keys(service, keys)[1]


# ---- a new vault, and one that is opened again --------------------------------------------------------


def test_a_new_vault_is_private(tmp_path: Path) -> None:
    with make_vault(tmp_path) as core:
        assert core.region == "local"
        assert core.default_key_store == tmp_path / "vault.keys.db"
        for path in tmp_path.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert (tmp_path / "vault.seal").stat().st_size == 32


def test_keys_survive_a_restart(tmp_path: Path) -> None:
    with make_vault(tmp_path) as core:
        service = core.find_service("acme", "records")
        keys = wrapped(core, service)
    with openkcm.Core.open(url(tmp_path)) as core:
        assert core.find_service("acme", "records") == service
        assert opens(core, service, keys)


def test_opening_twice_in_one_process(tmp_path: Path) -> None:
    with make_vault(tmp_path) as one, openkcm.Core.open(url(tmp_path)) as two:
        service = two.find_service("acme", "records")
        assert opens(two, service, wrapped(one, service))


def test_the_region_is_the_vaults(tmp_path: Path) -> None:
    openkcm.Core.open(url(tmp_path), region="eu-central-1").close()
    with openkcm.Core.open(url(tmp_path)) as core:
        assert core.region == "eu-central-1"
    refused(lambda: openkcm.Core.open(url(tmp_path), region="us-east-1"), ConfigurationError)


def test_a_closed_core_says_so(core: openkcm.Core, records: Service) -> None:
    keys = wrapped(core, records)
    core.close()
    core.close()
    for call in (
        lambda: core.unwrap_keys(records, keys),
        lambda: core.wrap_keys(records, crypto.generate_keys(1), Kind.INLINE),
        core.status,
        lambda: core.kill("acme"),
        lambda: core.find_service("acme", "records"),
    ):
        refused(call, CoreUnavailable)


@pytest.mark.parametrize(
    "bad",
    [
        "vault.db",
        "mysql://x/y",
        "sqlite://",
        "sqlite:///:memory:",
        "",
        "postgresql://x",
        "postgresql://%zz@x/y",
    ],
)
def test_other_stores_are_refused(bad: str) -> None:
    refused(lambda: openkcm.Core.open(bad), InvalidInput)


# ---- the seal file ------------------------------------------------------------------------------------


def _open_again(tmp_path: Path) -> None:
    openkcm.Core.open(url(tmp_path)).close()


def test_a_missing_seal_file_is_never_made_anew(tmp_path: Path) -> None:
    make_vault(tmp_path).close()
    (tmp_path / "vault.seal").rename(tmp_path / "elsewhere")
    assert "missing" in str(refused(lambda: _open_again(tmp_path), SealError))
    assert not (tmp_path / "vault.seal").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "vault.seal")
    _open_again(tmp_path)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620])
def test_a_seal_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    make_vault(tmp_path).close()
    (tmp_path / "vault.seal").chmod(mode)
    assert "chmod 600" in str(refused(lambda: _open_again(tmp_path), SealError))


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_damaged_seal_file_is_refused(tmp_path: Path, size: int) -> None:
    make_vault(tmp_path).close()
    (tmp_path / "vault.seal").write_bytes(b"x" * size)
    refused(lambda: _open_again(tmp_path), SealError)


def test_another_vaults_seal_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        make_vault(tmp_path / name).close()
    (tmp_path / "b" / "vault.seal").replace(tmp_path / "a" / "vault.seal")
    assert "another vault" in str(refused(lambda: _open_again(tmp_path / "a"), SealError))


def test_a_seal_that_is_a_link_is_refused(tmp_path: Path) -> None:
    make_vault(tmp_path).close()
    (tmp_path / "vault.seal").rename(tmp_path / "real")
    (tmp_path / "vault.seal").symlink_to(tmp_path / "real")
    refused(lambda: _open_again(tmp_path), SealError)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user; not checked")
def test_another_users_seal_is_refused(tmp_path: Path) -> None:
    make_vault(tmp_path).close()
    os.chown(tmp_path / "vault.seal", 12345, 12345)
    refused(lambda: _open_again(tmp_path), SealError)


def test_a_crash_while_a_vault_is_made(tmp_path: Path) -> None:
    # The seal file is there and the database is not yet: the seal is taken.
    make_vault(tmp_path).close()
    seal = (tmp_path / "vault.seal").read_bytes()
    for path in tmp_path.glob("vault.db*"):
        path.unlink()
    with make_vault(tmp_path) as core:
        assert core.status()
    assert (tmp_path / "vault.seal").read_bytes() == seal
    # The schema is there and the first row is not.
    with sqlite3.connect(tmp_path / "vault.db") as connection:
        for table in ("service_keys", "services", "tenant_keys", "tenants", "vault", "audit"):
            connection.execute(f"DELETE FROM {table}")
    connection.close()
    with make_vault(tmp_path) as core:
        assert core.status()


# ---- the store ----------------------------------------------------------------------------------------


def test_migrations_and_tables_agree(core: openkcm.Core) -> None:
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from sqlalchemy import inspect

    from openkcm.core import migrations

    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.set_main_option("path_separator", "os")
    assert ScriptDirectory.from_config(config).get_heads() == [schema.HEAD]
    found = inspect(core._vault.store.engine)
    assert set(found.get_table_names()) == {*schema.metadata.tables, "alembic_version"}
    for table in schema.metadata.tables.values():
        columns = {each["name"]: each for each in found.get_columns(table.name)}
        assert set(columns) == set(table.columns.keys())
        for column in table.columns:
            assert bool(columns[column.name]["nullable"]) == bool(column.nullable), column
        keys = {key["referred_table"] for key in found.get_foreign_keys(table.name)}
        assert keys == {key.column.table.name for key in table.foreign_keys}
        indexes = {each["name"]: each["column_names"] for each in found.get_indexes(table.name)}
        assert indexes == {each.name: [column.name for column in each.columns] for each in table.indexes}


def test_opening_an_existing_vault_imports_no_alembic(tmp_path: Path) -> None:
    make_vault(tmp_path).close()
    run_python(
        f"import sys, openkcm\nopenkcm.Core.open({url(tmp_path)!r}).close()\nassert 'alembic' not in sys.modules"
    )


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    make_vault(tmp_path).close()
    with sqlite3.connect(tmp_path / "vault.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    error = refused(lambda: _open_again(tmp_path), StoreUnavailable)
    assert "newer" in str(error)
    assert not error.retryable


def test_something_else_than_a_database(tmp_path: Path) -> None:
    (tmp_path / "vault.db").write_bytes(b"this is not a database, but long enough to be one" * 50)
    assert not refused(lambda: _open_again(tmp_path), StoreUnavailable).retryable
    assert not (tmp_path / "vault.seal").exists()


def test_a_locked_store_is_a_retryable_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openkcm.core.sqlite_store.BUSY_SECONDS", 0.1)
    with make_vault(tmp_path) as core:
        core._vault.store._busy_seconds = 0.1
        core._vault.store.close()
        service = core.find_service("acme", "records")
        keys = wrapped(core, service)
        blocker = sqlite3.connect(tmp_path / "vault.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        error = refused(lambda: core.create_service("acme", "more"), StoreUnavailable)
        assert error.retryable
        assert "locked" in str(error)
        assert opens(core, service, keys)
        blocker.execute("ROLLBACK")
        blocker.close()
        assert core.create_service("acme", "more").name == "more"


def test_a_missing_folder(tmp_path: Path) -> None:
    refused(lambda: openkcm.Core.open(url(tmp_path / "nowhere")), StoreUnavailable)


# ---- tenants and services -----------------------------------------------------------------------------


def test_names_are_checked(core: openkcm.Core, tmp_path: Path) -> None:
    for bad in ("", "a b", "-x", "ä", "x" * 129, "a/b", "a\n", 5, None):
        refused(lambda bad=bad: core.link_tenant(bad, root=f"local:{tmp_path / 'x'}"), InvalidInput)
        refused(lambda bad=bad: core.create_service("acme", bad), InvalidInput)
    assert not (tmp_path / "x").exists()


def test_things_are_made_once(core: openkcm.Core, tmp_path: Path) -> None:
    refused(lambda: core.link_tenant("acme", root=f"local:{tmp_path / 'acme.root'}"), AlreadyExists)
    refused(lambda: core.create_service("acme", "records"), AlreadyExists)


def test_what_is_not_there(core: openkcm.Core) -> None:
    refused(lambda: core.create_service("nobody", "records"), TenantNotFound)
    refused(lambda: core.find_service("nobody", "records"), TenantNotFound)
    refused(lambda: core.find_service("acme", "nothing"), ServiceNotFound)
    refused(lambda: core.kill("nobody"), TenantNotFound)
    refused(lambda: core.restore("nobody"), TenantNotFound)
    refused(lambda: core.unlink("nobody"), TenantNotFound)
    refused(lambda: core.status("nobody"), TenantNotFound)
    refused(lambda: core.rotate_service("acme", "nothing"), ServiceNotFound)


def test_a_failed_link_leaves_nothing(core: openkcm.Core, tmp_path: Path) -> None:
    (tmp_path / "bad.root").write_bytes(b"short")
    refused(lambda: core.link_tenant("globex", root=f"local:{tmp_path / 'bad.root'}"), RootMisconfigured)
    refused(lambda: core.link_tenant("globex", root="nothing:x"), RootMisconfigured)
    assert [each.tenant for each in core.status()] == ["acme"]


def test_the_tree(core: openkcm.Core) -> None:
    core.rotate_service("acme", "records")
    (tenant,) = core.status("acme")
    assert (tenant.state, tenant.reason, tenant.development) == (TenantState.LIVE, "", True)
    (service,) = tenant.services
    assert service.active_version == 2
    assert [(key.version, key.state) for key in service.versions] == [
        (1, KeyState.DEACTIVATED),
        (2, KeyState.ACTIVE),
    ]
    assert core.list_services("acme") == tenant.services
    assert core.list_tenants() == core.status()


def test_on_a_real_token(tmp_path: Path, token: Token) -> None:
    with openkcm.Core.open(url(tmp_path)) as core:
        core.link_tenant("acme", root=token.uri)
        service = core.create_service("acme", "records")
        keys = wrapped(core, service)
        assert not core.status()[0].development
    with openkcm.Core.open(url(tmp_path)) as core:
        assert opens(core, service, keys)


# ---- dual lock ----------------------------------------------------------------------------------------


def test_the_root_gives_back_only_ciphertext(core: openkcm.Core, tmp_path: Path) -> None:
    """With the root alone a tenant key stays shut; with root and seal key it opens (trust rules 2 and 3)."""
    from openkcm.core.opening import root_context
    from openkcm.envelope import wrap_aad
    from openkcm.roots import open_root

    with sqlite3.connect(tmp_path / "vault.db") as connection:
        (blob,) = connection.execute("SELECT wrapped FROM tenant_keys").fetchone()
    connection.close()
    sealed = open_root(f"local:{tmp_path / 'acme.root'}").unwrap(blob, root_context("acme", "local", 1))
    assert len(sealed) == 72
    aad = wrap_aad(2, "acme", "local", version=1)
    assert crypto._xaes_open(os.urandom(32), sealed[:24], aad, sealed[24:]) is None
    seal = (tmp_path / "vault.seal").read_bytes()
    assert len(crypto._xaes_open(seal, sealed[:24], aad, sealed[24:]) or b"") == 32


def test_without_the_root_nothing_opens(tmp_path: Path) -> None:
    with make_vault(tmp_path) as core:
        service = core.find_service("acme", "records")
        keys = wrapped(core, service)
    (tmp_path / "acme.root").rename(tmp_path / "unplugged")
    with openkcm.Core.open(url(tmp_path)) as core:
        assert "refuses" in str(refused(lambda: core.unwrap_keys(service, keys), TenantDark))
        refused(lambda: core.wrap_keys(service, crypto.generate_keys(1), Kind.INLINE), TenantDark)
        (tmp_path / "unplugged").rename(tmp_path / "acme.root")
        deadline = time.monotonic() + 10
        while True:
            try:
                assert opens(core, service, keys)
                break
            except TenantDark:
                assert time.monotonic() < deadline
                time.sleep(0.05)


# ---- wrapping -----------------------------------------------------------------------------------------


def test_batches_are_bounded(core: openkcm.Core, records: Service) -> None:
    keys = WrappedKeys(Kind.INLINE, 1, bytes(72) * 20_000)
    refused(lambda: core.unwrap_keys(records, keys), LimitExceeded)


def test_unknown_versions_and_kinds_look_like_any_wrong_key(core: openkcm.Core, records: Service) -> None:
    good = wrapped(core, records)
    for version in (0, 2, 2**32 - 1):
        _, failures, _ = core.unwrap_keys(records, WrappedKeys(Kind.INLINE, version, good.wrapped))
        assert {at: type(error) for at, error in failures.items()} == dict.fromkeys(range(3), DecryptError)
    _, failures, _ = core.unwrap_keys(records, WrappedKeys(Kind.INLINE_STREAM, 1, good.wrapped))
    assert len(failures) == 3


def test_a_service_of_another_tenant_is_not_found(
    core: openkcm.Core, records: Service, tmp_path: Path
) -> None:
    core.link_tenant("globex", root=f"local:{tmp_path / 'globex.root'}")
    good = wrapped(core, records)
    forged = Service("globex", records.region, records.name, records.service_id)
    refused(lambda: core.wrap_keys(forged, crypto.generate_keys(1), Kind.INLINE), ServiceNotFound)
    with pytest.raises((ServiceNotFound, DecryptError)):
        core.unwrap_keys(forged, good)


def test_packed_lengths_are_checked() -> None:
    refused(lambda: WrappedKeys(Kind.INLINE, 1, bytes(71)), InvalidInput)
    refused(lambda: WrappedKeys(Kind.INLINE, 1, bytes(72), bytes(16)), InvalidInput)
    refused(lambda: WrappedKeys(Kind.STORED, 1, bytes(72)), InvalidInput)


def test_shredded_keys_stay_shredded(core: openkcm.Core, records: Service) -> None:
    ids = os.urandom(32)
    keys = core.wrap_keys(records, crypto.generate_keys(2), Kind.STORED, ids)
    assert opens(core, records, keys)
    core.shred_keys(records, ids[16:])
    core.shred_keys(records, ids[16:])
    _, failures, _ = core.unwrap_keys(records, keys)
    assert {at: type(error) for at, error in failures.items()} == {1: KeyDestroyed}
    moved, failures = core.rewrap_keys(records, keys)
    assert {at: type(error) for at, error in failures.items()} == {1: KeyDestroyed}
    assert moved.wrapped[72:] == bytes(72)
    assert core.shredded(records, ids) == {ids[16:]}
    refused(lambda: core.shred_keys(records, b"x" * 15), InvalidInput)
    assert core.status()[0].shredded == 1


def test_more_ids_than_a_call_may_have_are_refused_before_anything_is_done(
    core: openkcm.Core, records: Service
) -> None:
    for most in (os.urandom(16 * MAX_KEYS_PER_CALL), os.urandom(16)):
        core.shred_keys(records, most)
        assert len(core.shredded(records, most)) == len(most) // 16
    number = core.audit_records()[-1].number
    for _ in range(2):  # also when all verdicts are known
        refused(lambda: core.shred_keys(records, os.urandom(16 * (MAX_KEYS_PER_CALL + 1))), LimitExceeded)
        refused(lambda: core.shredded(records, os.urandom(16 * (MAX_KEYS_PER_CALL + 1))), LimitExceeded)
    refused(lambda: core.shredded(records, b"x" * 15), InvalidInput)
    assert core.audit_records()[-1].number == number
    assert core.status()[0].shredded == MAX_KEYS_PER_CALL + 1


def test_another_process_shreds(tmp_path: Path, core: openkcm.Core, records: Service) -> None:
    ids = os.urandom(16)
    keys = core.wrap_keys(records, crypto.generate_keys(1), Kind.STORED, ids)
    assert opens(core, records, keys)
    with openkcm.Core.open(url(tmp_path)) as other:
        other.shred_keys(records, ids)
    assert not opens(core, records, keys)


# ---- kill and restore ---------------------------------------------------------------------------------


def test_kill_and_restore(core: openkcm.Core, records: Service) -> None:
    keys = wrapped(core, records)
    events: list[Event] = []
    stop = core.watch(events.append)
    core.kill("acme", reason="a drill")
    assert events == [Event(Change.DARK, "acme")]
    for call in (
        lambda: core.unwrap_keys(records, keys),
        lambda: core.rewrap_keys(records, keys),
        lambda: core.wrap_keys(records, crypto.generate_keys(1), Kind.INLINE),
        lambda: core.create_service("acme", "other"),
        lambda: core.rotate_service("acme", "records"),
        lambda: core.rotate_tenant("acme"),
    ):
        assert "a drill" in str(refused(call, TenantDark))
    (tenant,) = core.status()
    assert (tenant.state, tenant.reason, tenant.open) == (TenantState.DARK, "a drill", False)
    core.restore("acme")
    stop()
    assert events[-1] == Event(Change.LIVE, "acme")
    assert opens(core, records, keys)


def test_a_kill_survives_a_restart(tmp_path: Path) -> None:
    with make_vault(tmp_path) as core:
        service = core.find_service("acme", "records")
        keys = wrapped(core, service)
        core.kill("acme")
    with openkcm.Core.open(url(tmp_path)) as core:
        refused(lambda: core.unwrap_keys(service, keys), TenantDark)
        core.restore("acme")
        assert opens(core, service, keys)


def test_restore_needs_the_root(core: openkcm.Core, tmp_path: Path) -> None:
    core.kill("acme")
    (tmp_path / "acme.root").rename(tmp_path / "unplugged")
    refused(lambda: core.restore("acme"), TenantDark)
    assert core.status()[0].state is TenantState.DARK
    (tmp_path / "unplugged").rename(tmp_path / "acme.root")
    core.restore("acme")
    assert core.status()[0].state is TenantState.LIVE


def test_only_the_killed_tenant_goes_dark(tmp_path: Path) -> None:
    with make_vault(tmp_path, "acme", "globex") as core:
        one, two = core.find_service("acme", "records"), core.find_service("globex", "records")
        keys = wrapped(core, two)
        wrapped(core, one)
        core.kill("acme")
        assert opens(core, two, keys)
        refused(lambda: wrapped(core, one), TenantDark)


def test_another_process_kills_and_an_idle_core_zeroizes(
    tmp_path: Path, core: openkcm.Core, records: Service
) -> None:
    keys = wrapped(core, records)
    assert core.status()[0].open
    events: list[Event] = []
    core.watch(events.append)
    run_python(f"import openkcm\nwith openkcm.Core.open({url(tmp_path)!r}) as core: core.kill('acme')")
    deadline = time.monotonic() + 5
    while not events:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert events == [Event(Change.DARK, "acme")]
    assert core._vault.ring.generations() == {}
    refused(lambda: core.unwrap_keys(records, keys), TenantDark)
    run_python(f"import openkcm\nwith openkcm.Core.open({url(tmp_path)!r}) as core: core.restore('acme')")
    assert opens(core, records, keys)


def test_a_kill_that_cannot_be_recorded_still_zeroizes(
    core: openkcm.Core, records: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = wrapped(core, records)
    core._vault.store._busy_seconds = 0.05
    core._vault.store.close()
    blocker = sqlite3.connect(tmp_path / "vault.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    error = refused(lambda: core.kill("acme"), StoreUnavailable)
    assert "dark in this process" in str(error)
    refused(lambda: core.unwrap_keys(records, keys), TenantDark)
    blocker.execute("ROLLBACK")
    blocker.close()
    core.kill("acme")
    assert core.status()[0].state is TenantState.DARK


def test_killing_while_others_open_and_use(core: openkcm.Core, records: Service) -> None:
    """No use ever sees a zeroed key, and after a kill no key is left open, however the threads interleave."""
    keys = wrapped(core, records, 50)
    stop = threading.Event()
    wrong: list[BaseException] = []

    def use() -> None:
        while not stop.is_set():
            try:
                opened, failures, _ = core.unwrap_keys(records, keys)
                assert not failures
                fresh = core.wrap_keys(records, opened, Kind.INLINE)
                assert not core.unwrap_keys(records, fresh)[1]
            except TenantDark:
                pass
            except BaseException as error:
                wrong.append(error)
                return

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(25):
        core.kill("acme")
        assert core._vault.ring.generations() == {}
        time.sleep(0.002)
        assert core._vault.ring.generations() == {}
        core.restore("acme")
        time.sleep(0.005)
    stop.set()
    for thread in threads:
        thread.join(30)
    assert wrong == []


def test_a_kill_overtakes_an_opening(
    core: openkcm.Core, records: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A root that answers only after the kill must not bring the keys back."""
    keys = wrapped(core, records)
    core._vault.ring.drop("acme")
    root = core._vault.root(core.status()[0].root)
    asked, go_on = threading.Event(), threading.Event()
    unwrap = root.unwrap

    def slow(*arguments: object) -> bytes:
        asked.set()
        assert go_on.wait(20)
        return unwrap(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(root, "unwrap", slow)
    seen: list[BaseException] = []
    thread = threading.Thread(
        target=lambda: seen.append(refused(lambda: core.unwrap_keys(records, keys), TenantDark))
    )
    thread.start()
    assert asked.wait(20)
    core.kill("acme")
    go_on.set()
    thread.join(20)
    assert len(seen) == 1
    assert core._vault.ring.generations() == {}


# ---- lifecycle ----------------------------------------------------------------------------------------


def test_rotation_and_rewrapping(core: openkcm.Core, records: Service) -> None:
    old = wrapped(core, records)
    assert core.rotate_service("acme", "records") == 2
    assert wrapped(core, records).version == 2
    assert opens(core, records, old)
    moved, failures = core.rewrap_keys(records, old)
    assert (moved.version, failures) == (2, {})
    assert opens(core, records, moved)


def test_another_process_rotates(tmp_path: Path, core: openkcm.Core, records: Service) -> None:
    wrapped(core, records)
    with openkcm.Core.open(url(tmp_path)) as other:
        other.rotate_service("acme", "records")
    core.poll()
    assert wrapped(core, records).version == 2


def test_rotating_the_tenant_key(core: openkcm.Core, records: Service, tmp_path: Path) -> None:
    old = wrapped(core, records)
    core.rotate_service("acme", "records")
    assert core.rotate_tenant("acme") == 2
    assert opens(core, records, old)
    assert opens(core, records, wrapped(core, records))
    with sqlite3.connect(tmp_path / "vault.db") as connection:
        rows = connection.execute(
            "SELECT version, state, length(wrapped) FROM tenant_keys ORDER BY 1"
        ).fetchall()
    connection.close()
    assert [(row[0], row[1]) for row in rows] == [(1, "destroyed"), (2, "active")]
    assert rows[0][2] == 0


def test_replacing_the_root_by_another_provider(
    core: openkcm.Core, records: Service, tmp_path: Path, token: Token
) -> None:
    keys = wrapped(core, records)
    core.replace_root("acme", token.uri)
    (tmp_path / "acme.root").unlink()
    assert opens(core, records, keys)
    assert core.status()[0].root == token.uri


def test_unlinking_destroys(core: openkcm.Core, records: Service, tmp_path: Path) -> None:
    keys = wrapped(core, records)
    with sqlite3.connect(tmp_path / "vault.db") as connection:
        blobs = [row[0] for row in connection.execute("SELECT wrapped FROM service_keys")]
        blobs += [row[0] for row in connection.execute("SELECT wrapped FROM tenant_keys")]
    connection.close()
    core.unlink("acme")
    refused(lambda: wrapped(core, records), KeyDestroyed)
    assert {type(error) for error in core.unwrap_keys(records, keys)[1].values()} == {KeyDestroyed}
    refused(lambda: core.find_service("acme", "records"), KeyDestroyed)
    refused(lambda: core.restore("acme"), KeyDestroyed)
    assert core.status() == []
    core.close()
    files = b"".join(path.read_bytes() for path in tmp_path.glob("vault.db*"))
    assert len(blobs) == 2
    assert not any(blob[:16] in files for blob in blobs)


def test_an_unlink_that_fails_does_not_undo_a_kill(
    core: openkcm.Core, records: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store can be written neither for the one nor for the other."""
    keys = wrapped(core, records)
    monkeypatch.setattr(core._vault.store, "_busy_seconds", 0.05)
    core._vault.store.close()
    other = sqlite3.connect(tmp_path / "vault.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        refused(lambda: core.kill("acme"), StoreUnavailable)
        refused(lambda: core.unwrap_keys(records, keys), TenantDark)
        refused(lambda: core.unlink("acme"), StoreUnavailable)
        refused(lambda: core.unwrap_keys(records, keys), TenantDark)
    finally:
        other.execute("ROLLBACK")
        other.close()
    refused(lambda: core.unwrap_keys(records, keys), TenantDark)
    core.restore("acme")
    assert opens(core, records, keys)


def test_an_unlink_that_fails_leaves_a_live_tenant_live(
    core: openkcm.Core, records: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = wrapped(core, records)

    def fail(*_: object) -> None:
        raise StoreUnavailable("full")

    with monkeypatch.context() as patched:
        patched.setattr("openkcm.core.tenants._delete_keys", fail)
        refused(lambda: core.unlink("acme"), StoreUnavailable)
    assert opens(core, records, keys)


def test_a_root_uri_is_text_that_utf8_can_carry(core: openkcm.Core, tmp_path: Path) -> None:
    refused(lambda: core.link_tenant("odd", root=f"local:{tmp_path}/\udcff"), InvalidInput)
    assert [
        path.name for path in tmp_path.iterdir() if "acme" not in path.name and "vault" not in path.name
    ] == []


def test_a_tenant_can_be_linked_again(core: openkcm.Core, records: Service, tmp_path: Path) -> None:
    keys = wrapped(core, records)
    core.unlink("acme")
    core.link_tenant("acme", root=f"local:{tmp_path / 'acme.root'}")
    again = core.create_service("acme", "records")
    assert again.service_id != records.service_id
    assert opens(core, again, wrapped(core, again))
    with pytest.raises((ServiceNotFound, DecryptError)):
        raise core.unwrap_keys(records, keys)[1][0]


def test_two_processes_change_the_same_tenant(tmp_path: Path, core: openkcm.Core) -> None:
    """Rotating in two Cores at once: each rotation is whole or refused, and every key opens afterwards."""
    with openkcm.Core.open(url(tmp_path)) as other:
        kept: list[WrappedKeys] = []
        service = core.find_service("acme", "records")
        lock = threading.Lock()

        def rotate(mine: openkcm.Core) -> None:
            for _ in range(8):
                try:
                    mine.rotate_service("acme", "records")
                except StoreUnavailable as error:
                    assert error.retryable
                keys = wrapped(mine, service)
                with lock:
                    kept.append(keys)

        threads = [threading.Thread(target=rotate, args=(mine,)) for mine in (core, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(kept) == 16
        for mine in (core, other):
            mine.poll()
            assert all(opens(mine, service, keys) for keys in kept)


# ---- audit --------------------------------------------------------------------------------------------


def test_every_act_is_recorded_and_the_chain_holds(
    core: openkcm.Core, tmp_path: Path, records: Service
) -> None:
    core.rotate_service("acme", "records")
    core.rotate_tenant("acme")
    core.kill("acme", reason="why")
    core.restore("acme")
    core.shred_keys(records, os.urandom(16))
    core.unlink("acme")
    acts = [record.act for record in core.audit_records()]
    assert acts == [
        "init",
        "link",
        "create-service",
        "rotate-service",
        "rotate-tenant",
        "kill",
        "restore",
        "shred",
        "unlink",
    ]
    assert core.verify_audit() is None
    for change in (
        "UPDATE audit SET detail = 'nothing' WHERE number = 6",
        "DELETE FROM audit WHERE number = 4",
        "UPDATE audit SET number = 99 WHERE number = 2",
    ):
        with sqlite3.connect(tmp_path / "vault.db") as connection:
            connection.execute(change)
        connection.close()
        assert core.verify_audit() is not None


# ---- fork ---------------------------------------------------------------------------------------------


def test_a_forked_child_reopens_through_the_root(
    core: openkcm.Core, records: Service, tmp_path: Path
) -> None:
    keys = wrapped(core, records)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            assert core._vault.ring.generations() == {}
            assert opens(core, records, keys)
            (tmp_path / "acme.root").rename(tmp_path / "unplugged")
            core._vault.ring.drop("acme")
            refused(lambda: core.unwrap_keys(records, keys), TenantDark)
            (tmp_path / "unplugged").rename(tmp_path / "acme.root")
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert opens(core, records, keys)
    assert core.status()
