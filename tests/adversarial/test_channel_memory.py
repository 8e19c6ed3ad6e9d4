# SPDX-License-Identifier: Apache-2.0
"""What an inner channel leaves outside secret memory: no private key, shared secret, session key, digest or data key.

A child agrees with the test, so that the test knows what there is to look for; the private key it reads out of the
child's secret memory, which for that is made where others can read. The child stops after each step, so that what
lies below on its stack stays as it is.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import probe
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from test_leftovers import Traces, registers

import openkcm
from support import ON_FAST

pytestmark = pytest.mark.skipif(
    not ON_FAST or platform.machine() != "x86_64",
    reason="the Python backend promises nothing of this; the register layout is that of x86-64",
)

START = """
import errno, os, sys
import probe
probe.deny_memfd_secret(errno.ENOSYS)
from openkcm import crypto
assert crypto.secret_memory_info()["kind"] == "mlock"

def stop():
    os.kill(os.getpid(), 19)                # SIGSTOP

def say(data):
    sys.stdout.write(data.hex() + "\\n")
    sys.stdout.flush()

def hear():
    return bytes.fromhex(sys.stdin.readline())

planted = hear()
"""
STEPS = """
offer = crypto.offer_channel()
stop()
say(offer.public)
peer = hear()
channel = offer.agree(peer, b"t", True)
stop()
keys = crypto.generate_keys(3)
say(crypto.seal_keys(channel, keys, b"1"))
many = crypto.generate_keys(500)
crypto.seal_keys(channel, many, b"2")
stop()
sealed = crypto.seal_keys(channel, keys, b"3")
stop()
message = hear()
opened = crypto.open_keys(channel, message, b"4")
stop()
try:
    crypto.open_keys(channel, message, b"5")
except crypto.DecryptError:
    pass
stop()
for each in (channel, keys, many, opened):
    each.wipe()
stop()
small = crypto.offer_channel()
try:
    small.agree(bytes(32), b"t", True)
except crypto.DecryptError:
    pass
stop()
"""
LOAD = """
import threading
offer = crypto.offer_channel()
say(offer.public)
channel = offer.agree(hear(), b"t", True)
keys = crypto.generate_keys(2)
say(crypto.seal_keys(channel, keys, b"1"))
message = hear()
many = keys.select([0, 1] * 8192)

def work():
    try:
        while True:
            for _ in range(20):                     # long ones: the keys are at work nearly all the time
                crypto.seal_keys(channel, many, b"2")
            crypto.open_keys(channel, message, b"3").wipe()
            crypto.offer_channel().agree(offer.public, b"t", False).wipe()
    except BaseException:
        os._exit(3)                         # a scan of an idle process would prove nothing

for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
say(b"ready")
hear()
"""
PLANTED = bytes(range(200, 232))


# ---- what to look for ------------------------------------------------------------------------------------


def primes() -> Iterator[int]:
    """The primes, from 2."""
    number = 2
    while True:
        if all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
            yield number
        number += 1


def root_bits(number: int, degree: int) -> int:
    """The first 32 bits of the fraction of a root (FIPS 180-4, section 4.2.2), in integers."""
    low, high = 0, number << 32
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**degree <= number << 32 * degree else (low, middle - 1)
    return low & 0xFFFFFFFF


FIRST_PRIMES = [prime for prime, _ in zip(primes(), range(64), strict=False)]
ROUNDS = [root_bits(prime, 3) for prime in FIRST_PRIMES]
BEGINNING = [root_bits(prime, 2) for prime in FIRST_PRIMES[:8]]


def half_digest(block: bytes) -> list[int]:
    """SHA-256's state after one block (FIPS 180-4, section 6.2)."""

    def turned(word: int, *by: int) -> int:
        result = 0
        for each in by:
            result ^= (word >> each | word << 32 - each) & 0xFFFFFFFF
        return result

    words = [int.from_bytes(block[at : at + 4], "big") for at in range(0, 64, 4)]
    for at in range(16, 64):
        low = turned(words[at - 15], 7, 18) ^ words[at - 15] >> 3
        high = turned(words[at - 2], 17, 19) ^ words[at - 2] >> 10
        words.append((words[at - 16] + low + words[at - 7] + high) & 0xFFFFFFFF)
    a, b, c, d, e, f, g, h = BEGINNING
    for word, constant in zip(words, ROUNDS, strict=True):
        first = h + turned(e, 6, 11, 25) + (e & f ^ ~e & g) + constant + word
        second = turned(a, 2, 13, 22) + (a & b ^ a & c ^ b & c)
        a, b, c, d, e, f, g, h = (
            (first + second) & 0xFFFFFFFF,
            *(a, b, c),
            (d + first) & 0xFFFFFFFF,
            *(e, f, g),
        )
    return [(x + y) & 0xFFFFFFFF for x, y in zip(BEGINNING, (a, b, c, d, e, f, g, h), strict=True)]


