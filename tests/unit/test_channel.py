# SPDX-License-Identifier: Apache-2.0
"""The inner channel: its published vectors, its one golden exchange, and everything that it must refuse."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import threading
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openkcm import crypto
from openkcm.errors import DecryptError, InvalidInput, LimitExceeded, SecretMemoryError
from openkcm.limits import MAX_CHANNEL_MESSAGES, MAX_KEYS_PER_CALL
from support import refused

TRANSCRIPT = b"what both sides said"


def pair(transcript: bytes = TRANSCRIPT) -> tuple[crypto.Channel, crypto.Channel]:
    """The two ends of a fresh channel: the initiator's, the responder's."""
    first, second = crypto.offer_channel(), crypto.offer_channel()
    publics = first.public, second.public
    return first.agree(publics[1], transcript, True), second.agree(publics[0], transcript, False)


def same(first: crypto.SecretKeys, second: crypto.SecretKeys) -> bool:
    """Whether two handles hold the same keys, asked of a cipher that does not give them away."""
    if len(first) != len(second):
        return False
    cipher = crypto.RecordCipher(b"HEAD", 0, False, b"")
    records = [bytes([number % 256]) for number in range(len(first))]
    sealed = cipher.seal_many(first, None, 1, b"", b"", records)
    try:
        return cipher.open_many(second, None, b"", sealed, False)[0] == records
    except DecryptError:
        return False


# ---- vectors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("private", "public", "shared"),
    [
        (
            "a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4",
            "e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c",
            "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552",
        ),
        (
            "4b66e9d4d1b4673c5ad22691957d6af5c11b6421e0ea01d42ca4169e7918ba0d",
            "e5210f12786811d3f4b7959d0538ae2c31dbe7106fc03c3efc4cd549c715a493",
            "95cbde9476e8907d7aade45cb4b873f88b595a68799fa152e6f8f7647aac7957",
        ),
    ],
)
def test_x25519(private: str, public: str, shared: str) -> None:
    """RFC 7748, section 5.2."""
    assert crypto._x25519(bytes.fromhex(private), bytes.fromhex(public)) == bytes.fromhex(shared)


def test_x25519_again_and_again() -> None:
    """RFC 7748, section 5.2: each result is the next private key, the private key the next point."""
    private = point = (9).to_bytes(32, "little")
    for turn in range(1, 1001):
        private, point = crypto._x25519(private, point), private
        if turn == 1:
            assert private.hex() == "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    assert private.hex() == "684cf59ba83309552800ef566f2f4d3c1c3887c49360e3875f2eb94d99532c51"


@pytest.mark.parametrize(
    ("secret", "salt", "info", "output"),
    [
        (
            b"\x0b" * 22,
            bytes(range(13)),
            bytes(range(0xF0, 0xFA)),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
        ),
        (
            bytes(range(80)),
            bytes(range(0x60, 0xB0)),
            bytes(range(0xB0, 0x100)),
            (
                "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09"
                "da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87"
            ),
        ),
        (
            b"\x0b" * 22,
            b"",
            b"",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
        ),
    ],
)
def test_hkdf(secret: bytes, salt: bytes, info: bytes, output: str) -> None:
    """RFC 5869, appendices A.1 to A.3."""
    assert crypto._hkdf(secret, salt, info, len(output) // 2).hex() == output


def test_the_golden_exchange() -> None:
    """Fixed key pairs give these bytes, on either backend and in every release of this protocol version."""
    first, second = crypto._offer_of(bytes(range(32))), crypto._offer_of(bytes(range(1, 33)))
    publics = first.public, second.public
    initiator = first.agree(publics[1], b"t", True)
    responder = second.agree(publics[0], b"t", False)
    keys = crypto.import_keys(bytes(64))
    assert crypto.seal_keys(initiator, keys, b"aad").hex() == (
        "00000000000000009667c48ef380c627d286504e5736ebdc7f36a2107c5f1b2461f1b75cc0a2410f8862041e96681eaa"
        "b6439436464e67547c1a07fc3b5fccbcdb0718724bb671409c5d3953d742100b361fbd380ec68f9e"
    )
    assert crypto.seal_keys(responder, keys, b"aad").hex() == (
        "0000000000000000b1495ad257f1197ed07c385b018e8fe1f68ad8475133fcebb0fd11a748e1b61a4ce45a2064354450"
        "30878de8e8b67c07fc52cd6dd918a6ffb15f234a5898a46e71937343bbc7bdbec9fddf15ba8f9ed3"
    )


def test_it_is_what_the_page_says() -> None:
    """An independent reading of docs/formats.md, on `cryptography`, makes and reads the same messages."""
    pytest.importorskip("cryptography")
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256, Hash
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    first, second = crypto._offer_of(bytes(range(32))), crypto.offer_channel()
    shared = crypto._x25519(bytes(range(32)), second.public)
    publics = first.public, second.public
    ends = first.agree(publics[1], TRANSCRIPT, True), second.agree(publics[0], TRANSCRIPT, False)
    digest = Hash(SHA256())
    digest.update(TRANSCRIPT)
    salt = digest.finalize()
    keys = crypto.import_keys(bytes(range(64)))
    for at, info in enumerate((b"initiator to responder", b"responder to initiator")):
        half = HKDF(SHA256(), 44, salt, b"openkcm/v1/channel/" + info).derive(shared)
        crypto._skip_to(ends[at], 0x01020304)
        sealed = crypto.seal_keys(ends[at], keys, b"aad")
        counter = (0x01020304).to_bytes(8, "big")
        nonce = half[32:36] + bytes(a ^ b for a, b in zip(half[36:], counter, strict=True))
        assert sealed[:8] == counter
        assert AESGCM(half[:32]).decrypt(nonce, sealed[8:], b"aad" + counter) == bytes(range(64))


# ---- agreeing ------------------------------------------------------------------------------------------

SMALL_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
    (2**255 - 20).to_bytes(32, "little"),  # p - 1, p, p + 1
    (2**255 - 19).to_bytes(32, "little"),
    (2**255 - 18).to_bytes(32, "little"),
]


@pytest.mark.parametrize("peer", SMALL_ORDER, ids=bytes.hex)
def test_points_of_small_order_are_refused(peer: bytes) -> None:
    """RFC 7748, section 6.1: the all-zero secret is one that everybody knows."""
    offer = crypto.offer_channel()
    gc.collect()
    before = crypto.secret_memory_info()["handles"]
    refused(lambda: offer.agree(peer, b"t", True), DecryptError)
    assert offer.wiped
    assert crypto.secret_memory_info()["handles"] == before - 1


def test_an_offer_agrees_once() -> None:
    offer, other = crypto.offer_channel(), crypto.offer_channel()
    refused(lambda: offer.agree(b"x" * 31, b"t", True), InvalidInput)
    offer.agree(other.public, b"t", True)
    assert offer.wiped
    refused(lambda: offer.agree(other.public, b"t", True), SecretMemoryError)
    other.wipe()
    refused(lambda: other.agree(offer.public, b"t", True), SecretMemoryError)


def made_by_four(offer: crypto.ChannelOffer, peer: bytes) -> list[crypto.Channel]:
    """The channels that four threads get out of one offer."""
    made: list[crypto.Channel] = []
    start = threading.Barrier(4)

    def work() -> None:
        start.wait(30)
        with contextlib.suppress(SecretMemoryError):
            made.append(offer.agree(peer, b"t", True))

    run_all([work] * 4)
    return made


def test_an_offer_agrees_once_however_many_threads_ask() -> None:
    for _ in range(20):
        assert len(made_by_four(crypto.offer_channel(), crypto.offer_channel().public)) == 1


def run_all(works: list[Callable[[], None]]) -> None:
    """Run each in a thread and wait for all; an error in one is raised here."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def test_offers_differ() -> None:
    assert len({crypto.offer_channel().public for _ in range(50)}) == 50


