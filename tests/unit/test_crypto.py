# SPDX-License-Identifier: Apache-2.0
"""The cryptographic interface, on whichever backend is picked."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import pickle
import threading
import time
from array import array
from pathlib import Path

import pytest

from openkcm import crypto
from openkcm.crypto import pure
from openkcm.errors import DecryptError, InvalidInput, LimitExceeded, SecretMemoryError
from openkcm.limits import KEY_ID_BYTES, MAX_KEYS_PER_CALL, WRAPPED_KEY_BYTES
from support import refused, run_python

HEAD = b"h" * 20


def cipher(middle: int = 72, bound: bool = False) -> crypto.RecordCipher:
    return crypto.RecordCipher(HEAD, middle, bound, b"a" * 18)


def known(count: int = 4) -> list[bytes]:
    return [bytes([number + 1]) * 32 for number in range(count)]


# ---- keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: crypto.generate_keys(3), crypto.generate_wrapping_key])
def test_handles_do_not_leave_the_process(make: object) -> None:
    key = make()  # type: ignore[operator]
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        refused(lambda leave=leave: leave(key), TypeError)
    assert "wiped" not in repr(key)
    key.wipe()
    key.wipe()
    assert key.wiped
    assert "wiped" in repr(key)


def test_wiped_keys_are_refused() -> None:
    parent, keys = crypto.generate_wrapping_key(), crypto.generate_keys(2)
    wrapped = crypto.wrap_many(parent, keys, b"aad")
    keys.wipe()
    refused(lambda: crypto.wrap_many(parent, keys, b"aad"), SecretMemoryError)
    refused(lambda: keys.select([0]), SecretMemoryError)
    refused(lambda: cipher().seal_many(keys, None, 1, bytes(144), b"", [b"a", b"b"]), SecretMemoryError)
    parent.wipe()
    refused(lambda: crypto.unwrap_many(parent, wrapped, b"aad"), SecretMemoryError)


def test_wiping_waits_for_the_uses_in_flight() -> None:
    """Of the Python backend's keys, whichever backend is picked: the native one's are tried by threads elsewhere."""
    keys = pure.import_keys(bytes([7]) * 32)
    wiping = threading.Thread(target=keys.wipe)
    with keys as first:
        with keys:
            wiping.start()
            while not keys.wiped:
                time.sleep(0)
            refused(keys.__enter__, SecretMemoryError)
        wiping.join(0.05)
        assert wiping.is_alive()
        assert bytes(first) == bytes([7]) * 32
    wiping.join(10)
    assert not wiping.is_alive()
    refused(lambda: bytes(first), ValueError)  # the view is gone with the key


def test_counts_are_bounded() -> None:
    for count in (0, -1, MAX_KEYS_PER_CALL + 1):
        refused(lambda count=count: crypto.generate_keys(count), LimitExceeded)
    refused(lambda: crypto.import_keys(b"x" * 31), InvalidInput)
    refused(lambda: crypto.import_keys(b""), InvalidInput)
    refused(lambda: crypto.import_wrapping_key(b"x" * 33), InvalidInput)
    assert len(crypto.generate_keys(MAX_KEYS_PER_CALL)) == MAX_KEYS_PER_CALL


@pytest.mark.parametrize("size", [0, 1, 64, 500, 2048, 2049, 100_000])
def test_a_kept_key_opens_what_the_key_does(size: int) -> None:
    """Also more than once, and after the keys it was copied from are gone; not once it is wiped."""
    keys = crypto.import_keys(b"".join(known(2)))
    record = os.urandom(size)
    blob = cipher().seal_one(keys, 1, 1, bytes(144), b"context", record)
    kept = keys.keep(1)
    refused(lambda: keys.keep(2), InvalidInput)
    keys.wipe()
    for _ in range(3):
        assert cipher().open_one(kept, 0, b"context", blob) == record
        assert cipher().open_one(kept, 0, b"another", blob) is None
        assert cipher().open_one(kept, 0, b"context", blob[:-1] + bytes([blob[-1] ^ 1])) is None
    refused(lambda: cipher().open_one(kept, 1, b"context", blob), InvalidInput)
    kept.wipe()
    refused(lambda: cipher().open_one(kept, 0, b"context", blob), SecretMemoryError)


def test_select_copies_in_order() -> None:
    keys = crypto.import_keys(b"".join(known()))
    parent = crypto.generate_wrapping_key()
    chosen = keys.select([2, 0])
    keys.wipe()
    sealed = cipher(0).seal_many(chosen, None, 1, b"", b"", [b"x", b"y"])
    assert cipher(0).open_one(crypto.import_keys(known()[2]), 0, b"", sealed[0]) == b"x"
    assert cipher(0).open_one(crypto.import_keys(known()[0]), 0, b"", sealed[1]) == b"y"
    refused(lambda: chosen.select([2]), InvalidInput)
    assert crypto.wrap_many(parent, chosen, b"")


def test_a_key_goes_between_file_and_secret_memory(tmp_path: Path) -> None:
    key = crypto.generate_wrapping_key()
    path = tmp_path / "key"
    with path.open("wb") as file:
        crypto.write_wrapping_key(key, file.fileno())
    assert path.stat().st_size == 32
    with path.open("rb") as file:
        again = crypto.read_wrapping_key(file.fileno())
    wrapped = crypto.wrap_many(key, crypto.generate_keys(1), b"")
    assert crypto.unwrap_many(again, wrapped, b"")[1] == []
    path.write_bytes(b"x" * 31)
    with path.open("rb") as file:
        refused(lambda: crypto.read_wrapping_key(file.fileno()), InvalidInput)


def test_random_bytes() -> None:
    assert len(crypto.random_bytes(100)) == 100
    assert crypto.random_bytes(0) == b""
    assert crypto.random_bytes(32) != crypto.random_bytes(32)
    refused(lambda: crypto.random_bytes(-1), LimitExceeded)


def test_memory_is_given_back() -> None:
    gc.collect()
    before = crypto.secret_memory_info()["handles"]
    keys = [crypto.generate_keys(1) for _ in range(5_000)]
    assert crypto.secret_memory_info()["handles"] == before + 5_000
    del keys
    gc.collect()
    info = crypto.secret_memory_info()
    assert info["handles"] == before
    assert info["idle_bytes"] <= 1024 * 1024


def test_exit_is_clean_with_keys_alive() -> None:
    done = run_python(
        "from openkcm import crypto\nkeys = crypto.generate_keys(9)\nkey = crypto.generate_wrapping_key()\n"
        "cycle = [keys]\ncycle.append(cycle)"
    )
    assert (done.stdout, done.stderr) == ("", "")


# ---- wrapping -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 1000])
@pytest.mark.parametrize("with_ids", [False, True])
def test_wrap_and_unwrap(count: int, with_ids: bool) -> None:
    parent, keys = crypto.generate_wrapping_key(), crypto.generate_keys(count)
    ids = os.urandom(count * KEY_ID_BYTES) if with_ids else b""
    wrapped = crypto.wrap_many(parent, keys, b"aad", ids)
    assert len(wrapped) == count * WRAPPED_KEY_BYTES
    opened, failed = crypto.unwrap_many(parent, wrapped, b"aad", ids)
    assert failed == []
    sealed = cipher(0).seal_many(keys, None, 1, b"", b"", [b"r"] * count)
    assert cipher(0).open_many(opened, None, b"", sealed, False) == ([b"r"] * count, [])


def test_each_wrapped_key_is_plain_xaes() -> None:
    secret = os.urandom(32)
    parent, keys = crypto.import_wrapping_key(secret), crypto.import_keys(b"".join(known()))
    wrapped = crypto.wrap_many(parent, keys, b"aad")
    blobs = [wrapped[at : at + 72] for at in range(0, len(wrapped), 72)]
    assert [crypto._xaes_open(secret, blob[:24], b"aad", blob[24:]) for blob in blobs] == known()
    # One batch shares the subkey's half of the nonce; the other half never repeats.
    assert len({blob[:12] for blob in blobs}) == 1
    assert len({blob[12:24] for blob in blobs}) == len(blobs)
    again = crypto.wrap_many(parent, keys, b"aad")
    assert again[:12] != wrapped[:12]


def test_counting_nonces_wraps_around() -> None:
    # The start is random, so a carry through every byte cannot be asked for; the order of a batch shows the counting.
    wrapped = crypto.wrap_many(crypto.generate_wrapping_key(), crypto.generate_keys(600), b"")
    counters = [int.from_bytes(wrapped[at + 12 : at + 24], "big") for at in range(0, len(wrapped), 72)]
    assert [(b - a) % (1 << 96) for a, b in itertools.pairwise(counters)] == [1] * 599


def test_unwrap_names_what_does_not_open() -> None:
    parent, keys = crypto.generate_wrapping_key(), crypto.generate_keys(5)
    wrapped = bytearray(crypto.wrap_many(parent, keys, b"aad"))
    wrapped[72 * 1 + 30] ^= 1
    wrapped[72 * 3] ^= 1
    opened, failed = crypto.unwrap_many(parent, bytes(wrapped), b"aad")
    assert failed == [1, 3]
    sealed = cipher(0).seal_many(keys, None, 1, b"", b"", [b"r"] * 5)
    assert cipher(0).open_many(opened, None, b"", sealed, True) == ([b"r", None, b"r", None, b"r"], [1, 3])
    moved, failed = crypto.rewrap_many(parent, crypto.generate_wrapping_key(), bytes(wrapped), b"aad", b"new")
    assert failed == [1, 3]
    assert moved[72:144] == bytes(72)


@pytest.mark.parametrize("change", ["aad", "ids", "parent", "swapped ids"])
def test_wrong_binding_opens_nothing(change: str) -> None:
    parent, keys = crypto.generate_wrapping_key(), crypto.generate_keys(2)
    ids = os.urandom(32)
    wrapped = crypto.wrap_many(parent, keys, b"aad", ids)
    aad = b"AAD" if change == "aad" else b"aad"
    wrong = {"ids": os.urandom(32), "swapped ids": ids[16:] + ids[:16]}.get(change, ids)
    key = crypto.generate_wrapping_key() if change == "parent" else parent
    assert crypto.unwrap_many(key, wrapped, aad, wrong)[1] == [0, 1]


def test_wrapping_keys_wrap_each_other() -> None:
    parent, child = crypto.generate_wrapping_key(), crypto.generate_wrapping_key()
    wrapped = crypto.wrap_key(parent, child, b"aad")
    opened = crypto.unwrap_key(parent, wrapped, b"aad")
    blob = crypto.wrap_many(child, crypto.generate_keys(1), b"")
    assert crypto.unwrap_many(opened, blob, b"")[1] == []
    for wrong in (wrapped[:-1], wrapped + b"x", b"", bytes(72), wrapped[:-1] + bytes([wrapped[-1] ^ 1])):
        refused(lambda wrong=wrong: crypto.unwrap_key(parent, wrong, b"aad"), DecryptError)
    refused(lambda: crypto.unwrap_key(parent, wrapped, b"other"), DecryptError)


def test_lengths_of_packed_keys_are_checked() -> None:
    parent, keys = crypto.generate_wrapping_key(), crypto.generate_keys(2)
    refused(lambda: crypto.wrap_many(parent, keys, b"", b"x" * 16), InvalidInput)
    refused(lambda: crypto.unwrap_many(parent, bytes(71), b""), InvalidInput)
    refused(lambda: crypto.unwrap_many(parent, b"", b""), InvalidInput)
    refused(lambda: crypto.unwrap_many(parent, bytes(144), b"", b"x" * 16), InvalidInput)


# ---- records ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 64, 2047, 2048, 2049, 16384, 70_000, 3_000_000])
def test_one_record_of_any_size(size: int) -> None:
    keys, record = crypto.generate_keys(2), os.urandom(size)
    sealed = cipher().seal_one(keys, 1, 7, b"m" * 144, b"ctx", record)
    assert len(sealed) == 20 + 4 + 72 + 12 + 32 + size + 16
    assert sealed[:96] == HEAD + (7).to_bytes(4, "big") + b"m" * 72
    assert cipher().open_one(keys, 1, b"ctx", sealed) == record
    assert cipher().open_one(keys, 0, b"ctx", sealed) is None
    assert cipher().open_one(keys, 1, b"CTX", sealed) is None
    assert cipher().open_many(keys, array("I", [1]), b"ctx", [sealed], False) == ([record], [])


def test_the_payload_is_plain_gcm_with_a_commitment() -> None:
    key = os.urandom(32)
    sealed = cipher(16, bound=True).seal_one(crypto.import_keys(key), 0, 0, b"i" * 16, b"ctx", b"record")
    nonce, ciphertext = sealed[40:52], sealed[52:]
    opened = crypto._gcm_open(key, nonce, b"a" * 18 + b"i" * 16 + b"ctx", ciphertext)
    assert opened == bytes(32) + b"record"


def test_a_wrong_commitment_is_refused_though_the_tag_is_right() -> None:
    key, nonce = os.urandom(32), os.urandom(12)
    for at in (0, 31):
        padding = bytearray(32)
        padding[at] = 1
        for size in (10, 5000):
            forged = crypto._gcm_seal(key, nonce, b"a" * 18, bytes(padding) + b"x" * size)
            blob = HEAD + bytes(4) + nonce + forged
            assert cipher(0).open_one(crypto.import_keys(key), 0, b"", blob) is None
            assert cipher(0).open_many(crypto.import_keys(key), None, b"", [blob], True) == ([None], [0])


def test_long_contexts_and_many_updates_agree() -> None:
    key = crypto.generate_keys(1)
    for size in (0, 1, 400, 493, 494, 495, 600, 65_000):
        sealed = cipher(16, bound=True).seal_one(key, 0, 0, b"i" * 16, b"c" * size, b"r")
        assert cipher(16, bound=True).open_one(key, 0, b"c" * size, sealed) == b"r"
        assert cipher(16, bound=True).open_one(key, 0, b"c" * size + b"c", sealed) is None


@pytest.mark.parametrize("count", [1, 3, 15, 16, 17, 64, 65, 3000])
def test_batches(count: int) -> None:
    keys = crypto.generate_keys(count)
    records = [os.urandom(at % 100) for at in range(count)]
    contexts = [b"%d" % at for at in range(count)]
    middles = os.urandom(72 * count)
    sealed = cipher().seal_many(keys, None, 1, middles, contexts, records)
    assert cipher().open_many(keys, None, contexts, sealed, False) == (records, [])
    assert cipher().gather(sealed) == (1, middles, None)
    assert len({blob[96:108] for blob in sealed}) == count
    shared = crypto.generate_keys(1)
    sealed = cipher().seal_many(shared, None, 1, b"m" * 72, b"", records)
    assert cipher().open_many(shared, None, b"", sealed, True) == (records, [])
    assert len({blob[96:108] for blob in sealed}) == count


def test_an_index_says_whose_key() -> None:
    keys = crypto.import_keys(b"".join(known(3)))
    index = array("I", [2, 0, 2, 1, 1])
    sealed = cipher(1).seal_many(keys, index, 0, b"abc", b"", [b"%d" % at for at in range(5)])
    assert [blob[24:25] for blob in sealed] == [b"c", b"a", b"c", b"b", b"b"]
    assert cipher(1).open_many(keys, index, b"", sealed, False)[0] == [b"0", b"1", b"2", b"3", b"4"]
    refused(lambda: cipher(1).seal_many(keys, array("I", [3]), 0, b"abc", b"", [b"x"]), InvalidInput)
    refused(lambda: cipher(1).seal_many(keys, array("I", [0, 1]), 0, b"abc", b"", [b"x"]), InvalidInput)
    refused(lambda: cipher(1).seal_many(keys, None, 0, b"abc", b"", [b"x"] * 2), InvalidInput)


def test_records_are_sorted_by_key_and_stand_where_they_stood() -> None:
    """Records of one key are ciphered after each other; neither the results nor the first failure show it."""
    index = array("I", [(at * 7) % 5 for at in range(100)])
    keys, records = crypto.import_keys(b"".join(known(5))), [b"%d" % at for at in range(100)]
    contexts = [b"c%d" % at for at in range(100)]
    sealed = cipher(1).seal_many(keys, index, 1, b"abcde", contexts, records)
    assert [blob[24:25] for blob in sealed] == [b"abcde"[key : key + 1] for key in index]
    assert len({blob[25:37] for blob in sealed}) == 100
    assert cipher(1).open_many(keys, index, contexts, sealed, False) == (records, [])
    for bad in (30, 11, 97):
        sealed[bad] = sealed[bad][:-1] + bytes([sealed[bad][-1] ^ 1])
    assert cipher(1).open_many(keys, index, contexts, sealed, False) == ([], [11])
    opened, failed = cipher(1).open_many(keys, index, contexts, sealed, True)
    assert failed == [11, 30, 97]
    assert opened == [None if at in failed else record for at, record in enumerate(records)]


def test_many_keys_in_any_order() -> None:
    index = array("I", [(at * 7) % 1500 for at in range(3000)])
    keys, records = crypto.generate_keys(1500), [b"%d" % at for at in range(3000)]
    middles = os.urandom(16 * 1500)
    sealed = cipher(16, bound=True).seal_many(keys, index, 1, middles, b"", records)
    assert [blob[24:40] for blob in sealed] == [middles[16 * key : 16 * key + 16] for key in index]
    assert cipher(16, bound=True).open_many(keys, index, b"", sealed, False) == (records, [])
    for at in (0, 1, 1499, 1500, 2999):
        assert cipher(16, bound=True).open_one(keys, index[at], b"", sealed[at]) == records[at]
    assert cipher(16, bound=True).open_one(keys, index[0], b"", sealed[1]) is None


def test_an_empty_batch_is_one() -> None:
    for keys in (crypto.generate_keys(1), crypto.generate_keys(3)):
        assert cipher(0).seal_many(keys, array("I"), 0, b"", b"", []) == []
        assert cipher(0).open_many(keys, array("I"), b"", [], True) == ([], [])
    assert cipher(0).seal_many(crypto.generate_keys(1), None, 0, b"", b"", []) == []
    assert cipher(0).open_many(crypto.generate_keys(1), None, b"", [], False) == ([], [])


def test_one_bad_record_ends_a_batch_or_is_named() -> None:
    keys = crypto.generate_keys(1)
    sealed = cipher(0).seal_many(keys, None, 0, b"", b"", [b"r" * 5000] * 40)
    sealed[3] = sealed[3][:-1] + bytes([sealed[3][-1] ^ 1])
    sealed[30] = sealed[30][:-1] + bytes([sealed[30][-1] ^ 1])
    assert cipher(0).open_many(keys, None, b"", sealed, False) == ([], [3])
    records, failed = cipher(0).open_many(keys, None, b"", sealed, True)
    assert failed == [3, 30]
    assert [at for at, record in enumerate(records) if record is None] == [3, 30]


@pytest.mark.parametrize(
    "record", [bytearray(b"abc"), memoryview(b"abc"), memoryview(b"xabcx")[1:4], array("B", b"abc")]
)
def test_any_bytes_like_record(record: bytes) -> None:
    keys = crypto.generate_keys(1)
    one = cipher(0).seal_one(keys, 0, 0, b"", b"", record)
    many = cipher(0).seal_many(keys, None, 0, b"", b"", [record, record])
    for sealed in (one, *many):
        assert cipher(0).open_one(keys, 0, b"", sealed) == b"abc"
        assert cipher(0).open_many(keys, None, b"", [bytearray(sealed)], False) == ([b"abc"], [])


def test_wider_buffers_count_their_bytes() -> None:
    keys = crypto.generate_keys(1)
    sealed = cipher(0).seal_one(keys, 0, 0, b"", b"", array("I", [1, 2]))
    assert cipher(0).open_one(keys, 0, b"", sealed) == array("I", [1, 2]).tobytes()


@pytest.mark.parametrize("record", ["text", 5, None, [b"x"], memoryview(b"abcd")[::2], object()])
def test_other_records_are_refused_by_position(record: object) -> None:
    keys = crypto.generate_keys(1)
    assert refused(lambda: cipher(0).seal_one(keys, 0, 0, b"", b"", record), InvalidInput).index is None
    error = refused(lambda: cipher(0).seal_many(keys, None, 0, b"", b"", [b"x", record]), InvalidInput)
    assert error.index == 1
    refused(lambda: cipher(0).open_many(keys, None, b"", [record], True), InvalidInput)
    assert cipher(0).gather([record]) is None
    if record == "text":
        assert "encode" in str(error)


def test_consume_zeroes_one_key() -> None:
    keys = crypto.import_keys(b"".join(known(2)))
    sealed = cipher(0).seal_one(keys, 0, 0, b"", b"", b"r", True)
    assert cipher(0).open_one(crypto.import_keys(known(1)[0]), 0, b"", sealed) == b"r"
    assert cipher(0).open_one(keys, 0, b"", sealed) is None
    assert cipher(0).open_one(crypto.import_keys(bytes(32)), 0, b"", sealed) is None
    other = cipher(0).seal_one(keys, 1, 0, b"", b"", b"r")
    assert cipher(0).open_one(crypto.import_keys(known(2)[1]), 0, b"", other) == b"r"


def test_gather_wants_one_layout() -> None:
    keys = crypto.generate_keys(1)
    good = cipher().seal_one(keys, 0, 9, b"m" * 72, b"", b"r")
    assert cipher().gather([good, good]) == (9, b"m" * 144, None)
    assert cipher().gather([good, good], True) == (9, b"m" * 72, None)
    other = cipher().seal_one(keys, 0, 9, b"n" * 72, b"", b"r")
    version, packed, index = cipher().gather([good, good, other, good], True)
    assert (version, packed, list(index)) == (9, b"m" * 72 + b"n" * 72 + b"m" * 72, [0, 0, 1, 2])
    assert cipher().gather([good, other], True) == (9, b"m" * 72 + b"n" * 72, None)
    assert cipher().gather([]) is None
    for bad in (good[:-2], b"", b"H" + good[1:], good[:23] + b"\x08" + good[24:], bytearray(good)):
        assert cipher().gather([good, bad]) is None
        assert cipher().gather([bad, good]) is None
        for between in ([good, bad, good], [good, bad, other]):
            assert cipher().gather(between) is None
            assert cipher().gather(between, True) is None


# ---- streams ------------------------------------------------------------------------------------------


def test_stream_segments() -> None:
    keys = crypto.generate_keys(1)
    sealer = crypto.StreamCipher(keys, 0, b"aad", None)
    parts = [sealer.seal(b"a" * 65536, False), sealer.seal(b"", False), sealer.seal(b"b", True)]
    assert [len(part) for part in parts] == [32 + 65536 + 16, 16, 17]
    refused(lambda: sealer.seal(b"more", True), LimitExceeded)
    opener = crypto.StreamCipher(keys, 0, b"aad", sealer.nonce)
    assert [opener.open(part, at == 2) for at, part in enumerate(parts)] == [b"a" * 65536, b"", b"b"]
    refused(lambda: opener.open(parts[2], True), LimitExceeded)


@pytest.mark.parametrize("wrong", ["order", "last", "not last", "aad", "nonce", "key", "short", "long"])
def test_stream_refuses(wrong: str) -> None:
    keys = crypto.generate_keys(1)
    sealer = crypto.StreamCipher(keys, 0, b"aad", None)
    first, second = sealer.seal(b"first", False), sealer.seal(b"second", True)
    nonce = bytes([sealer.nonce[0] ^ 1]) + sealer.nonce[1:] if wrong == "nonce" else sealer.nonce
    key = crypto.generate_keys(1) if wrong == "key" else keys
    opener = crypto.StreamCipher(key, 0, b"AAD" if wrong == "aad" else b"aad", nonce)
    part = {"order": second, "short": first[:-1], "long": first + b"x"}.get(wrong, first)
    if wrong == "not last":
        assert opener.open(first, False) == b"first"
        assert opener.open(second, False) is None
    else:
        assert opener.open(part, wrong == "last") is None
    refused(lambda: opener.open(first, False), LimitExceeded)


def test_a_stream_stops_when_wiped() -> None:
    sealer = crypto.StreamCipher(crypto.generate_keys(1), 0, b"", None)
    sealer.seal(b"x", False)
    sealer.wipe()
    assert sealer.wiped
    refused(lambda: sealer.seal(b"x", True), SecretMemoryError)
    refused(lambda: crypto.StreamCipher(crypto.generate_keys(1), 0, b"", b"short"), InvalidInput)


def test_backend_info_is_honest() -> None:
    info = crypto.backend_info()
    assert info["backend"] == os.environ.get("OPENKCM_BACKEND", info["backend"])
    assert info["openssl"].startswith("OpenSSL")
    assert (info["backend"] == "python") == any("heap" in note for note in info["notes"])


def test_an_unknown_backend_is_refused() -> None:
    done = run_python("import openkcm.crypto", check=False, OPENKCM_BACKEND="quick")
    assert "BackendUnavailable" in done.stderr
