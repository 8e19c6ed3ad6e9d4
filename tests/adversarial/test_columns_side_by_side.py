# SPDX-License-Identifier: Apache-2.0
"""One service, one column, many threads: each with threads of its own, a kill in between, buffers that others use."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import openkcm
from crowd import Going, crowd
from openkcm.errors import (
    CoreUnavailable,
    DecryptError,
    FormatError,
    InvalidInput,
    StoreUnavailable,
    TenantDark,
)
from openkcm.gateway import DataKeyPolicy, PoolPolicy, ServiceHandle
from support import FREE_THREADED, make_vault

ROWS = 3000
COLUMN = pa.array([None if at % 7 == 3 else b"%d" % at * (at % 9) for at in range(ROWS)], pa.binary())
NAMES = pa.array([f"user-{at * 7919 % 300}" for at in range(ROWS)]).dictionary_encode()
CONTEXTS = pa.array([f"row {at}" for at in range(ROWS)])

KINDS: dict[str, dict[str, Any]] = {
    "a key a row": {},
    "a context a row": {"contexts": CONTEXTS},
    "a subject a row": {"subjects": NAMES},
    "both": {"subjects": NAMES, "contexts": CONTEXTS},
}


def bound(kind: str) -> dict[str, Any]:
    """What decrypts a column of this kind."""
    return {name: value for name, value in KINDS[kind].items() if name == "contexts"}


def buffers(column: Any) -> list[Any]:
    """Copies of a column's offsets, data and validity that can be written to."""
    places = ((1, "i4"), (2, "u1"), (0, "u1"))
    offsets, data, validity = (np.frombuffer(column.buffers()[at], kind).copy() for at, kind in places)
    return [offsets[: len(column) + 1], data, validity]


@pytest.mark.parametrize("policy", [DataKeyPolicy(), DataKeyPolicy(records=700)], ids=["single", "shared"])
@pytest.mark.parametrize("kind", KINDS)
def test_four_callers_of_four_threads(core: openkcm.Core, kind: str, policy: DataKeyPolicy) -> None:
    with openkcm.Gateway(core, policy=policy) as gateway:
        service = gateway.service("acme", "records")
        sealed = service.encrypt_column(COLUMN, **KINDS[kind])

        def work(going: Going) -> None:
            while going():
                assert service.decrypt_column(sealed, threads=4, **bound(kind)).equals(COLUMN)
                mine = service.encrypt_column(COLUMN, threads=4, **KINDS[kind])
                assert service.decrypt_column(mine, threads=4, **bound(kind)).equals(COLUMN)

        crowd([work] * 4, rounds=5)


def test_no_key_and_no_nonce_is_drawn_twice(core: openkcm.Core) -> None:
    with openkcm.Gateway(core, pool=PoolPolicy(keys=16)) as gateway:
        service = gateway.service("acme", "records")
        sealed: list[bytes] = []

        def work(going: Going) -> None:
            while going():
                sealed.extend(service.encrypt_column(COLUMN.drop_null(), threads=3).to_pylist())

        crowd([work] * 4, rounds=5)
        assert len({each[24:96] for each in sealed}) == len(sealed), "a data key for each record"
        assert len({each[96:108] for each in sealed}) == len(sealed)


def test_one_result_of_ours_read_by_all(service: ServiceHandle) -> None:
    """A Column's buffers are given to many at a time, and outlive it."""
    sealed = service.encrypt_column(tuple(buffers(COLUMN)))
    assert isinstance(sealed, openkcm.Column)

    def work(going: Going) -> None:
        while going():
            array = pa.array(sealed)
            assert bytes(sealed.data[: len(first)]) == first
            opened = service.decrypt_column(sealed, threads=2)
            assert pa.array(opened).equals(COLUMN) and service.decrypt_column(array).equals(COLUMN)

    def read(going: Going) -> None:
        while going():
            assert sealed[:20] == rows and sealed.null_count == COLUMN.null_count

    rows = sealed[:20]
    first = rows[0]
    crowd([work, work, read, read], rounds=200)


def test_one_memory_for_the_results_of_all(service: ServiceHandle) -> None:
    """Who gives several calls one ``out`` gets rubbish, but no plaintext stays there, and what is beside it stays."""
    secret = b"attack at dawn! " * 4
    column = pa.array([secret] * 500)
    size = 500 * (len(secret) + 156)
    whole = np.full(size + 2 * 4096, 0xA5, np.uint8)
    out = whole[4096:-4096]

    def work(going: Going) -> None:
        while going():
            service.encrypt_column(column, out=out, threads=2)

    crowd([work] * 4, rounds=10)
    assert secret not in out.tobytes()
    assert (whole[:4096] == 0xA5).all() and (whole[-4096:] == 0xA5).all()


