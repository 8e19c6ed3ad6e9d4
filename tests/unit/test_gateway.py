# SPDX-License-Identifier: Apache-2.0
"""The Gateway: records, batches, policies, pools, subjects and what it does when a tenant goes dark."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import openkcm
from openkcm import crypto
from openkcm.envelope import INLINE_OVERHEAD, STORED_OVERHEAD, parse
from openkcm.errors import (
    CoreUnavailable,
    DecryptError,
    FormatError,
    InvalidInput,
    KeyDestroyed,
    LimitExceeded,
    OpenKCMError,
    StoreUnavailable,
    TenantDark,
)
from openkcm.gateway import DataKeyPolicy, PoolPolicy, ServiceHandle
from openkcm.keys import Kind
from support import closed, make_vault, refused, released, url

CONTEXT = {"table": "cards", "row": "7"}


def other(core: openkcm.Core, **options: object) -> ServiceHandle:
    return openkcm.Gateway(core, **options).service("acme", "records")  # type: ignore[arg-type]


# ---- one record ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 64, 5000, 100_000])
@pytest.mark.parametrize("context", [None, b"", b"raw", {}, CONTEXT, {"ü": "ö"}])
@pytest.mark.parametrize("subject", [None, "user-42"])
def test_round_trip(service: ServiceHandle, size: int, context: object, subject: str | None) -> None:
    data = os.urandom(size)
    blob = service.encrypt(data, context=context, subject=subject)
    assert len(blob) - size == (INLINE_OVERHEAD if subject is None else STORED_OVERHEAD)
    assert service.decrypt(blob, context=context) == data
    assert service.decrypt(bytearray(blob), context=context) == data
    wrong = b"other" if context != b"other" else None
    refused(lambda: service.decrypt(blob, context=wrong), DecryptError)


def test_contexts_that_look_alike_are_apart(service: ServiceHandle) -> None:
    contexts = [
        None,
        b"",
        {},
        b"\x00",
        b"\x02",
        {"a": "b"},
        {"a": ""},
        {"": "a"},
        {"ab": ""},
        {"a": "", "b": ""},
    ]
    blobs = [service.encrypt(b"x", context=context) for context in contexts]
    for at, blob in enumerate(blobs):
        for to, context in enumerate(contexts):
            if at == to:
                assert service.decrypt(blob, context=context) == b"x"
            else:
                refused(
                    lambda blob=blob, context=context: service.decrypt(blob, context=context), DecryptError
                )


def test_overheads_are_as_documented() -> None:
    assert (INLINE_OVERHEAD, STORED_OVERHEAD) == (156, 100)


@pytest.mark.parametrize("bad", ["text", 5, None, ["x"], {"a": 1}])
def test_only_bytes_are_encrypted(service: ServiceHandle, bad: object) -> None:
    refused(lambda: service.encrypt(bad), InvalidInput)
    refused(lambda: service.encrypt(bad, subject="s"), InvalidInput)
    assert refused(lambda: service.encrypt_many([b"x", bad]), InvalidInput).index == 1
    refused(lambda: service.decrypt(bad), InvalidInput)
    assert refused(lambda: service.decrypt_many([service.encrypt(b"x"), bad]), InvalidInput).index == 1


@pytest.mark.parametrize("make", [released, closed])
def test_what_was_released_is_no_input(core: openkcm.Core, make: Callable[[], Any]) -> None:
    for policy in (DataKeyPolicy(), DataKeyPolicy(records=9, bytes=1000)):
        handle, bad = other(core, policy=policy), make()
        good = handle.encrypt(b"x")
        refused(lambda: handle.encrypt(bad), InvalidInput)  # noqa: B023  # called at once
        refused(lambda: handle.encrypt(bad, subject="s"), InvalidInput)  # noqa: B023
        refused(lambda: handle.decrypt(bad), InvalidInput)  # noqa: B023
        for call, ok in (
            (handle.encrypt_many, b"x"),
            (handle.decrypt_many, good),
            (handle.rewrap_many, good),
            (partial(handle.encrypt_many, subjects=["a", "b"]), b"x"),
        ):
            assert refused(lambda: call([ok, bad]), InvalidInput).index == 1  # noqa: B023
            outcomes = call([ok, bad], errors="return")
            assert [type(each) for each in outcomes] == [bytes, InvalidInput] and outcomes[1].index == 1


def test_a_released_context_is_refused(service: ServiceHandle) -> None:
    bad, blob = released(), service.encrypt(b"x")
    refused(lambda: service.encrypt(b"x", context=bad), InvalidInput)
    refused(lambda: service.decrypt(blob, context=bad), InvalidInput)
    assert refused(lambda: service.encrypt_many([b"x"] * 2, contexts=[None, bad]), InvalidInput).index == 1
    assert refused(lambda: service.decrypt_many([blob] * 2, contexts=[None, bad]), InvalidInput).index == 1


@pytest.mark.parametrize("bad", ["text", 5, {"a": b"x"}, {b"a": "x"}, {"a": "\ud800"}, ["a"]])
def test_contexts_are_checked(service: ServiceHandle, bad: object) -> None:
    refused(lambda: service.encrypt(b"x", context=bad), InvalidInput)
    refused(lambda: service.encrypt_many([b"x"], contexts=[bad]), InvalidInput)
    refused(lambda: service.encrypt(b"x", context=bytes(70_000)), LimitExceeded)


@pytest.mark.parametrize("bad", ["", 5, b"x", "\ud800"])
def test_subjects_are_checked(service: ServiceHandle, bad: object) -> None:
    refused(lambda: service.encrypt(b"x", subject=bad), InvalidInput)
    refused(lambda: service.encrypt_many([b"x", b"y"], subjects=["a", bad]), InvalidInput)
    refused(lambda: service.encrypt(b"x", subject="x" * 1025), LimitExceeded)


def test_a_record_over_two_gigabytes_is_refused_before_anything(service: ServiceHandle) -> None:
    # A sparse mapping: the size is real, the memory is not.
    import mmap

    huge = mmap.mmap(-1, 2**31)
    assert refused(lambda: service.encrypt(huge), LimitExceeded).index is None
    assert refused(lambda: service.encrypt_many([b"x", huge]), LimitExceeded).index == 1
    refused(lambda: service.decrypt(huge), FormatError)


def test_every_record_has_its_own_key_and_nonce(service: ServiceHandle) -> None:
    blobs = service.encrypt_many([b"x"] * 2000) + [service.encrypt(b"x") for _ in range(600)]
    envelopes = [parse(blob) for blob in blobs]
    assert len({envelope.data_key for envelope in envelopes}) == 2600
    assert len({envelope.nonce for envelope in envelopes}) == 2600


# ---- batches ------------------------------------------------------------------------------------------


def test_an_empty_batch(service: ServiceHandle) -> None:
    assert service.encrypt_many([]) == []
    assert service.decrypt_many([]) == []
    assert service.rewrap_many([]) == []
    assert service.encrypt_many([], subjects=[]) == []


def test_a_batch_larger_than_a_chunk(service: ServiceHandle) -> None:
    records = [b"%d" % at for at in range(20_000)]
    contexts = [b"%d" % (at % 7) for at in range(20_000)]
    subjects = [f"s{at % 18_000}" for at in range(20_000)]
    blobs = service.encrypt_many(records, contexts=contexts)
    assert service.decrypt_many(blobs, contexts=contexts) == records
    blobs = service.encrypt_many(iter(records), subjects=subjects)
    assert service.decrypt_many(tuple(blobs)) == records


def test_contexts_are_those_there_were_at_first(service: ServiceHandle) -> None:
    """What happens to the caller's list while they are encoded, in his code or in another thread, changes nothing."""

    class Emptying(dict[str, str]):
        def items(self) -> Any:
            contexts.clear()
            return super().items()

    contexts: list[Any] = [Emptying(a="1"), b"2", None]
    blobs = service.encrypt_many([b"x"] * 3, contexts=contexts)
    assert [
        service.decrypt(blob, context=each)
        for blob, each in zip(blobs, ({"a": "1"}, b"2", None), strict=True)
    ]


