# SPDX-License-Identifier: Apache-2.0
"""What a finished call leaves: no data key, round key, hash key or power of it in memory or vector registers.

The hash key H of GCM is AES_K(0); who has it forges records under that key. A child does one thing under a data key
that only its secret memory holds, and stops at once; this process works the key out from its wrapped form and looks.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import attacker
import probe
import pytest
from scan import scan_process

from support import ON_FAST

pytestmark = pytest.mark.skipif(
    not ON_FAST or platform.machine() != "x86_64",
    reason="the Python backend promises nothing of this; the register layout is that of x86-64",
)

PARENT = bytes(range(64, 96))
CHILD = """
import ctypes, os, sys
from openkcm import crypto
parent = crypto.import_wrapping_key(bytes(range(64, 96)))
keys = crypto.generate_keys(1)
wrapped = crypto.wrap_many(parent, keys, b"")
cipher = crypto.RecordCipher(b"HEAD", 8, True, b"aad")
sealed = {size: cipher.seal_one(keys, 0, 1, b"m" * 8, b"", b"r" * size) for size in (64, 1500, 100_000)}
many = [sealed[64]] * 20
sys.stdout.write(wrapped.hex() + "\\n")
sys.stdout.flush()
planted = bytes.fromhex(sys.stdin.readline())
result = %s
if crypto.secret_memory_info()["kind"] != "memfd_secret":
    for each in (keys, parent, *(result if type(result) is tuple else ())):     # where others can read them
        type(each) in (crypto.SecretKeys, crypto.WrappingKey) and each.wipe()
os.kill(os.getpid(), 19)                    # SIGSTOP: what lies below on the stack stays as it is
"""
WORKS = {
    "seal a short record": "cipher.seal_one(keys, 0, 1, b'm' * 8, b'', b'r' * 64)",
    "seal a longer record": "cipher.seal_one(keys, 0, 1, b'm' * 8, b'', b'r' * 1500)",
    "seal a long record": "cipher.seal_one(keys, 0, 1, b'm' * 8, b'', b'r' * 100_000)",
    "seal a batch": "cipher.seal_many(keys, None, 1, b'm' * 8, b'', [b'r' * 64] * 20)",
    "open a short record": "cipher.open_one(keys, 0, b'', sealed[64])",
    "open a longer record": "cipher.open_one(keys, 0, b'', sealed[1500])",
    "open a long record": "cipher.open_one(keys, 0, b'', sealed[100_000])",
    "open under a key that is kept": "cipher.open_one(keys.keep(0), 0, b'', sealed[1500])",
    "keep a key": "keys.keep(0).wipe()",
    "open a batch": "cipher.open_many(keys, None, b'', many, False)",
    "refuse a record": "cipher.open_one(keys, 0, b'another', sealed[1500])",
    "wrap": "crypto.wrap_many(parent, keys, b'')",
    "unwrap": "crypto.unwrap_many(parent, wrapped, b'')",
    "seal a stream": "crypto.StreamCipher(keys, 0, b'aad').seal(b'r' * 5000, True)",
    "rewrap": "crypto.rewrap_many(parent, parent, wrapped, b'', b'')",
}


# ---- what to look for ------------------------------------------------------------------------------------


def round_keys(key: bytes) -> list[bytes]:
    """The 15 round keys of AES-256 (FIPS 197, section 5.2)."""
    box = sbox()
    words = [key[at : at + 4] for at in range(0, 32, 4)]
    constant = 1
    for at in range(8, 60):
        word = words[-1]
        if at % 8 == 0:
            word = bytes(box[byte] for byte in word[1:] + word[:1])
            word = bytes([word[0] ^ constant]) + word[1:]
            constant *= 2
        elif at % 8 == 4:
            word = bytes(box[byte] for byte in word)
        words.append(bytes(a ^ b for a, b in zip(word, words[at - 8], strict=True)))
    return [b"".join(words[at : at + 4]) for at in range(0, 60, 4)]


def sbox() -> list[int]:
    """The S-box: inverse in GF(2^8), then an affine map (FIPS 197, section 5.1.1)."""
    box, p, q = [0x63] * 256, 1, 1
    while True:
        p ^= (p << 1) ^ (0x11B if p & 0x80 else 0)
        p &= 0xFF
        for shift in (1, 2, 4):
            q ^= q << shift
        q &= 0xFF
        q ^= 0x09 if q & 0x80 else 0
        turned = q
        for shift in range(1, 5):
            turned ^= (q << shift | q >> (8 - shift)) & 0xFF
        box[p] = turned ^ 0x63
        if p == 1:
            return box


def times_x(value: int) -> int:
    """Double in GF(2^128), bits as in a polynomial's coefficients from the lowest."""
    value <<= 1
    return value ^ ((1 << 128) | 0x87) if value >> 128 else value


