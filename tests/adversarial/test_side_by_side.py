# SPDX-License-Identifier: Apache-2.0
"""What threads do to each other's objects. With a GIL much of this cannot go wrong; without one it ended in chaos."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time

import pytest

import openkcm
from crowd import Going, crowd
from openkcm import crypto
from openkcm.core import sqlite_store
from openkcm.core.prober import Lane
from openkcm.errors import DecryptError, InvalidInput, LimitExceeded, SecretMemoryError
from openkcm.gateway import DataKeyPolicy, PoolPolicy, ServiceHandle

TAG_BYTES = 16
COMMITMENT_BYTES = 32
NONCE_AT = 20 + 4 + 72
"""Where an inline envelope has its nonce (docs/formats.md)."""

LAYOUT = crypto.RecordCipher(b"H" * 20, 72, False, b"aad")


def record(size: int) -> bytes:
    """A record of the layout under a key that nobody has."""
    sealed: bytes = LAYOUT.seal_one(
        crypto.generate_keys(1), 0, 1, os.urandom(72), b"context", os.urandom(size)
    )
    return sealed


# ---- lists and dicts -----------------------------------------------------------------------------------------


def test_a_list_that_is_changed_while_it_is_gathered() -> None:
    """What is read of a list is held, and no place is read that it no longer has."""
    blobs = [record(3000) for _ in range(200)]

    def read(going: Going) -> None:
        while going():
            with contextlib.suppress(InvalidInput):
                LAYOUT.gather(blobs, True)

    def replace(going: Going) -> None:
        while going():
            for at in range(0, 100, 7):
                blobs[at] = record(3000)

    def shrink(going: Going) -> None:
        while going():
            del blobs[100:]
            blobs.extend(blobs[:100])

    crowd([read, read, replace, shrink], rounds=1000)
    assert LAYOUT.gather(blobs, True)[0] == 1


def test_batches_whose_lists_are_changed(service: ServiceHandle) -> None:
    """Whoever changes a list while it is encrypted gets what was in it before or after, or an error; nothing else."""
    known = {os.urandom(size) for size in (1, 64, 3000) for _ in range(20)}
    records = [*known]
    sealed = service.encrypt_many(records)

    def encrypt(going: Going) -> None:
        while going():
            with contextlib.suppress(InvalidInput):
                assert known.issuperset(service.decrypt_many(service.encrypt_many(records)))

    def decrypt(going: Going) -> None:
        while going():
            with contextlib.suppress(InvalidInput, DecryptError):
                assert known.issuperset(service.decrypt_many(sealed))

    def change(going: Going) -> None:
        while going():
            for each in (records, sealed):
                each.append(bytes(bytearray(each[0])))
                each[1] = bytes(bytearray(each[2]))
                del each[3:5]
                each.extend(each[:1])

    crowd([encrypt, decrypt, change], rounds=300)


def test_a_kept_key_that_is_taken_out_as_it_is_found() -> None:
    keys = crypto.generate_keys(1)
    blob = LAYOUT.seal_one(keys, 0, 1, bytes(72), b"context", b"record")
    place = LAYOUT.place(blob)
    kept: dict[bytes, tuple[crypto.SecretKeys, float, float]] = {}
    far = time.monotonic() + 1e6

    def read(going: Going) -> None:
        while going():
            assert LAYOUT.open_kept(kept, far, time.monotonic, b"context", blob) in (None, b"record")

    def change(going: Going) -> None:
        while going():
            kept[place] = (keys.keep(0), 0.0, far)
            del kept[place]

    crowd([read, read, change], rounds=100_000)


# ---- nonces and keys -----------------------------------------------------------------------------------------


def test_no_segment_of_a_stream_has_the_nonce_of_another() -> None:
    """All threads seal the same segment: two that come out alike had one nonce."""
    for _ in range(20):
        keys = crypto.generate_keys(1)
        cipher = crypto.StreamCipher(keys, 0, b"aad", None)
        sealed: list[bytes] = []

        def seal(going: Going, cipher: crypto.StreamCipher = cipher, sealed: list[bytes] = sealed) -> None:
            while going():
                sealed.append(cipher.seal(bytes(64), False))

        crowd([seal] * 4, rounds=100)
        assert len({each[-64 - TAG_BYTES :] for each in sealed}) == len(sealed)
        assert sum(len(each) - 64 - TAG_BYTES for each in sealed) == COMMITMENT_BYTES, "one commitment"


def test_a_stream_ends_once() -> None:
    """Of threads that each seal the last segment one does."""
    for _ in range(100):
        cipher = crypto.StreamCipher(crypto.generate_keys(1), 0, b"", None)
        sealed: list[bytes] = []

        def end(going: Going, cipher: crypto.StreamCipher = cipher, sealed: list[bytes] = sealed) -> None:
            while going():
                with contextlib.suppress(LimitExceeded):
                    sealed.append(cipher.seal(b"", True))

        crowd([end] * 4, rounds=3)
        assert len(sealed) == 1


@pytest.mark.parametrize("at_once", [1, 40])
def test_no_key_and_no_nonce_is_drawn_twice(service: ServiceHandle, at_once: int) -> None:
    sealed: list[bytes] = []

    def draw(going: Going) -> None:
        while going():
            if at_once == 1:
                sealed.append(service.encrypt(b"x"))
            else:
                sealed.extend(service.encrypt_many([b"x"] * at_once))

    crowd([draw] * 8, rounds=500)
    assert len({each[24:NONCE_AT] for each in sealed}) == len(sealed), "a data key for each record"
    assert len({each[NONCE_AT : NONCE_AT + 12] for each in sealed}) == len(sealed)
    assert set(service.decrypt_many(sealed)) == {b"x"}


def test_keys_are_wiped_while_they_are_used() -> None:
    """A use ends before the wipe does, and after that there is none."""
    for _ in range(100):
        keys = crypto.generate_keys(4)
        blob = LAYOUT.seal_one(keys, 0, 1, bytes(4 * 72), b"", b"record")

        def use(going: Going, keys: crypto.SecretKeys = keys, blob: bytes = blob) -> None:
            with contextlib.suppress(SecretMemoryError):
                while going():
                    assert LAYOUT.open_one(keys, 0, b"", blob) == b"record"
                    assert len(keys.select([0, 3])) == 2

        def wipe(going: Going, keys: crypto.SecretKeys = keys) -> None:
            while going():
                pass
            keys.wipe()

        crowd([use, use, wipe, wipe], rounds=20)
        assert keys.wiped


# ---- what Python does in one step only while it has a GIL --------------------------------------------------------


def test_no_shared_key_escapes_a_wipe(core: openkcm.Core) -> None:
    """Of wipes that meet each other and a key that is being made, one gets it."""
    with openkcm.Gateway(core, policy=DataKeyPolicy(records=10**6), pool=PoolPolicy(keys=4096)) as gateway:
        shared = gateway.service("acme", "records")._shared
        handed_out: list[crypto.SecretKeys] = []

        def reserve(going: Going) -> None:
            while going():
                handed_out.append(shared.reserve(None, 0, 1)[0].keys)

        def wipe(going: Going) -> None:
            while going():
                shared.wipe()

        crowd([reserve, wipe, wipe, wipe], rounds=3000)
        shared.wipe()
        assert all(keys.wiped for keys in handed_out)


def test_a_lane_that_many_submit_to() -> None:
    """Threads come, make calls and leave while others look how many there are."""
    made = threading.Semaphore(0)
    lane = Lane("lane", 1, 8)
    lane._started.update({-number: 0.0 for number in range(1, 3000)})  # that go through it takes a while

    def submit(going: Going) -> None:
        while going():
            lane.submit(made.release)
            lane.relieve()

    try:
        crowd([submit] * 4, rounds=500)
    finally:
        lane.close()
    assert made.acquire(timeout=60)


def test_every_probe_is_counted(core: openkcm.Core) -> None:
    liveness = core._vault.liveness
    before = liveness.counts["probes"]
    rounds = [0] * 4

    def count(going: Going) -> None:
        mine = next(numbers)
        while going():
            liveness._count("probes")
            rounds[mine] += 1

    numbers = itertools.count()
    crowd([count] * 4, rounds=5000)
    assert liveness.counts["probes"] - before == sum(rounds)


def test_one_engine_for_all_who_ask_first(core: openkcm.Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one would be forgotten, with a connection that is open when the process forks."""
    store = core._vault.store
    made: list[threading.Thread] = []
    create = sqlite_store.sql.create_engine

    def create_while_another_asks(*arguments: object, **options: object) -> object:
        made.append(threading.Thread(target=lambda: store.engine))
        if len(made) == 1:
            made[0].start()
            made[0].join(0.5)
        return create(*arguments, **options)  # type: ignore[call-overload]

    store.close()
    monkeypatch.setattr(sqlite_store.sql, "create_engine", create_while_another_asks)
    engine = store.engine
    made[0].join(60)
    assert len(made) == 1 and store.engine is engine