def test_a_batch_of_large_records_is_cut_by_bytes(
    service: ServiceHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openkcm.gateway.batches.CHUNK_BYTES", 1000)
    records = [os.urandom(at * 40) for at in range(60)]
    for subjects in (None, [f"s{at % 3}" for at in range(60)]):
        blobs = service.encrypt_many(records, subjects=subjects)
        assert service.decrypt_many(blobs) == records
        blobs[50] = blobs[50][:-1] + bytes([blobs[50][-1] ^ 1])
        assert refused(lambda blobs=blobs: service.decrypt_many(blobs), DecryptError).index == 50
    assert refused(lambda: service.encrypt_many([*records, "x"]), InvalidInput).index == 60


@pytest.mark.parametrize("bad", [b"bytes", "text", 5, None, {"a": 1}])
def test_a_batch_is_a_list(service: ServiceHandle, bad: object) -> None:
    for call in (service.encrypt_many, service.decrypt_many, service.rewrap_many):
        refused(lambda call=call: call(bad), InvalidInput)


def test_one_for_all_or_one_each(service: ServiceHandle) -> None:
    for options in (
        {"context": b"a", "contexts": [b"a"]},
        {"contexts": [b"a", b"b"]},
        {"subject": "a", "subjects": ["a"]},
        {"subjects": ["a", "b"]},
        {"contexts": b"ab"},
        {"errors": "ignore"},
    ):
        refused(lambda options=options: service.encrypt_many([b"x"], **options), InvalidInput)


def test_outcomes_of_a_mixed_batch(service: ServiceHandle, core: openkcm.Core) -> None:
    core.create_service("acme", "elsewhere")
    foreign = openkcm.Gateway(core).service("acme", "elsewhere").encrypt(b"f")
    good = service.encrypt(b"good")
    stored = service.encrypt(b"stored", subject="a")
    gone = service.encrypt(b"gone", subject="b")
    service.shred("b")
    core.rotate_service("acme", "records")
    newer = service.encrypt(b"newer")
    blobs = [good, foreign, stored, b"junk", gone, newer, good[:-1], stored[:-1] + bytes([stored[-1] ^ 1])]
    expected = [
        b"good",
        DecryptError,
        b"stored",
        FormatError,
        KeyDestroyed,
        b"newer",
        DecryptError,
        DecryptError,
    ]
    outcomes = service.decrypt_many(blobs, errors="return")
    for at, (outcome, wanted) in enumerate(zip(outcomes, expected, strict=True)):
        if isinstance(wanted, bytes):
            assert outcome == wanted
        else:
            assert type(outcome) is wanted
            assert outcome.index == at
    assert refused(lambda: service.decrypt_many(blobs), DecryptError).index == 1
    assert refused(lambda: service.decrypt_many([good, stored, gone]), KeyDestroyed).index == 2


@pytest.fixture
def core(service: ServiceHandle) -> openkcm.Core:
    return service._core  # type: ignore[return-value]


def test_outcomes_of_encrypting(service: ServiceHandle) -> None:
    for subjects in (None, ["a", "b", "c"]):
        outcomes = service.encrypt_many([b"x", "y", bytearray(b"z")], subjects=subjects, errors="return")
        assert service.decrypt(outcomes[0]) == b"x"
        assert (type(outcomes[1]), outcomes[1].index) == (InvalidInput, 1)
        assert service.decrypt(outcomes[2]) == b"z"


def test_another_services_envelope_looks_like_a_wrong_key(tmp_path: Path) -> None:
    with make_vault(tmp_path, "acme", "globex") as core, openkcm.Gateway(core) as gateway:
        one, two = gateway.service("acme", "records"), gateway.service("globex", "records")
        blob = one.encrypt(b"x")
        errors = [refused(lambda: two.decrypt(blob), DecryptError)]
        errors.append(refused(lambda: one.decrypt(blob, context=b"?"), DecryptError))
        assert str(errors[0]) == str(errors[1])
        assert refused(lambda: two.decrypt_many([two.encrypt(b"y"), blob]), DecryptError).index == 1
        refused(lambda: two.rewrap_many([blob]), DecryptError)


# ---- policies and pools -------------------------------------------------------------------------------


def keys_of(blobs: list[bytes]) -> list[int]:
    """The data keys of envelopes, numbered in order of appearance."""
    seen: dict[bytes, int] = {}
    return [seen.setdefault(parse(blob).data_key, len(seen)) for blob in blobs]


def test_a_key_serves_so_many_records(core: openkcm.Core) -> None:
    handle = other(core, policy=DataKeyPolicy(records=3))
    blobs = handle.encrypt_many([b"x"] * 7) + [handle.encrypt(b"y") for _ in range(3)]
    assert keys_of(blobs) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert handle.decrypt_many(blobs) == [b"x"] * 7 + [b"y"] * 3


def test_a_key_serves_so_many_bytes(core: openkcm.Core) -> None:
    handle = other(core, policy=DataKeyPolicy(records=100, bytes=10))
    blobs = handle.encrypt_many([b"1234", b"1234", b"123", b"x" * 50, b"1", b"2"])
    assert keys_of(blobs) == [0, 0, 1, 2, 3, 3]
    assert handle.decrypt_many(blobs)[3] == b"x" * 50


def test_a_key_serves_so_many_seconds_on_both_clocks(
    core: openkcm.Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = other(core, policy=DataKeyPolicy(records=100, seconds=60))
    clocks = {"monotonic": 1000.0, "time": 5000.0}
    monkeypatch.setattr("openkcm.gateway.pool.time.monotonic", lambda: clocks["monotonic"])
    monkeypatch.setattr("openkcm.gateway.pool.time.time", lambda: clocks["time"])
    blobs = [handle.encrypt(b"x"), handle.encrypt(b"x")]
    clocks["monotonic"] += 61
    blobs.append(handle.encrypt(b"x"))
    clocks["time"] += 61  # a machine that slept: only the wall clock moved
    blobs.append(handle.encrypt(b"x"))
    assert keys_of(blobs) == [0, 0, 1, 2]


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataKeyPolicy(records=0),
        lambda: DataKeyPolicy(records=2**32 + 1),
        lambda: DataKeyPolicy(bytes=0),
        lambda: DataKeyPolicy(seconds=0),
        lambda: DataKeyPolicy(seconds=float("nan")),
        lambda: PoolPolicy(keys=-1),
        lambda: PoolPolicy(keys=16_385),
        lambda: PoolPolicy(seconds=0),
    ],
)
def test_policies_are_checked(make: Callable[[], object]) -> None:
    refused(make, InvalidInput)


