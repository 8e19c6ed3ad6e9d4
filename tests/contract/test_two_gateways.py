# SPDX-License-Identifier: Apache-2.0
"""Two Gateways, in different processes as it were, that share a key store: what one remembers the other changes."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import openkcm
from key_store_support import Place, postgres_place, sqlite_place, valkey_place
from openkcm.errors import DecryptError, KeyDestroyed
from openkcm.gateway import ServiceHandle
from openkcm.gateway.keystore import StoredKey
from support import make_vault, refused, url, without_threads

_numbers = itertools.count()


class Pair(NamedTuple):
    """A handle of each Gateway on one service. Each has a Core of its own, which hears nothing of the other."""

    one: ServiceHandle
    two: ServiceHandle
    folder: Path
    place: Place

    def destroy(self, version: int) -> None:
        """Destroy a version of the service key, as its owner may once all data keys are moved."""
        connection = sqlite3.connect(self.folder / "vault.db", isolation_level=None)
        statement = "UPDATE service_keys SET state = 'destroyed', wrapped = x'' WHERE version = ?"
        assert connection.execute(statement, (version,)).rowcount == 1
        connection.close()
        for handle in (self.one, self.two):
            handle._core._vault.ring.drop("acme")  # type: ignore[attr-defined]

    def look(self) -> None:
        """Let both Cores see what the other did."""
        for handle in (self.one, self.two):
            handle._core.poll()  # type: ignore[attr-defined]

    def stored(self, subject: str) -> StoredKey:
        """A subject's key as the store has it."""
        subjects = self.one._subjects
        found = subjects._store.find_subjects(self.one.service_id, [subjects.hash(subject)])
        return found[subjects.hash(subject)]


