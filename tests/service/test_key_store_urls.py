# SPDX-License-Identifier: Apache-2.0
"""Where a key store is: paths, URLs of each kind, drivers that are missing, and what a Gateway makes of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import openkcm
from key_store_support import SERVICE, make_keys, opened
from openkcm.errors import ConfigurationError, InvalidInput, StoreUnavailable
from openkcm.gateway.keystore import checked, open_key_store
from openkcm.gateway.sqlite_store import SQLiteKeyStore
from openkcm.testing.postgres import PostgresServer
from openkcm.testing.valkey import ValkeyServer
from support import make_vault, refused, run_python


def test_a_path_and_its_url_are_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with opened(str(tmp_path / "keys.db")) as store:
        store.add(SERVICE, make_keys(3))
    for place in (tmp_path / "keys.db", f"sqlite:///{tmp_path}/keys.db", "sqlite:///keys.db", "keys.db"):
        store = open_key_store(place)
        assert isinstance(store, SQLiteKeyStore)
        assert store.path == tmp_path / "keys.db"
        assert store.count(SERVICE) == 3
        store.close()


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///",
        "sqlite://keys.db",
        "sqlite:///keys.db?mode=ro",
        "mysql://root:hunter2@host/keys",
        "postgre://app:hunter2@host/keys",
        "postgresql+psycopg://app:hunter2@host/keys",
        "valkey+unix://:hunter2@/tmp/socket",
    ],
)
def test_a_url_of_another_kind_makes_no_file(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(lambda: open_key_store(url), InvalidInput)
    assert "hunter2" not in str(error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("scheme", "driver", "extra"),
    [
        ("postgresql", "psycopg", "postgres"),
        ("POSTGRES", "psycopg", "postgres"),
        ("valkey", "valkey", "valkey"),
        ("rediss", "valkey", "valkey"),
    ],
)
def test_a_driver_that_is_missing_is_named(
    scheme: str, driver: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, driver, None)
    error = refused(lambda: open_key_store(f"{scheme}://:hunter2@127.0.0.1:1/0"), ConfigurationError)
    assert f"openkcm[{extra}]" in str(error)
    assert "hunter2" not in str(error)


def test_drivers_are_loaded_only_where_they_are_used() -> None:
    code = (
        "import sys, openkcm, openkcm.gateway.sqlite_store\n"
        "assert not {'psycopg', 'valkey'} & set(sys.modules)\n"
        "from openkcm.gateway.keystore import open_key_store\n"
        "try:\n    open_key_store('valkey://127.0.0.1:1')\n"
        "except openkcm.StoreUnavailable:\n    pass\n"
        "assert 'valkey' in sys.modules and 'psycopg' not in sys.modules\n"
    )
    run_python(code)


def test_a_gateway_takes_each(
    tmp_path: Path, postgres_server: PostgresServer, empty_valkey: ValkeyServer
) -> None:
    places = [
        f"sqlite:///{tmp_path / 'mine.db'}",
        postgres_server.create_database("gateway_takes_each"),
        empty_valkey.url,
        empty_valkey.url.replace("valkey://", "redis://"),
    ]
    with make_vault(tmp_path) as core:
        for place in places:
            with openkcm.Gateway(core, keys=place) as gateway:
                handle = gateway.service("acme", "records")
                blob = handle.encrypt(b"x", subject="a")
            with openkcm.Gateway(core, keys=place) as gateway:
                handle = gateway.service("acme", "records")
                assert handle.decrypt(blob) == b"x"
                keys = gateway._keys
            # A Gateway closes what it opened.
            assert not refused(lambda keys=keys: keys.count(SERVICE), StoreUnavailable).retryable
        # And leaves to its owner what it was given.
        with opened(places[1]) as store:
            with openkcm.Gateway(core, keys=store) as gateway:
                assert gateway.service("acme", "records").encrypt(b"x", subject="a")
            assert store.count(handle.service_id) == 1


def test_keys_of_rows_are_checked() -> None:
    keys = make_keys(3)
    assert checked(keys) == checked([tuple(key) for key in keys]) == keys
    assert checked([]) == []
    for field, value in (
        ("key_id", None),
        ("subject", bytearray(32)),
        ("version", True),
        ("wrapped", bytes(1)),
    ):
        refused(lambda: checked([*keys, keys[0]._replace(**{field: value})]), StoreUnavailable)  # noqa: B023