@pytest.mark.parametrize("make", [crypto.offer_channel, lambda: pair()[0]], ids=["offer", "channel"])
def test_handles_do_not_leave_the_process(make: Callable[[], crypto.Channel | crypto.ChannelOffer]) -> None:
    handle = make()
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        refused(lambda leave=leave: leave(handle), TypeError)
    assert repr(handle) in ("<Channel>", "<ChannelOffer>")
    handle.wipe()
    handle.wipe()
    assert handle.wiped
    assert repr(handle) in ("<Channel wiped>", "<ChannelOffer wiped>")


# ---- messages ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(count=st.integers(1, 70), aad=st.binary(max_size=100), messages=st.integers(1, 4))
def test_what_one_end_seals_the_other_opens(count: int, aad: bytes, messages: int) -> None:
    ends = pair()
    for first, second in (ends, ends[::-1]):
        sent = []
        for number in range(messages):
            keys = crypto.generate_keys(count)
            sealed = crypto.seal_keys(first, keys, aad)
            assert len(sealed) == 8 + 32 * count + 16
            assert sealed[:8] == number.to_bytes(8, "big")
            sent.append((keys, sealed))
        assert first.sent == messages
        for keys, sealed in reversed(sent):  # in any order
            assert same(crypto.open_keys(second, sealed, aad), keys)


def test_the_most_keys() -> None:
    first, second = pair()
    keys = crypto.generate_keys(MAX_KEYS_PER_CALL)
    sealed = crypto.seal_keys(first, keys, b"")
    assert same(crypto.open_keys(second, sealed, b""), keys)
    for wrong in (sealed[:-1], sealed + bytes(32), sealed[:24], sealed[:8], b"", sealed[:55], sealed[:57]):
        refused(lambda wrong=wrong: crypto.open_keys(second, wrong, b""), DecryptError)