def test_buffers_that_are_written_to_meanwhile(service: ServiceHandle) -> None:
    """Offsets, data and validity change under the hands of those who read them, a result's offsets too."""
    given, taken = buffers(COLUMN), buffers(service.encrypt_column(COLUMN))

    def encrypt(going: Going) -> None:
        while going():
            with contextlib.suppress(InvalidInput):
                service.decrypt_column(service.encrypt_column(tuple(given), threads=2))

    def decrypt(going: Going) -> None:
        while going():
            with contextlib.suppress(InvalidInput, DecryptError, FormatError):
                service.decrypt_column(tuple(taken), threads=2)

    def write(going: Going) -> None:
        dice = np.random.default_rng(7)
        while going():
            for each in (*given, *taken):
                at = int(dice.integers(len(each)))
                before = each[at]
                each[at] = dice.integers(-(2**31), 2**31) & (0xFF if each.itemsize == 1 else 0x7FFFFFFF)
                each[at] = before

    crowd([encrypt, decrypt, write], rounds=40)
    assert service.decrypt_column(tuple(taken)) is not None


def test_a_kill_comes_between(tmp_path: Path) -> None:
    """Each column is right or says that the tenant is dark; once a kill has returned none opens."""
    with make_vault(tmp_path) as core, openkcm.Gateway(core) as gateway:
        service = gateway.service("acme", "records")
        sealed = {kind: service.encrypt_column(COLUMN, **KINDS[kind]) for kind in KINDS}
        dark = threading.Lock()
        seen = {"right": 0, "dark": 0}

        def work(going: Going) -> None:
            while going():
                for kind, column in sealed.items():
                    try:
                        assert service.decrypt_column(column, threads=2, **bound(kind)).equals(COLUMN)
                        service.encrypt_column(COLUMN, threads=2, **KINDS[kind])
                        outcome = "right"
                    except TenantDark:
                        outcome = "dark"
                    with dark:
                        seen[outcome] += 1

        def kill(going: Going) -> None:
            while going():
                core.kill("acme")
                for kind, column in sealed.items():
                    with pytest.raises(TenantDark):
                        service.decrypt_column(column, **bound(kind))
                core.restore("acme")
                service.decrypt_column(sealed["both"], **bound("both"))

        crowd([work, work, work, kill], rounds=5)
        assert min(seen.values()) > 0, seen


def test_handles_come_and_go_while_kills_are_told(tmp_path: Path) -> None:
    """A kill reaches every handle that is there, whoever lets go of others at that moment."""
    with make_vault(tmp_path, "acme", "globex") as core, openkcm.Gateway(core) as gateway:
        service = gateway.service("acme", "records")

        def come_and_go(going: Going) -> None:
            while going():
                for _ in range(20):
                    with gateway._lock:
                        gateway._handles.pop(("globex", "records"), None)
                    gateway.service("globex", "records").encrypt(b"x")

        def kill(going: Going) -> None:
            while going():
                service.encrypt(b"x")
                ready = service._pool.ready
                core.kill("acme")
                assert ready is not None and ready.keys.wiped
                core.restore("acme")

        crowd([come_and_go, come_and_go, kill], rounds=20)


def test_a_gateway_that_is_closed_under_load(tmp_path: Path) -> None:
    """Whoever is at work ends with a right answer or is told what was closed; no key is left."""
    with make_vault(tmp_path) as core:
        for _ in range(3):
            gateway = openkcm.Gateway(core, policy=DataKeyPolicy(records=50))
            service = gateway.service("acme", "records")
            closed = threading.Event()

            def work(
                going: Going, service: ServiceHandle = service, closed: threading.Event = closed
            ) -> None:
                while going():
                    assert service.decrypt(service.encrypt(b"x")) == b"x"
                    try:
                        sealed = service.encrypt_column(COLUMN, subjects=NAMES, threads=2)
                        assert service.decrypt_column(sealed, threads=2).equals(COLUMN)
                    except (CoreUnavailable, StoreUnavailable):
                        assert closed.wait(60)

            def close(
                going: Going, gateway: openkcm.Gateway = gateway, closed: threading.Event = closed
            ) -> None:
                closed.set()
                gateway.close()

            crowd([work, work, work, close, close], rounds=3)
            assert not service._held._held and not service._running._held
            gateway.close()
            del gateway, service
            gc.collect()


@pytest.mark.skipif(
    FREE_THREADED, reason="a child may wait for an object that a thread of its parent had locked"
)
def test_forks_while_columns_are_worked_on(tmp_path: Path) -> None:
    """A child goes on with keys of its own, whatever the parent's threads were at."""
    with make_vault(tmp_path) as core, openkcm.Gateway(core) as gateway:
        service = gateway.service("acme", "records")
        sealed = service.encrypt_column(COLUMN, subjects=NAMES)

        def work(going: Going) -> None:
            while going():
                assert service.decrypt_column(sealed, threads=2).equals(COLUMN)
                service.encrypt_column(COLUMN, threads=2)

        def fork(going: Going) -> None:
            while going():
                child = os.fork()
                if child == 0:
                    status = 1
                    try:
                        if service.decrypt_column(service.encrypt_column(COLUMN)).equals(COLUMN):
                            status = 0
                    finally:
                        os._exit(status)
                assert os.waitpid(child, 0)[1] == 0

        crowd([work, work, fork], rounds=10)