def product(first: int, second: int) -> int:
    """Multiply in GF(2^128)."""
    result = 0
    while second:
        if second & 1:
            result ^= first
        first, second = times_x(first), second >> 1
    return result


def reflected(value: int) -> int:
    """The same coefficients in the other order."""
    return int(f"{value:0128b}"[::-1], 2)


def hash_keys(key: bytes) -> list[bytes]:
    """H and its powers to 48, as they are, times x and divided by it."""
    base = reflected(int.from_bytes(attacker.block(key, bytes(16)), "big"))
    found, power = [], base
    for _ in range(48):
        # Engines keep them times x or 1/x, which saves a shift in each product of reflected operands.
        for value in (power, times_x(power), product(power, (1 << 127) | 0x43)):
            found.append(reflected(value).to_bytes(16, "big"))
        power = product(power, base)
    return found


class Traces:
    """Eight bytes of anything that would give a key away; also of what is kept the other way round."""

    def __init__(self, *keys: bytes) -> None:
        whole = [part for key in keys for part in (*round_keys(key), *hash_keys(key))]
        self.halves = {
            int.from_bytes(half, order)
            for part in whole
            for half in (part[:8], part[8:])
            for order in ("little", "big")
        }

    def count(self, data: bytes) -> int:
        """How many of them are in the data, at multiples of eight: compilers and assembly keep them so."""
        words = memoryview(data)[: len(data) // 8 * 8].cast("Q")
        return len(self.halves.intersection(words.tolist()))


def test_the_traces_are_those_that_an_engine_keeps() -> None:
    """Against intel-ipsec-mb's own expanded key, in which every word must be one of them."""
    try:
        library = ctypes.CDLL("libIPSec_MB.so.1")
    except OSError:
        pytest.skip("libIPSec_MB.so.1 is not installed")
    key = bytes(range(32))
    expanded = ctypes.create_string_buffer(4096 + 64)
    start = -ctypes.addressof(expanded) % 64
    library.aes_gcm_pre_256_avx_gen4(key, ctypes.byref(expanded, start))
    words = memoryview(bytes(expanded)[start : start + 240 + 8 * 16]).cast("Q").tolist()
    assert len(set(words)) == 46
    assert Traces(key).halves.issuperset(words)
    assert Traces(bytes(32)).halves.isdisjoint(words)


# ---- looking ---------------------------------------------------------------------------------------------


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def registers(pid: int) -> bytes:
    """The extended state of a stopped child: its vector and mask registers (ptrace(2), NT_X86_XSTATE)."""
    attach, detach, get_set, extended_state = 16, 17, 0x4204, 0x202
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    if ptrace(attach, pid, None, None) != 0:
        pytest.skip(f"not checked: no tracing here ({os.strerror(ctypes.get_errno())})")
    os.waitpid(pid, 0)
    state = ctypes.create_string_buffer(16384)
    vector = _Vector(ctypes.addressof(state), len(state))
    assert ptrace(get_set, pid, extended_state, ctypes.addressof(vector)) == 0
    ptrace(detach, pid, None, signal.SIGSTOP)
    return state.raw[: vector.size]


@contextmanager
def stopped_after(work: str, planted: bytes, **settings: str) -> Iterator[tuple[int, bytes]]:
    """A child that did this and stopped: its id, and the wrapped form of its data key."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD % work],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=probe.child_environment(**settings),
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        wrapped = bytes.fromhex(process.stdout.readline())
        process.stdin.write(planted.hex() + "\n")
        process.stdin.flush()
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), status
        yield process.pid, wrapped
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("engine", ["", "evp"])
@pytest.mark.parametrize("work", WORKS)
def test_a_finished_call_leaves_no_key(work: str, engine: str) -> None:
    planted = hash_keys(bytes(32))[7]
    with stopped_after(WORKS[work], planted, OPENKCM_AES=engine) as (pid, wrapped):
        traces = Traces(attacker.unwrap(PARENT, wrapped, b""), attacker.subkey(PARENT, wrapped[:12]))
        state = registers(pid)
        assert len(state) >= 576
        assert traces.count(state) == 0, "in a vector register"
        found, total = scan_process(pid, traces)  # type: ignore[arg-type]
        assert total > 5 * 2**20
        assert found == 0, "in memory"
        assert scan_process(pid, Traces(bytes(32)))[0] > 0, "the scan does not see what is there"  # type: ignore[arg-type]
