# SPDX-License-Identifier: Apache-2.0
"""Published vectors: NIST CAVP for AES-256-GCM, C2SP for XAES-256-GCM."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import cryptography_vectors
import pytest

from openkcm import crypto

GCM = Path(str(cryptography_vectors.__file__)).parent / "ciphers" / "AES" / "GCM"
NONCE = b"ABCDEFGHIJKLMNOPQRSTUVWX"
ACCUMULATED = {
    10_000: "e6b9edf2df6cec60c8cbd864e2211b597fb69a529160cd040d56c0c210081939",
    1_000_000: "2163ae1445985a30b60585ee67daa55674df06901b890593e824b8a7c885ab15",
}


def cases(name: str) -> Iterator[dict[str, bytes | bool]]:
    """The cases of a CAVP response file with 96-bit nonces and whole tags, the only ones that OpenKCM uses."""
    bits: dict[str, int] = {}
    case: dict[str, bytes | bool] = {}
    for line in [*(GCM / name).read_text().splitlines(), ""]:
        line = line.strip()
        if line.startswith("["):
            key, _, value = line.strip("[]").partition(" = ")
            bits[key] = int(value)
        elif line == "FAIL":
            case["fails"] = True
        elif " = " in f"{line} ":
            key, _, value = f"{line} ".partition(" = ")
            case[key] = bytes.fromhex(value.strip()) if key != "Count" else b""
        elif case:
            if bits["IVlen"] == 96 and bits["Taglen"] == 128:
                yield case
            case = {}


def test_nist_encrypt() -> None:
    count = 0
    for case in cases("gcmEncryptExtIV256.rsp"):
        sealed = crypto._gcm_seal(case["Key"], case["IV"], case["AAD"], case["PT"])
        assert sealed == case["CT"] + case["Tag"]
        count += 1
    assert count == 375


def test_nist_decrypt() -> None:
    count = failing = 0
    for case in cases("gcmDecrypt256.rsp"):
        opened = crypto._gcm_open(case["Key"], case["IV"], case["AAD"], case["CT"] + case["Tag"])
        assert opened == (None if case.get("fails") else case["PT"])
        failing += "fails" in case
        count += 1
    assert count == 375
    assert 0 < failing < count


@pytest.mark.parametrize(
    ("key", "aad", "expected"),
    [
        (b"\x01" * 32, b"", "ce546ef63c9cc60765923609b33a9a1974e96e52daf2fcf7075e2271"),
        (b"\x03" * 32, b"c2sp.org/XAES-256-GCM", "986ec1832593df5443a179437fd083bf3fdb41abd740a21f71eb769d"),
    ],
)
def test_xaes(key: bytes, aad: bytes, expected: str) -> None:
    sealed = crypto._xaes_seal(key, NONCE, aad, b"XAES-256-GCM")
    assert sealed.hex() == expected
    assert crypto._xaes_open(key, NONCE, aad, sealed) == b"XAES-256-GCM"
    assert crypto._xaes_open(key, NONCE, aad + b"?", sealed) is None


class Shake:
    """A SHAKE-128 stream to read from; hashlib gives only whole outputs, so it is taken in growing ones."""

    def __init__(self, size: int) -> None:
        self._data = hashlib.shake_128().digest(size)
        self._at = 0

    def read(self, size: int) -> bytes:
        self._at += size
        assert self._at <= len(self._data)
        return self._data[self._at - size : self._at]


def accumulate(iterations: int) -> str:
    """The accumulated test of the C2SP specification."""
    source = Shake(iterations * 330)
    result = hashlib.shake_128()
    for _ in range(iterations):
        key, nonce = source.read(32), source.read(24)
        plaintext = source.read(source.read(1)[0])
        aad = source.read(source.read(1)[0])
        sealed = crypto._xaes_seal(key, nonce, aad, plaintext)
        assert crypto._xaes_open(key, nonce, aad, sealed) == plaintext
        result.update(sealed)
    return result.hexdigest(32)


def test_xaes_accumulated() -> None:
    assert accumulate(10_000) == ACCUMULATED[10_000]


@pytest.mark.slow
def test_xaes_accumulated_a_million_times() -> None:
    assert accumulate(1_000_000) == ACCUMULATED[1_000_000]