@pytest.fixture(params=["sqlite", "postgres", "valkey"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    if request.param == "sqlite":
        place = sqlite_place(tmp_path)
    elif request.param == "postgres":
        place = postgres_place(request.getfixturevalue("postgres_server"), f"pair_{next(_numbers)}")
    else:
        place = valkey_place(request.getfixturevalue("empty_valkey"))
    with (
        without_threads(make_vault(tmp_path)) as first,
        without_threads(openkcm.Core.open(url(tmp_path))) as second,
        openkcm.Gateway(first, keys=place.url) as one,
        openkcm.Gateway(second, keys=place.url) as two,
    ):
        yield Pair(one.service("acme", "records"), two.service("acme", "records"), tmp_path, place)


def test_a_subject_has_one_key(pair: Pair) -> None:
    blobs = [
        handle.encrypt(b"x", subject=f"s{at % 5}") for at in range(20) for handle in (pair.one, pair.two)
    ]
    assert pair.one.decrypt_many(blobs) == pair.two.decrypt_many(blobs) == [b"x"] * 40
    assert pair.one._subjects._store.count(pair.one.service_id) == 5


def test_a_version_that_is_destroyed_after_the_other_moved_all(pair: Pair) -> None:
    blobs = [pair.one.encrypt(b"x", subject=f"s{at}") for at in range(10)]
    assert pair.two.decrypt_many(blobs) == [b"x"] * 10  # both remember version 1
    pair.one._core.rotate_service("acme", "records")  # type: ignore[attr-defined]
    assert pair.one.rewrap_subjects() == 10
    pair.destroy(1)
    # To decrypt and to encrypt, in bulk and alone; only what it remembered would not open.
    assert pair.two.decrypt(blobs[0]) == b"x"
    assert pair.two.decrypt_many(blobs) == [b"x"] * 10
    pair.two._subjects.forget()
    pair.one._subjects.forget()
    assert pair.one.decrypt_many(blobs) == [b"x"] * 10


@pytest.mark.parametrize("many", [False, True])
def test_encrypting_after_the_other_moved_all(pair: Pair, many: bool) -> None:
    names = [f"s{at}" for at in range(10 if many else 1)]
    before = pair.two.encrypt_many([b"x"] * len(names), subjects=names)
    pair.one._core.rotate_service("acme", "records")  # type: ignore[attr-defined]
    pair.one.rewrap_subjects()
    # One that is new is under version 2, those that are remembered are not: they are moved together.
    pair.look()
    pair.destroy(1)
    blobs = pair.two.encrypt_many([b"x"] * (len(names) + 1), subjects=[*names, "new"])
    assert pair.one.decrypt_many([*before, *blobs]) == [b"x"] * (2 * len(names) + 1)
    assert pair.one._subjects._store.count(pair.one.service_id) == len(names) + 1
    assert pair.stored("s0").version == 2


def test_a_version_that_is_destroyed_before_all_were_moved(pair: Pair) -> None:
    moved, lost = (pair.two.encrypt(b"x", subject=name) for name in ("moved", "lost"))
    pair.one._core.rotate_service("acme", "records")  # type: ignore[attr-defined]
    pair.one.rewrap_many([moved])
    pair.destroy(1)
    outcomes = pair.two.decrypt_many([moved, lost, moved], errors="return")
    assert outcomes[0] == outcomes[2] == b"x"
    assert type(outcomes[1]) is KeyDestroyed
    refused(lambda: pair.two.encrypt(b"x", subject="lost"), KeyDestroyed)
    refused(lambda: pair.two.encrypt_many([b"x"] * 2, subjects=["moved", "lost"]), KeyDestroyed)
    assert pair.two.encrypt(b"x", subject="moved")
    assert pair.stored("lost").version == 1


def test_a_shred_by_the_other_is_final(pair: Pair) -> None:
    blobs = [pair.two.encrypt(b"x", subject=name) for name in ("gone", "stays")]
    old = pair.stored("gone")
    assert pair.one.shred("gone") == 1
    # The other has heard nothing, and still remembers the key.
    outcomes = pair.two.decrypt_many(blobs, errors="return")
    assert type(outcomes[0]) is KeyDestroyed
    assert outcomes[1] == b"x"
    fresh = pair.two.encrypt(b"y", subject="gone")
    assert pair.one.decrypt(fresh) == b"y"
    assert pair.stored("gone").key_id != old.key_id
    for handle in (pair.one, pair.two):
        refused(lambda handle=handle: handle.decrypt(blobs[0]), KeyDestroyed)


def test_a_shredded_key_among_those_to_be_moved(pair: Pair) -> None:
    blobs = pair.two.encrypt_many([b"x"] * 2, subjects=["gone", "stays"])
    pair.one.shred("gone")
    pair.one._core.rotate_service("acme", "records")  # type: ignore[attr-defined]
    fresh = pair.two.encrypt_many([b"y"] * 3, subjects=["gone", "stays", "new"])
    assert pair.one.decrypt_many(fresh) == [b"y"] * 3
    assert pair.one.decrypt(blobs[1]) == b"x"
    refused(lambda: pair.two.decrypt(blobs[0]), KeyDestroyed)


def test_a_late_rewrap_does_not_bring_a_shredded_key_back(pair: Pair) -> None:
    blob = pair.two.encrypt(b"x", subject="gone")
    late = pair.stored("gone")
    pair.one.shred("gone")
    pair.two._core.rotate_service("acme", "records")  # type: ignore[attr-defined]
    pair.two._subjects._store.rewrap(pair.two.service_id, [late._replace(version=2)])
    assert pair.two._subjects.rewrap([late]) == 0
    assert pair.one._subjects._store.count(pair.one.service_id) == 0
    refused(lambda: pair.two.decrypt(blob), KeyDestroyed)


def test_a_store_that_was_mended_is_believed(pair: Pair) -> None:
    blob = pair.one.encrypt(b"x", subject="a")
    whole = pair.stored("a")
    damaged = whole._replace(wrapped=bytes(72))
    store = pair.one._subjects._store
    store.rewrap(pair.one.service_id, [damaged])
    refused(lambda: pair.two.decrypt(blob), DecryptError)
    refused(lambda: pair.two.encrypt(b"x", subject="a"), DecryptError)
    store.rewrap(pair.one.service_id, [whole])
    assert pair.two.decrypt(blob) == b"x"
    assert pair.one.decrypt(pair.two.encrypt(b"y", subject="a")) == b"y"


def test_what_is_remembered_is_bounded_and_read_anew(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openkcm.gateway.subjects.CACHED", 50)
    blobs = []
    for start in range(0, 400, 40):
        names = [f"s{at}" for at in range(start, start + 40)]
        blobs += pair.one.encrypt_many([b"x"] * 40, subjects=names)
        for subjects in (pair.one._subjects, pair.two._subjects):
            assert max(len(subjects._by_id), len(subjects._by_subject)) <= 50
        assert pair.two.decrypt_many(blobs[-40:]) == [b"x"] * 40
    assert pair.two.decrypt_many(blobs) == [b"x"] * 400
    assert len(pair.two._subjects._by_id) <= 50
