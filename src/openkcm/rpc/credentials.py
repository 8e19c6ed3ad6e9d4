# SPDX-License-Identifier: Apache-2.0
"""What one end of the service shows and trusts: its certificate, the key of it, and the authorities of its peers.

Invariant: a key is read only from a file that its owner alone can read, and belongs to the certificate; a stranger's
chain is trusted only if ``cryptography`` verifies it to our roots, for its purpose and at this moment.

The private key signs, here and in TLS, and lies on this process's heap for as long as it runs, as any TLS server's
does. Who steals it can pose as this end until the certificate is revoked or expires; no data key and no session that
was agreed on before can be opened with it.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, HashAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from ..errors import AccessDenied, ConfigurationError
from ..systemd import is_credential

MAX_CHAIN: Final = 8
"""Certificates that a peer may send."""

MAX_CERTIFICATE_BYTES: Final = 16 * 1024
"""One certificate in DER."""

MAX_FILE_BYTES: Final = 1024 * 1024
"""A PEM file of ours; a bundle of every public authority is a quarter of this."""

REFUSED: Final = "the two ends do not accept each other, or what they said was altered on the way"
"""All that is ever said of a peer that is not who it should be."""

_CURVES: Final[dict[str, HashAlgorithm]] = {"secp256r1": SHA256(), "secp384r1": SHA384()}
_PSS: Final = padding.PSS(padding.MGF1(SHA256()), SHA256.digest_size)


class Credentials:
    """A certificate chain, its private key and trusted roots; immutable, and safe to share between threads.

    Attributes:
        certificates: the chain in DER, our own first.
    """

    def __init__(
        self, chain: Sequence[x509.Certificate], key: Any, roots: Sequence[x509.Certificate]
    ) -> None:
        """Check that the parts fit together.

        Raises:
            ConfigurationError: the key is of no kind that is taken or not the certificate's, the certificate has
                expired, the chain is empty or too long, or there are no roots.
        """
        if not 1 <= len(chain) <= MAX_CHAIN:
            raise ConfigurationError(f"a certificate chain has 1 to {MAX_CHAIN} certificates, our own first")
        if not roots:
            raise ConfigurationError("no roots: name a file with the certificates of the peers' authorities")
        if not _is_strong(key.public_key()):
            raise ConfigurationError(
                "a key is EC P-256 or P-384, Ed25519, or RSA of 2048 to 8192 bits; make another"
            )
        if key.public_key() != chain[0].public_key():
            raise ConfigurationError(
                "the private key is not that of the first certificate; put the right one there"
            )
        if datetime.now(UTC) > chain[0].not_valid_after_utc:
            raise ConfigurationError(
                f"the certificate expired on {chain[0].not_valid_after_utc:%Y-%m-%d %H:%M} UTC; renew it"
            )
        self.certificates: Final = tuple(each.public_bytes(Encoding.DER) for each in chain)
        self._key = key
        self._store = Store(list(roots))

    @classmethod
    def load(
        cls,
        certificate: str | os.PathLike[str],
        key: str | os.PathLike[str],
        roots: str | os.PathLike[str],
    ) -> Credentials:
        """Read them from PEM files.

        Args:
            certificate: our certificate, followed by those between it and its authority.
            key: its private key, not encrypted, in a file that only this user can read.
            roots: the certificates of the authorities that peers' certificates must come from.

        Raises:
            ConfigurationError: a file is missing, unsafe, or not what it should be.
        """
        return cls._read(certificate, key, roots)[0]

    @classmethod
    def _read(
        cls,
        certificate: str | os.PathLike[str],
        key: str | os.PathLike[str],
        roots: str | os.PathLike[str],
    ) -> tuple[Credentials, tuple[bytes, bytes, bytes]]:
        """What ``load`` gives, and the files' contents in the order that a Reading has."""
        chain, chain_pem = _read_certificates(Path(certificate))
        own, key_pem = _read_key(Path(key))
        trusted, roots_pem = _read_certificates(Path(roots))
        return cls(chain, own, trusted), (key_pem, chain_pem, roots_pem)

    @property
    def leaf(self) -> bytes:
        """Our own certificate in DER."""
        return self.certificates[0]

    def sign(self, message: bytes) -> bytes:
        """Sign with our key: ECDSA (SHA-256 on P-256, SHA-384 on P-384), Ed25519, or RSA-PSS with SHA-256."""
        key = self._key
        if isinstance(key, ec.EllipticCurvePrivateKey):
            return key.sign(message, ec.ECDSA(_CURVES[key.curve.name]))
        if isinstance(key, rsa.RSAPrivateKey):
            return key.sign(message, _PSS, SHA256())
        signed: bytes = key.sign(message)
        return signed

    def check_client(self, certificates: Sequence[bytes], leaf: bytes | None) -> x509.Certificate:
        """Return a client's own certificate if it is to be trusted.

        Args:
            certificates: what it says its chain is, in DER.
            leaf: the certificate that TLS verified on this connection, if there is one: then it must be the same,
                and nothing else can be. Without one, the chain is verified to our roots.

        Raises:
            AccessDenied: it is not to be trusted.
        """
        chain = _parsed(certificates)
        if leaf is not None:
            if leaf != certificates[0]:
                raise AccessDenied(REFUSED)
            return chain[0]
        verifier = PolicyBuilder().store(self._store).time(_now()).build_client_verifier()
        try:
            verifier.verify(chain[0], chain[1:])
        except (VerificationError, ValueError):
            raise AccessDenied(REFUSED) from None
        return chain[0]

    def check_server(self, certificates: Sequence[bytes], name: str) -> x509.Certificate:
        """Return a server's own certificate if its chain leads to our roots and it is for this host name or address.

        Raises:
            AccessDenied: it is not to be trusted.
            ConfigurationError: ``name`` is neither a host name nor an address.
        """
        chain = _parsed(certificates)
        policy = PolicyBuilder().store(self._store).time(_now())
        try:
            verifier = policy.build_server_verifier(_subject(name))
        except (ValueError, TypeError):
            raise ConfigurationError("a server's name is a host name in ASCII, or an IP address") from None
        try:
            verifier.verify(chain[0], chain[1:])
        except (VerificationError, ValueError):
            raise AccessDenied(REFUSED) from None
        return chain[0]

    def __repr__(self) -> str:
        return "<Credentials>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("credentials cannot be pickled or copied")


