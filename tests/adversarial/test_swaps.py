# SPDX-License-Identifier: Apache-2.0
"""Swaps: what belongs to one place opens at no other, and each refusal looks like any other.

Every layer has 27 places, and each of them is given what belongs to each of the 26 others: 702 swaps. The tenants
share one root and one seal key, so that nothing but the binding of names keeps them apart.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

import openkcm
from openkcm.errors import DecryptError
from support import refused, url

TENANTS = ("acme", "globex", "initech")
SERVICES = ("payments", "audit", "mail")
SUBJECTS = ("ann", "bob", "eve")
PLACES = list(product(TENANTS, SERVICES, SUBJECTS))
SWAPS = 702


@dataclass
class Vault:
    """Three tenants x three services x three subjects, with a record of each."""

    folder: Path
    core: openkcm.Core
    gateway: openkcm.Gateway

    def decrypt(self, place: tuple[str, str, str], blob: bytes) -> bytes:
        return self.gateway.service(*place[:2]).decrypt(blob, context=context_of(place))


def context_of(place: tuple[str, str, str]) -> dict[str, str]:
    return dict(zip(("tenant", "service", "subject"), place, strict=True))


def plaintext_of(place: tuple[str, str, str]) -> bytes:
    return "/".join(place).encode()


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    with openkcm.Core.open(url(tmp_path)) as core, openkcm.Gateway(core) as gateway:
        for tenant in TENANTS:
            core.link_tenant(tenant, root=f"local:{tmp_path / 'shared.root'}")
            for service in SERVICES:
                core.create_service(tenant, service)
        yield Vault(tmp_path, core, gateway)


def encrypt_all(vault: Vault, *, named: bool) -> list[bytes]:
    return [
        vault.gateway.service(*place[:2]).encrypt(
            plaintext_of(place), context=context_of(place), subject=place[2] if named else None
        )
        for place in PLACES
    ]


class Refusals:
    """Counts refusals and holds them to one and the same error."""

    def __init__(self) -> None:
        self.count = 0
        self.looks: set[tuple[object, ...]] = set()

    def expect(self, call: Callable[[], object]) -> None:
        error = refused(call, DecryptError)
        assert isinstance(error, DecryptError)
        self.count += 1
        self.looks.add((type(error), str(error), error.code, error.retryable, error.__cause__, error.args))

    def check(self, count: int = SWAPS) -> None:
        assert self.count == count
        assert len(self.looks) == 1


def swaps() -> Iterator[tuple[int, int]]:
    return ((a, b) for a in range(27) for b in range(27) if a != b)


@pytest.mark.parametrize("named", [False, True])
def test_envelopes(vault: Vault, named: bool) -> None:
    blobs = encrypt_all(vault, named=named)
    seen = Refusals()
    for a, b in swaps():
        seen.expect(lambda a=a, b=b: vault.decrypt(PLACES[a], blobs[b]))
    seen.check()
    assert [vault.decrypt(place, blob) for place, blob in zip(PLACES, blobs, strict=True)] == [
        plaintext_of(place) for place in PLACES
    ]


@pytest.mark.parametrize(
    ("named", "part"),
    [
        (False, slice(8, 24)),  # the service and its version
        (False, slice(24, 96)),  # the wrapped data key
        (False, slice(0, 96)),  # the header
        (False, slice(96, 108)),  # the nonce
        (True, slice(24, 40)),  # the stored data key's id
        (True, slice(0, 40)),
        (True, slice(40, 52)),
    ],
)
def test_parts_of_envelopes(vault: Vault, named: bool, part: slice) -> None:
    """A part of one envelope in another, opened with whichever service and context the result may claim."""
    blobs = encrypt_all(vault, named=named)
    seen = Refusals()
    count = 0
    for a, b in swaps():
        spliced = blobs[a][: part.start] + blobs[b][part] + blobs[a][part.stop :]
        if spliced == blobs[a]:  # two subjects of one service have the same service and version
            assert part == slice(8, 24)
            assert PLACES[a][:2] == PLACES[b][:2]
            continue
        for place in {PLACES[a], PLACES[b], (*PLACES[b][:2], PLACES[a][2])}:
            seen.expect(lambda place=place, spliced=spliced: vault.decrypt(place, spliced))
            count += 1
    assert count >= SWAPS
    seen.check(count)


def test_wrapped_data_keys_in_the_key_store(vault: Vault) -> None:
    blobs = encrypt_all(vault, named=True)
    connection = _key_store(vault)
    rows = [
        connection.execute(
            "SELECT service_id, key_id, wrapped FROM data_keys WHERE key_id = ?", (blob[24:40],)
        ).fetchone()
        for blob in blobs
    ]
    assert len({row[2] for row in rows}) == 27
    seen = Refusals()
    for shift in range(1, 27):
        _place(connection, "data_keys", "wrapped", rows, shift, ("service_id", "key_id"))
        with openkcm.Gateway(vault.core) as gateway:
            for place, blob in zip(PLACES, blobs, strict=True):
                handle = gateway.service(*place[:2])
                seen.expect(
                    lambda handle=handle, place=place, blob=blob: handle.decrypt(
                        blob, context=context_of(place)
                    )
                )
    seen.check()
    _place(connection, "data_keys", "wrapped", rows, 0, ("service_id", "key_id"))
    connection.close()
    for place, blob in zip(PLACES, blobs, strict=True):
        assert vault.decrypt(place, blob) == plaintext_of(place)


def test_wrapped_service_keys(vault: Vault) -> None:
    """Three tenants x three services x three versions."""
    blobs = []
    for tenant, name in product(TENANTS, SERVICES):
        for number in range(3):
            if number:
                vault.core.rotate_service(tenant, name)
            with openkcm.Gateway(vault.core) as gateway:
                blobs.append((tenant, name, gateway.service(tenant, name).encrypt(b"x")))
    connection = sqlite3.connect(vault.folder / "vault.db", isolation_level=None)
    rows = [
        connection.execute(
            "SELECT service_id, version, wrapped FROM service_keys WHERE service_id = ? AND version = ?",
            (blob[8:20], int.from_bytes(blob[20:24], "big")),
        ).fetchone()
        for _, _, blob in blobs
    ]
    assert len({row[2] for row in rows}) == 27
    seen = Refusals()
    for shift in range(27):
        _place(connection, "service_keys", "wrapped", rows, shift, ("service_id", "version"))
        with openkcm.Core.open(url(vault.folder)) as core, openkcm.Gateway(core) as gateway:
            for tenant, name, blob in blobs:
                handle = gateway.service(tenant, name)
                if shift:
                    seen.expect(lambda handle=handle, blob=blob: handle.decrypt(blob))
                else:
                    assert handle.decrypt(blob) == b"x"
    connection.close()
    seen.check()


def test_wrapped_tenant_keys(vault: Vault) -> None:
    """Twenty-seven tenants on one root."""
    tenants = [*TENANTS, *(f"tenant-{number}" for number in range(24))]
    blobs = []
    for tenant in tenants:
        if tenant not in TENANTS:
            vault.core.link_tenant(tenant, root=f"local:{vault.folder / 'shared.root'}")
            vault.core.create_service(tenant, "payments")
        blobs.append(vault.gateway.service(tenant, "payments").encrypt(b"x"))
    connection = sqlite3.connect(vault.folder / "vault.db", isolation_level=None)
    rows = [
        connection.execute(
            "SELECT tenant, version, wrapped FROM tenant_keys WHERE tenant = ?", (tenant,)
        ).fetchone()
        for tenant in tenants
    ]
    seen = Refusals()
    for shift in range(27):
        _place(connection, "tenant_keys", "wrapped", rows, shift, ("tenant", "version"))
        with openkcm.Core.open(url(vault.folder)) as core, openkcm.Gateway(core) as gateway:
            for tenant, blob in zip(tenants, blobs, strict=True):
                handle = gateway.service(tenant, "payments")
                if shift:
                    seen.expect(lambda handle=handle, blob=blob: handle.decrypt(blob))
                else:
                    assert handle.decrypt(blob) == b"x"
    connection.close()
    seen.check()


def _key_store(vault: Vault) -> sqlite3.Connection:
    (path,) = vault.folder.glob("*.keys.db")
    return sqlite3.connect(path, isolation_level=None)


def _place(
    connection: sqlite3.Connection,
    table: str,
    column: str,
    rows: list[tuple[object, ...]],
    shift: int,
    keys: tuple[str, str],
) -> None:
    """Give each row what belongs to the one ``shift`` further."""
    for at, row in enumerate(rows):
        connection.execute(
            f"UPDATE {table} SET {column} = ? WHERE {keys[0]} = ? AND {keys[1]} = ?",
            (rows[(at + shift) % len(rows)][-1], *row[:2]),
        )