def test_every_byte_counts() -> None:
    first, second = pair()
    sealed = crypto.seal_keys(first, crypto.generate_keys(2), b"aad")
    gc.collect()
    before = crypto.secret_memory_info()["handles"]
    for at in range(len(sealed)):
        for bit in (0x01, 0x80):
            altered = bytearray(sealed)
            altered[at] ^= bit
            refused(lambda altered=altered: crypto.open_keys(second, bytes(altered), b"aad"), DecryptError)
    for aad in (b"", b"aae", b"aad\0", b"aad" + sealed[:8]):
        refused(lambda aad=aad: crypto.open_keys(second, sealed, aad), DecryptError)
    assert crypto.secret_memory_info()["handles"] == before, "what did not open is still there"
    assert len(crypto.open_keys(second, sealed, b"aad")) == 2


def test_no_end_opens_its_own_messages() -> None:
    for end in pair():
        sealed = crypto.seal_keys(end, crypto.generate_keys(1), b"aad")
        refused(lambda end=end, sealed=sealed: crypto.open_keys(end, sealed, b"aad"), DecryptError)


def test_two_initiators_do_not_understand_each_other() -> None:
    one, two = crypto.offer_channel(), crypto.offer_channel()
    publics = one.public, two.public
    first, second = one.agree(publics[1], b"t", True), two.agree(publics[0], b"t", True)
    sealed = crypto.seal_keys(first, crypto.generate_keys(1), b"")
    refused(lambda: crypto.open_keys(second, sealed, b""), DecryptError)


def test_another_transcript_is_another_channel() -> None:
    one, two = crypto.offer_channel(), crypto.offer_channel()
    publics = one.public, two.public
    first, second = one.agree(publics[1], b"t", True), two.agree(publics[0], b"u", False)
    sealed = crypto.seal_keys(first, crypto.generate_keys(1), b"")
    refused(lambda: crypto.open_keys(second, sealed, b""), DecryptError)


def test_a_message_of_one_session_is_nothing_in_another() -> None:
    (first, _), (_, other) = pair(), pair()
    sealed = crypto.seal_keys(first, crypto.generate_keys(1), b"aad")
    refused(lambda: crypto.open_keys(other, sealed, b"aad"), DecryptError)


def test_a_session_ends_after_its_last_message() -> None:
    first, second = pair()
    crypto._skip_to(first, MAX_CHANNEL_MESSAGES - 1)
    keys = crypto.generate_keys(1)
    sealed = crypto.seal_keys(first, keys, b"")
    assert sealed[:8].hex() == "00000000ffffffff"
    assert same(crypto.open_keys(second, sealed, b""), keys)
    for _ in range(3):
        refused(lambda: crypto.seal_keys(first, keys, b""), LimitExceeded)
    assert first.sent == MAX_CHANNEL_MESSAGES
    beyond = MAX_CHANNEL_MESSAGES.to_bytes(8, "big") + sealed[8:]
    refused(lambda: crypto.open_keys(second, beyond, b""), DecryptError)


def test_wiped_handles_are_refused() -> None:
    first, second = pair()
    keys = crypto.generate_keys(1)
    sealed = crypto.seal_keys(first, keys, b"")
    keys.wipe()
    refused(lambda: crypto.seal_keys(first, keys, b""), SecretMemoryError)
    first.wipe()
    second.wipe()
    refused(lambda: crypto.seal_keys(first, crypto.generate_keys(1), b""), SecretMemoryError)
    refused(lambda: crypto.open_keys(second, sealed, b""), SecretMemoryError)


def test_no_counter_twice_in_eight_threads() -> None:
    first, second = pair()
    keys = crypto.generate_keys(3)
    sealed: list[bytes] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait(30)
        sealed.extend([crypto.seal_keys(first, keys, b"aad") for _ in range(500)])

    run_all([work] * 8)
    assert sorted(message[:8] for message in sealed) == [n.to_bytes(8, "big") for n in range(4000)]
    assert first.sent == 4000
    assert all(same(crypto.open_keys(second, message, b"aad"), keys) for message in sealed[::97])


def test_nothing_survives_a_fork() -> None:
    offer, (first, second) = crypto.offer_channel(), pair()
    sealed = crypto.seal_keys(first, crypto.generate_keys(1), b"")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            mine = crypto.generate_keys(1)
            peer = crypto.offer_channel().public
            refused(lambda: offer.agree(peer, b"t", True), SecretMemoryError)
            refused(lambda: crypto.seal_keys(first, mine, b""), SecretMemoryError)
            refused(lambda: crypto.open_keys(second, sealed, b""), SecretMemoryError)
            first.wipe()
            status = 0 if offer.wiped and first.wiped and second.wiped else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert len(crypto.open_keys(second, sealed, b"")) == 1