@dataclass(frozen=True, slots=True, repr=False)
class Reading:
    """Credentials as one look into the files found them.

    Attributes:
        credentials: for the inner channel.
        pem: for TLS, of the very same bytes: key, chain and roots.
    """

    credentials: Credentials
    pem: tuple[bytes, bytes, bytes]


def read_files(
    certificate: str | os.PathLike[str], key: str | os.PathLike[str], roots: str | os.PathLike[str]
) -> Reading:
    """As ``Credentials.load``, for who needs the PEM too."""
    return Reading(*Credentials._read(certificate, key, roots))


def check_signature(certificate: x509.Certificate, signature: bytes, message: bytes) -> None:
    """Raise AccessDenied unless this certificate's key made the signature; see ``Credentials.sign``."""
    try:
        key = certificate.public_key()
        if not _is_strong(key):
            raise AccessDenied(REFUSED)
        if isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(signature, message, ec.ECDSA(_CURVES[key.curve.name]))
        elif isinstance(key, rsa.RSAPublicKey):
            key.verify(signature, message, _PSS, SHA256())
        elif isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, message)
    except (InvalidSignature, ValueError):
        raise AccessDenied(REFUSED) from None


def _is_strong(key: Any) -> bool:
    """Whether it is a public key of a kind that is taken. Not over 8192 bits: strangers make us compute with them."""
    if isinstance(key, ec.EllipticCurvePublicKey):
        return key.curve.name in _CURVES
    if isinstance(key, rsa.RSAPublicKey):
        return 2048 <= key.key_size <= 8192
    return isinstance(key, ed25519.Ed25519PublicKey)


def _belongs(key: Any, certificate: x509.Certificate) -> bool:
    try:
        return bool(key.public_key() == certificate.public_key())
    except (ValueError, UnsupportedAlgorithm):
        return False  # the certificate's is of a kind that is not known, and the key's is


def _parsed(certificates: Sequence[bytes]) -> list[x509.Certificate]:
    if not 1 <= len(certificates) <= MAX_CHAIN:
        raise AccessDenied(REFUSED)
    if any(len(each) > MAX_CERTIFICATE_BYTES for each in certificates):
        raise AccessDenied(REFUSED)
    try:
        chain = [x509.load_der_x509_certificate(each) for each in certificates]
        chain[0].public_key()
    except Exception:
        # Whatever it is that cannot be read in what a stranger sent, the answer is the same.
        raise AccessDenied(REFUSED) from None
    return chain


def _subject(name: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _now() -> datetime:
    return datetime.now(UTC)


# ---- files ---------------------------------------------------------------------------------------------


def _read_certificates(path: Path) -> tuple[list[x509.Certificate], bytes]:
    data, _ = _read(path)
    try:
        return x509.load_pem_x509_certificates(data), data
    except ValueError:
        raise ConfigurationError(f"{path} holds no certificates in PEM; put the right file there") from None


def _read_key(path: Path) -> tuple[Any, bytes]:
    data, status = _read(path)
    credential = is_credential(path)
    if status.st_uid != os.geteuid() and not (credential and status.st_uid == 0):
        raise ConfigurationError(
            f"the private key {path} belongs to another user; chown it to the one that runs this"
        )
    if status.st_mode & (0o007 if credential else 0o077):
        raise ConfigurationError(
            f"the private key {path} can be read by others; assume they have: replace it, and chmod 600 the new one"
        )
    try:
        return load_pem_private_key(data, password=None), data
    except TypeError:
        raise ConfigurationError(
            f"the private key {path} has a passphrase; store it without one, mode 600"
        ) from None
    except Exception:
        # Nothing of what the parser says: it may quote the file.
        raise ConfigurationError(f"{path} holds no private key in PEM; put the right file there") from None


def _read(path: Path) -> tuple[bytes, os.stat_result]:
    """A file's bytes, and the state of the very file that was read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
                raise ConfigurationError(f"{path} is not a regular file of at most {MAX_FILE_BYTES} bytes")
            with os.fdopen(descriptor, "rb", closefd=False) as stream:
                return stream.read(MAX_FILE_BYTES), status
        finally:
            os.close(descriptor)
    except OSError as error:
        reason = os.strerror(error.errno or errno.EIO).lower()
        raise ConfigurationError(f"{path} cannot be read: {reason}") from None