def test_the_half_digest_is_one() -> None:
    """With a message's padding as its only block it is the digest."""
    padded = b"abc" + b"\x80" + bytes(52) + (24).to_bytes(8, "big")
    words = half_digest(padded)
    assert b"".join(word.to_bytes(4, "big") for word in words) == hashlib.sha256(b"abc").digest()


def expanding(extracted: bytes, info: bytes) -> Iterator[bytes]:
    """What HKDF makes on the way to 44 bytes (RFC 5869, section 2.3): inner digests of HMAC, and the second block."""
    pad = bytes(byte ^ 0x36 for byte in extracted.ljust(64, b"\0"))
    first = hmac.digest(extracted, info + b"\x01", "sha256")
    yield hashlib.sha256(pad + info + b"\x01").digest()
    yield hashlib.sha256(pad + first + info + b"\x02").digest()
    yield (
        2 * hmac.digest(extracted, first + info + b"\x02", "sha256")[16:]
    )  # before that is the IV, which is kept


class Secrets:
    """What one agreement makes, from the private key, the peer's public key and the transcript."""

    def __init__(self, shared: bytes, private: bytes = b"") -> None:
        salt = hashlib.sha256(b"t").digest()
        inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in salt.ljust(64, b"\0")) + shared).digest()
        self.extracted = hmac.digest(salt, shared, "sha256")
        self.halves = [
            HKDFExpand(SHA256(), 44, b"openkcm/v1/channel/" + info).derive(self.extracted)
            for info in (b"initiator to responder", b"responder to initiator")
        ]
        self.whole = [shared, inner, self.extracted, *(half[:32] for half in self.halves)]
        for label in (b"initiator to responder", b"responder to initiator"):
            self.whole += expanding(self.extracted, b"openkcm/v1/channel/" + label)
        if private:
            clamped = bytes([private[0] & 248, *private[1:31], private[31] & 127 | 64])
            self.whole += [private, clamped]
        for pad in (0x36, 0x5C):  # HMAC keyed with what was extracted is as good as that
            block = bytes(byte ^ pad for byte in self.extracted.ljust(64, b"\0"))
            self.whole += [block[:32], b"".join(word.to_bytes(4, "little") for word in half_digest(block))]
        swapped = [
            b"".join(each[at : at + 4][::-1] for at in range(0, 32, 4)) for each in self.whole
        ]  # as words
        self.whole += swapped

    @property
    def session_keys(self) -> list[bytes]:
        return [half[:32] for half in self.halves]


class Looker(Traces):
    """Eight aligned bytes of any of these, or of what AES-GCM makes of the keys among them."""

    def __init__(self, plain: list[bytes], keys: list[bytes]) -> None:
        super().__init__(*keys)
        self.halves |= {
            int.from_bytes(each[at : at + 8], "little") for each in plain for at in range(0, 32, 8)
        }
        self.halves -= {0}


def everything(pid: int) -> Iterator[tuple[bool, bytes]]:
    """Every readable mapping of a process: whether it is secret memory, and what is in it."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for each in probe.mappings(pid):
            if each.permissions.startswith("r") and not each.name.startswith("[v"):
                secret = {"lo", "dc", "dd"} <= each.flags
                memory.seek(each.start)
                yield secret, memory.read(each.end - each.start)


def look(pid: int, looker: Looker) -> tuple[int, int, int]:
    """How often it sees something outside secret memory and inside, and how much it looked at."""
    outside = inside = total = 0
    for secret, data in everything(pid):
        found = looker.count(data)
        inside, outside = inside + found * secret, outside + found * (not secret)
        total += len(data)
    return outside, inside, total


# ---- looking -----------------------------------------------------------------------------------------------


class Child:
    """A process that agrees on a channel with the test."""

    def __init__(self, code: str, **settings: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", START + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=probe.child_environment(**settings),
        )
        self.pid = self.process.pid
        self.say(PLANTED)

    def say(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data.hex() + "\n")
        self.process.stdin.flush()

    def hear(self) -> bytes:
        assert self.process.stdout is not None
        return bytes.fromhex(self.process.stdout.readline())

    def wait(self) -> None:
        """Until it has stopped."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), status

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def see(self, looker: Looker, inside: bool) -> None:
        """Nothing outside secret memory nor in a vector register; inside as is said."""
        assert looker.count(registers(self.pid)) == 0, "in a vector register"
        outside, found, total = look(self.pid, looker)
        assert total > 5 * 2**20
        assert outside == 0
        assert (found > 0) == inside
        assert look(self.pid, Looker([PLANTED], []))[0] > 0, "the scan does not see what is there"


