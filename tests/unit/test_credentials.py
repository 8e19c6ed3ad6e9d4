# SPDX-License-Identifier: Apache-2.0
"""Certificates and keys in files: what is taken, and what each mistake is told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat

from certificates import CLIENT, HOUR, NOW, Authority, key_of, pem_of, write_key, write_pem
from openkcm.errors import ConfigurationError
from openkcm.rpc.credentials import MAX_FILE_BYTES, Credentials
from support import refused

CA = Authority()
MIDDLE = Authority("middle", CA)
NAME = x509.UniformResourceIdentifier("spiffe://example/gateway/one")


class Files:
    """A certificate, its key and the roots, where they should be."""

    def __init__(self, folder: Path, kind: str = "p256", ca: Authority = CA) -> None:
        key = key_of(kind)
        self.folder = folder
        self.certificate = write_pem(folder / "one.crt", ca.issue(key, CLIENT, NAME))
        self.key = write_key(folder / "one.key", pem_of(key))
        self.roots = write_pem(folder / "roots.crt", [CA.certificate, Authority().certificate])

    def load(self) -> Credentials:
        return Credentials.load(self.certificate, str(self.key), self.roots)


@pytest.mark.parametrize("kind", ["p256", "p384", "ed25519", "rsa"])
def test_they_are_read(kind: str, tmp_path: Path) -> None:
    files = Files(tmp_path, kind, MIDDLE)
    credentials = files.load()
    chain = x509.load_pem_x509_certificates(files.certificate.read_bytes())
    assert credentials.certificates == tuple(each.public_bytes(Encoding.DER) for each in chain)
    assert len(credentials.certificates) == 2
    assert credentials.leaf == credentials.certificates[0]
    assert credentials.check_client(credentials.certificates, None) == chain[0]


def encrypted(files: Files) -> None:
    data = key_of("p256").private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    write_key(files.key, data)


def pipe(files: Files) -> None:
    files.key.unlink()
    os.mkfifo(files.key, 0o600)


def expired(files: Files) -> None:
    write_pem(files.certificate, CA.issue(key_of("p256"), CLIENT, NAME, until=NOW - HOUR))


def x25519(files: Files) -> None:
    write_key(files.key, pem_of(X25519PrivateKey.generate()))


MISTAKES: dict[str, tuple[Callable[[Files], object], str]] = {
    "no certificate": (lambda files: files.certificate.unlink(), "one.crt cannot be read: no such file"),
    "no key": (lambda files: files.key.unlink(), "one.key cannot be read: no such file"),
    "no roots": (lambda files: files.roots.unlink(), "roots.crt cannot be read: no such file"),
    "a folder": (lambda files: setattr(files, "roots", files.folder), "not a regular file"),
    "a pipe": (pipe, "not a regular file"),
    "too large": (
        lambda files: files.roots.write_bytes(bytes(MAX_FILE_BYTES + 1)),
        "not a regular file of at most",
    ),
    "the group reads the key": (lambda files: files.key.chmod(0o640), "chmod 600"),
    "others read the key": (lambda files: files.key.chmod(0o604), "chmod 600"),
    "another's key": (lambda files: write_key(files.key, pem_of(key_of("p256", 1))), "not that of the first"),
    "a key with a passphrase": (encrypted, "passphrase"),
    "a key that signs nothing": (x25519, "EC P-256 or P-384"),
    "a weak key": (lambda files: write_key(files.key, pem_of(key_of("rsa1024"))), "EC P-256 or P-384"),
    "another curve": (lambda files: write_key(files.key, pem_of(key_of("p521"))), "EC P-256 or P-384"),
    "no key in it": (lambda files: write_key(files.key, b"nothing"), "holds no private key"),
    "a certificate for a key": (
        lambda files: write_key(files.key, files.certificate.read_bytes()),
        "holds no private key",
    ),
    "a key for a certificate": (
        lambda files: setattr(files, "certificate", files.key),
        "holds no certificates",
    ),
    "empty roots": (lambda files: files.roots.write_bytes(b""), "holds no certificates"),
    "expired": (expired, "expired on"),
    "a long chain": (
        lambda files: write_pem(files.certificate, CA.issue(key_of("p256"), CLIENT, NAME) * 9),
        "1 to 8 certificates",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_told(mistake: str, tmp_path: Path) -> None:
    files = Files(tmp_path)
    make, words = MISTAKES[mistake]
    make(files)
    told = str(refused(files.load, ConfigurationError))
    assert words in told
    assert "PRIVATE" not in told
    assert "-----" not in told


def test_another_users_key_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Files(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: files.key.stat().st_uid + 1)
    assert "another user" in str(refused(files.load, ConfigurationError))


def test_roots_are_needed() -> None:
    key = key_of("p256")
    refused(lambda: Credentials(CA.issue(key, CLIENT, NAME), key, []), ConfigurationError)
    refused(lambda: Credentials([], key, [CA.certificate]), ConfigurationError)