def test_a_warm_pool_asks_nobody(core: openkcm.Core, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = other(core, pool=PoolPolicy(keys=8))
    blobs = [handle.encrypt(b"x")]
    calls = []
    wrap = core.wrap_keys
    monkeypatch.setattr(core, "wrap_keys", lambda *arguments: calls.append(1) or wrap(*arguments))
    blobs += [handle.encrypt(b"x") for _ in range(7)]
    assert calls == []
    blobs += [handle.encrypt(b"x") for _ in range(9)]
    assert len(calls) == 2
    assert len(set(keys_of(blobs))) == 17
    assert handle.decrypt_many(blobs) == [b"x"] * 17


def test_a_pool_of_none(core: openkcm.Core) -> None:
    handle = other(core, pool=PoolPolicy(keys=0))
    blobs = [handle.encrypt(b"x") for _ in range(5)]
    assert len(set(keys_of(blobs))) == 5
    assert handle._pool.ready is None


def test_waiting_keys_expire(core: openkcm.Core, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = other(core, pool=PoolPolicy(seconds=10))
    handle.encrypt(b"x")
    ready = handle._pool.ready
    assert ready is not None
    ready.expires = 0.0
    handle.encrypt(b"x")
    assert handle._pool.ready is not ready


# ---- kill, rotate, close ------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [DataKeyPolicy(), DataKeyPolicy(records=1000)])
def test_a_kill_wipes_what_waits(core: openkcm.Core, policy: DataKeyPolicy) -> None:
    handle = other(core, policy=policy)
    blob, stored = handle.encrypt(b"x"), handle.encrypt(b"y", subject="s")
    ready, current = handle._pool.ready, handle._shared._current
    core.kill("acme")
    assert ready is not None
    assert ready.keys.wiped
    assert current is None or current.keys.wiped
    for call in (
        lambda: handle.encrypt(b"x"),
        lambda: handle.encrypt(b"x", subject="s"),
        lambda: handle.encrypt_many([b"x"]),
        lambda: handle.decrypt(blob),
        lambda: handle.decrypt(stored),
        lambda: handle.rewrap_many([blob]),
    ):
        refused(call, TenantDark)
    core.restore("acme")
    assert handle.decrypt_many([blob, stored]) == [b"x", b"y"]
    assert handle.decrypt(handle.encrypt(b"z")) == b"z"


def test_a_refill_that_a_kill_overtakes_is_thrown_away(
    core: openkcm.Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = other(core)
    wrap = core.wrap_keys

    def kill_after(*arguments: object) -> object:
        wrapped = wrap(*arguments)
        core.kill("acme")
        return wrapped

    monkeypatch.setattr(core, "wrap_keys", kill_after)
    monkeypatch.setattr(
        core,
        "wrap_keys",
        lambda *arguments: (monkeypatch.setattr(core, "wrap_keys", wrap), kill_after(*arguments))[1],
    )
    refused(lambda: handle.encrypt(b"x"), TenantDark)
    assert handle._pool.ready is None


def test_rotation_renews_what_waits(core: openkcm.Core) -> None:
    handle = other(core)
    old = handle.encrypt(b"x")
    core.rotate_service("acme", "records")
    new = handle.encrypt(b"y")
    assert [parse(blob).version for blob in (old, new)] == [1, 2]
    assert handle.decrypt_many([old, new]) == [b"x", b"y"]


def test_rewrapping_touches_no_data(core: openkcm.Core, service: ServiceHandle) -> None:
    blobs = [
        *service.encrypt_many([b"a", b"b"]),
        service.encrypt(b"c", subject="s"),
        bytearray(service.encrypt(b"d")),
    ]
    core.rotate_service("acme", "records")
    moved = service.rewrap_many(blobs)
    assert [parse(blob).version for blob in moved] == [2, 2, 0, 2]
    assert [blob[96:] for blob in moved] == [bytes(blob[96:]) for blob in blobs]
    assert moved[2] == blobs[2]
    assert service._subjects._store.scan(service.service_id, b"", 10)[0].version == 2
    assert service.decrypt_many(moved) == [b"a", b"b", b"c", b"d"]
    altered = blobs[1][:30] + bytes([blobs[1][30] ^ 1]) + blobs[1][31:]
    outcomes = service.rewrap_many([blobs[0], b"junk", altered], errors="return")
    assert [type(outcome) for outcome in outcomes] == [bytes, FormatError, DecryptError]
    assert refused(lambda: service.rewrap_many([blobs[0], b"junk"]), FormatError).index == 1


def test_rewrapping_all_subjects(core: openkcm.Core, service: ServiceHandle) -> None:
    blobs = service.encrypt_many([b"x"] * 50, subjects=[f"s{at}" for at in range(50)])
    core.rotate_service("acme", "records")
    service.encrypt(b"y", subject="s3")
    late = service.encrypt(b"z", subject="late")
    assert service.rewrap_subjects() == 50
    assert service.rewrap_subjects() == 0
    assert service.decrypt_many([*blobs, late]) == [b"x"] * 50 + [b"z"]


def test_subjects_under_several_versions(core: openkcm.Core, service: ServiceHandle) -> None:
    old = service.encrypt_many([b"a", b"b"], subjects=["a", "b"])
    core.rotate_service("acme", "records")
    new = service.encrypt_many([b"c", b"d"], subjects=["c", "d"])
    assert service.decrypt_many(old + new) == [b"a", b"b", b"c", b"d"]
    more = service.encrypt_many([b"1", b"2", b"3"], subjects=["a", "c", "b"])
    assert service.decrypt_many(more + old) == [b"1", b"2", b"3", b"a", b"b"]


def test_a_closed_gateway(core: openkcm.Core) -> None:
    gateway = openkcm.Gateway(core)
    handle = gateway.service("acme", "records")
    handle.encrypt(b"x")
    ready = handle._pool.ready
    gateway.close()
    gateway.close()
    assert ready is not None
    assert ready.keys.wiped
    refused(lambda: gateway.service("acme", "records"), CoreUnavailable)
    refused(lambda: handle.encrypt(b"x", subject="s"), StoreUnavailable)


def test_handles_are_shared_and_say_what_they_are(core: openkcm.Core) -> None:
    with openkcm.Gateway(core) as gateway:
        assert gateway.service("acme", "records") is gateway.service("acme", "records")
        assert "acme/records" in repr(gateway.service("acme", "records"))
        refused(lambda: gateway.service("acme", "nothing"), openkcm.ServiceNotFound)
        refused(lambda: gateway.service("nobody", "x"), openkcm.TenantNotFound)


# ---- subjects -----------------------------------------------------------------------------------------


def test_shredding_forgets_one_person(service: ServiceHandle) -> None:
    ours, theirs = service.encrypt(b"x", subject="a"), service.encrypt(b"y", subject="b")
    assert service.shred("a") is True
    assert service.shred("a") is False
    assert service.shred("never") is False
    refused(lambda: service.decrypt(ours), KeyDestroyed)
    assert service.decrypt(theirs) == b"y"
    again = service.encrypt(b"new", subject="a")
    assert service.decrypt(again) == b"new"
    refused(lambda: service.decrypt(ours), KeyDestroyed)


def test_a_restored_key_store_resurrects_nobody(tmp_path: Path) -> None:
    with make_vault(tmp_path) as core:
        with openkcm.Gateway(core) as gateway:
            handle = gateway.service("acme", "records")
            blob, other_blob = handle.encrypt(b"x", subject="a"), handle.encrypt(b"y", subject="b")
        yesterday = (tmp_path / "vault.keys.db").read_bytes()
        with openkcm.Gateway(core) as gateway:
            gateway.service("acme", "records").shred("a")
        for path in tmp_path.glob("vault.keys.db*"):
            path.unlink()
        (tmp_path / "vault.keys.db").write_bytes(yesterday)
        with openkcm.Gateway(core) as gateway:
            handle = gateway.service("acme", "records")
            refused(lambda: handle.decrypt(blob), KeyDestroyed)
            assert handle.decrypt(other_blob) == b"y"
            fresh = handle.encrypt(b"z", subject="a")
            assert handle.decrypt(fresh) == b"z"
            assert parse(fresh).data_key != parse(blob).data_key
            assert handle._subjects._store.count(handle.service_id) == 2


@pytest.mark.parametrize("subject", [["a"], {"a": 1}, b"a", 7])
def test_a_subject_that_is_no_text_is_refused(service: ServiceHandle, subject: Any) -> None:
    service.encrypt(b"x", subject="a")
    refused(lambda: service.encrypt(b"x", subject=subject), InvalidInput)
    refused(lambda: service.encrypt_many([b"x", b"y"], subjects=["a", subject]), InvalidInput)


def test_a_shredded_name_is_not_kept_and_kept_ones_are_few(
    service: ServiceHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openkcm.gateway.subjects.CACHED", 10)
    keys = service._subjects
    blob = service.encrypt(b"x", subject="a")
    assert list(keys._hashes) == ["a"]
    service.shred("a")
    assert not keys._hashes
    for number in range(25):
        service.encrypt(b"x", subject=f"user-{number}")
        assert len(keys._hashes) <= 11
    refused(lambda: service.decrypt(blob), KeyDestroyed)


class Overtaken(str):
    """A subject's name; each time that it is looked up somebody else does something first."""

    meanwhile: Callable[[], object]
    __slots__ = ("meanwhile",)

    def __hash__(self) -> int:
        self.meanwhile()
        return super().__hash__()


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("what", ["a kill", "a shred elsewhere", "a crowd"])
def test_names_that_are_forgotten_while_they_are_hashed(
    service: ServiceHandle, monkeypatch: pytest.MonkeyPatch, what: str, known: bool
) -> None:
    """As another thread does at any point between two look-ups."""
    monkeypatch.setattr("openkcm.gateway.subjects.CACHED", 10)
    keys, crowd = service._subjects, [f"user-{number}" for number in range(11)]
    meanwhile = {
        "a kill": keys.forget,
        "a shred elsewhere": lambda: keys.forget([b"0" * 16]),
        "a crowd": lambda: (keys._hash_all(crowd), keys._hash_all(crowd[:1])),
    }[what]
    names = [Overtaken(name) for name in "abc"]
    for name in names:
        name.meanwhile = meanwhile
    if known:
        service.encrypt_many([b"x"] * 3, subjects=list("abc"))
    blobs = service.encrypt_many([b"1", b"2", b"3", b"4"], subjects=[*names, names[0]])
    assert service.decrypt_many(blobs) == [b"1", b"2", b"3", b"4"]
    assert service.shred("a")
    refused(lambda: service.decrypt(blobs[3]), KeyDestroyed)
    assert service.decrypt(blobs[1]) == b"2"


def test_another_gateway_shreds(core: openkcm.Core, tmp_path: Path) -> None:
    """A Gateway that still has the wrapped key cached neither decrypts nor encrypts under it."""
    with openkcm.Core.open(url(tmp_path)) as second:
        here, there = other(core), other(second)
        blob = here.encrypt(b"x", subject="a")
        assert there.decrypt(blob) == b"x"
        here.shred("a")
        refused(lambda: there.decrypt(blob), KeyDestroyed)
        fresh = there.encrypt(b"y", subject="a")
        assert here.decrypt(fresh) == b"y"
        assert parse(fresh).data_key != parse(blob).data_key


def test_two_gateways_make_one_key_for_a_subject(core: openkcm.Core, tmp_path: Path) -> None:
    with openkcm.Core.open(url(tmp_path)) as second:
        handles = [other(core), other(second)]
        blobs: list[bytes] = []
        barrier = threading.Barrier(2)

        def work(handle: ServiceHandle) -> None:
            for number in range(30):
                barrier.wait(30)
                blobs.append(handle.encrypt(b"%d" % number, subject=f"s{number}"))

        threads = [threading.Thread(target=work, args=(handle,)) for handle in handles]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(blobs) == 60
        assert len({parse(blob).data_key for blob in blobs}) == 30
        for handle in handles:
            assert sorted(handle.decrypt_many(blobs)) == sorted(b"%d" % (at % 30) for at in range(60))


@pytest.mark.parametrize("times", [1, 20])
def test_a_subject_shredded_while_it_is_encrypted_for_gets_another_key(
    service: ServiceHandle, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    """Somebody shreds between finding a key and opening it; encrypting is never told that a key is destroyed."""
    keys, left = service._subjects, [times]
    unwrap = keys._unwrap

    def shred_first(*arguments: Any) -> Any:
        if left[0]:
            left[0] -= 1
            assert service.shred("a")
        return unwrap(*arguments)

    monkeypatch.setattr(keys, "_unwrap", shred_first)
    blob = service.encrypt(b"x", subject="a")
    assert left == [0]
    assert service.decrypt(blob) == b"x"


def test_a_lost_key_row_is_not_a_shredded_one(service: ServiceHandle) -> None:
    blob = service.encrypt(b"x", subject="a")
    service._subjects._store.remove(service.service_id, [parse(blob).data_key])
    service._subjects.forget()
    assert "key store" in str(refused(lambda: service.decrypt(blob), DecryptError))


def test_the_key_store_knows_no_names(service: ServiceHandle, tmp_path: Path) -> None:
    service.encrypt(b"x", subject="very-recognisable-name")
    files = b"".join(path.read_bytes() for path in tmp_path.glob("vault.*"))
    assert files
    assert b"recognisable" not in files


def test_caches_are_bounded(service: ServiceHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openkcm.gateway.subjects.CACHED", 100)
    for start in range(0, 1000, 50):
        blobs = service.encrypt_many([b"x"] * 50, subjects=[f"s{at}" for at in range(start, start + 50)])
        assert len(service._subjects._by_id) <= 100
        assert len(service._subjects._by_subject) <= 100
    assert service.decrypt_many(blobs) == [b"x"] * 50


# ---- the key store's troubles -------------------------------------------------------------------------


def test_a_key_store_of_ones_own(core: openkcm.Core, tmp_path: Path) -> None:
    handle = other(core, keys=tmp_path / "mine.db")
    assert handle.decrypt(handle.encrypt(b"x", subject="a")) == b"x"
    refused(lambda: openkcm.Gateway(core, keys=tmp_path / "no" / "where.db"), StoreUnavailable)
    (tmp_path / "junk.db").write_bytes(b"junk, and more junk than a header" * 100)
    assert not refused(lambda: openkcm.Gateway(core, keys=tmp_path / "junk.db"), StoreUnavailable).retryable


def test_a_locked_key_store(service: ServiceHandle, tmp_path: Path) -> None:
    blob = service.encrypt(b"x", subject="a")
    service._subjects._store._connection.execute("PRAGMA busy_timeout = 50")
    blocker = sqlite3.connect(tmp_path / "vault.keys.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    assert refused(lambda: service.encrypt(b"x", subject="b"), StoreUnavailable).retryable
    assert service.decrypt(blob) == b"x"
    assert service.decrypt(service.encrypt(b"inline")) == b"inline"
    blocker.execute("ROLLBACK")
    blocker.close()
    assert service.decrypt(service.encrypt(b"y", subject="b")) == b"y"


# ---- anything goes, and it still decrypts -------------------------------------------------------------


STEPS = st.lists(
    st.sampled_from(
        ["inline", "stored", "many", "rotate", "tenant", "rewrap", "subjects", "restart", "kill", "shred"]
    ),
    max_size=14,
)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=STEPS)
def test_whatever_was_encrypted_decrypts(  # noqa: C901
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("steps")
    core = make_vault(folder)
    handle = other(core)
    kept: dict[int, tuple[bytes, bytes, str | None]] = {}
    for number, step in enumerate(steps):
        data = b"%d" % number
        if step == "inline":
            kept[number] = (handle.encrypt(data), data, None)
        elif step == "stored":
            kept[number] = (handle.encrypt(data, subject=f"s{number % 3}"), data, f"s{number % 3}")
        elif step == "many":
            kept[number] = (handle.encrypt_many([data] * 3)[1], data, None)
        elif step == "rotate":
            core.rotate_service("acme", "records")
        elif step == "tenant":
            core.rotate_tenant("acme")
        elif step == "rewrap" and kept:
            for at, blob in zip(kept, handle.rewrap_many([each[0] for each in kept.values()]), strict=True):
                kept[at] = (blob, *kept[at][1:])
        elif step == "subjects":
            handle.rewrap_subjects()
        elif step == "kill":
            core.kill("acme")
            core.restore("acme")
        elif step == "shred":
            handle.shred("s1")
            for at in [at for at, each in kept.items() if each[2] == "s1"]:
                refused(partial(handle.decrypt, kept[at][0]), KeyDestroyed)
                del kept[at]
        elif step == "restart":
            core.close()
            core = openkcm.Core.open(url(folder))
            handle = other(core)
        assert handle.decrypt_many([each[0] for each in kept.values()]) == [each[1] for each in kept.values()]
    core.close()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    blob=st.one_of(st.binary(max_size=300), st.binary(max_size=300).map(lambda rest: b"OKC\x01\x01" + rest))
)
def test_garbage_is_refused_in_one_of_two_ways(service: ServiceHandle, blob: bytes) -> None:
    with pytest.raises((FormatError, DecryptError)):
        service.decrypt(blob)
    (outcome,) = service.decrypt_many([blob], errors="return")
    assert type(outcome) in (FormatError, DecryptError)


def test_errors_are_of_the_family() -> None:
    assert all(
        issubclass(getattr(openkcm, name), OpenKCMError)
        for name in ("DecryptError", "TenantDark", "InvalidInput")
    )
    assert Kind.STORED.stored
    assert crypto.backend_info()["backend"] in ("fast", "python")


# ---- one bad item among many, beside its data ----------------------------------------------------------


@pytest.mark.parametrize("bad", ["", 7, "x" * 2000])
def test_one_bad_subject(service: ServiceHandle, bad: object) -> None:
    subjects: list[Any] = ["a", "b", bad, "c"]
    with pytest.raises((InvalidInput, LimitExceeded)) as caught:
        service.encrypt_many([b"x"] * 4, subjects=subjects)
    assert caught.value.index == 2
    outcomes = service.encrypt_many([b"x"] * 4, subjects=subjects, errors="return")
    assert isinstance(outcomes[2], (InvalidInput, LimitExceeded))
    assert outcomes[2].index == 2
    assert [service.decrypt(outcomes[at]) for at in (0, 1, 3)] == [b"x"] * 3


def test_one_bad_context(service: ServiceHandle) -> None:
    contexts: list[Any] = [{"a": "b"}, None, {"a": 7}, b"raw"]
    assert refused(lambda: service.encrypt_many([b"x"] * 4, contexts=contexts), InvalidInput).index == 2  # type: ignore[attr-defined]
    outcomes = service.encrypt_many([b"x"] * 4, contexts=contexts, errors="return")
    assert type(outcomes[2]) is InvalidInput
    for at in (0, 1, 3):
        assert service.decrypt(outcomes[at], context=contexts[at]) == b"x"


def test_what_is_no_subject_at_all(service: ServiceHandle) -> None:
    refused(lambda: service.encrypt_many([b"x"] * 2, subjects=[["x"], "y"]), InvalidInput)  # type: ignore[list-item]


@pytest.mark.parametrize(
    "wrong", [{"records": "x"}, {"records": None}, {"bytes": "x"}, {"bytes": 1.5}, {"seconds": "x"}]
)
def test_policies_are_of_numbers(wrong: dict[str, Any]) -> None:
    refused(lambda: DataKeyPolicy(**wrong), InvalidInput)


@pytest.mark.parametrize("wrong", [{"keys": "x"}, {"keys": None}, {"seconds": None}, {"seconds": "x"}])
def test_pool_policies_are_of_numbers(wrong: dict[str, Any]) -> None:
    refused(lambda: PoolPolicy(**wrong), InvalidInput)


def test_a_policy_that_counts_bytes_fills_each_key(core: openkcm.Core) -> None:
    """Each data key takes what fits, whatever lies before it in the batch."""
    handle = other(core, policy=DataKeyPolicy(records=1000, bytes=1000))
    sizes = [400, 400, 400, 999, 1, 1, 2000, 10, 600, 300, 90, 5]
    blobs = handle.encrypt_many([bytes(size) for size in sizes])
    keys = [parse(blob).data_key for blob in blobs]
    runs = [[sizes[at] for at, each in enumerate(keys) if each == key] for key in dict.fromkeys(keys)]
    assert runs == [[400, 400], [400], [999, 1], [1], [2000], [10, 600, 300, 90], [5]]