@contextmanager
def child(code: str, **settings: str) -> Iterator[Child]:
    """A child, and its end."""
    made = Child(code, **settings)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.communicate()


def only_slot(pid: int) -> bytes:
    """The one secret of 32 bytes that a process has: between two canaries, on which the first 16 bytes end."""
    (data,) = [data for secret, data in everything(pid) if secret]
    begin = next(at for at in range(0, len(data), 64) if any(data[at : at + 64]))
    return data[begin + 16 : begin + 48]


@pytest.mark.parametrize("engine", ["", "evp"])
def test_no_step_leaves_anything(engine: str) -> None:
    own = X25519PrivateKey.generate()
    with child(STEPS, OPENKCM_AES=engine) as other:
        other.wait()
        private = only_slot(other.pid)
        other.see(Looker([private], []), inside=True)
        other.go_on()
        public = other.hear()
        assert X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw() == public
        other.say(own.public_key().public_bytes_raw())
        other.wait()  # agreed
        shared = own.exchange(X25519PublicKey.from_public_bytes(public))
        secrets = Secrets(shared, private)
        other.see(Looker(secrets.session_keys, []), inside=True)
        gone = [each for each in secrets.whole if each not in secrets.session_keys]
        other.see(Looker(gone, []), inside=False)
        send, receive = (AESGCM(each) for each in secrets.session_keys)
        ivs = [half[32:] for half in secrets.halves]
        other.go_on()
        first = other.hear()
        keys = send.decrypt(ivs[0], first[8:], b"1" + first[:8])
        every = Looker([*secrets.whole, *(keys[at : at + 32] for at in (0, 32, 64))], secrets.session_keys)
        other.wait()  # sealed many
        other.see(every, inside=True)
        other.go_on()
        other.wait()  # sealed few
        other.see(every, inside=True)
        other.go_on()
        own_keys = os.urandom(64)
        other.say(bytes(8) + receive.encrypt(ivs[1], own_keys, b"4" + bytes(8)))
        every = Looker(
            [*secrets.whole, keys[:32], own_keys[:32], own_keys[32:]], [*secrets.session_keys, own_keys[:32]]
        )
        for inside in (True, True, False, False):  # opened, refused, wiped, refused a point
            other.wait()
            other.see(every, inside=inside)
            other.go_on()


def test_nothing_is_found_under_load() -> None:
    if openkcm.backend_info()["engine"] == "EVP":
        pytest.skip(
            "not promised: OpenSSL keeps a cipher on its heap for the length of a call; docs/security.md"
        )
    own = X25519PrivateKey.generate()
    with child(LOAD) as other:
        public = other.hear()
        other.say(own.public_key().public_bytes_raw())
        secrets = Secrets(own.exchange(X25519PublicKey.from_public_bytes(public)))
        sealed = other.hear()
        iv = secrets.halves[0][32:]
        keys = AESGCM(secrets.session_keys[0]).decrypt(iv, sealed[8:], b"1" + sealed[:8])
        fresh = os.urandom(64)
        message = AESGCM(secrets.session_keys[1]).encrypt(secrets.halves[1][32:], fresh, b"3" + bytes(8))
        other.say(bytes(8) + message)
        assert other.hear() == b"ready"
        looker = Looker([*secrets.whole, keys[:32], keys[-32:], fresh[:32]], secrets.session_keys)
        for _ in range(5):
            outside, inside, total = look(other.pid, looker)
            assert inside > 0
            assert total > 5 * 2**20
            assert other.process.poll() is None, "the load ended by itself"
            assert outside == 0
