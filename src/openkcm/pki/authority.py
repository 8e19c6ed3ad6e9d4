# SPDX-License-Identifier: Apache-2.0
"""A development CA in a folder, for mutual TLS between Gateways and a Core before there is a real PKI.

Invariant: a file is there whole or not at all, a certificate and its key change together, no key is ever replaced
unless that is what was asked for, and what was revoked is in the CRL before ``revoke`` returns.

::

    pki/                    0700
    ├── ca.crt  ca.key      the CA; its key is 0600, EC P-256
    ├── crl.pem             what was revoked, signed by the CA
    ├── issued/SERIAL/      every certificate that was ever issued: tls.crt, and tls.key (0600) of the newest of a name
    └── NAME -> issued/...  the newest of each name; switched with one rename

A development CA: whoever can read ``ca.key`` can be anybody. It has no HSM, no second person, no online status and
no rotation of its own; a real deployment issues certificates with a PKI of its own (SPIRE, step-ca, cert-manager, a
company's CA), and OpenKCM needs nothing from this one.
"""

from __future__ import annotations

import datetime
import enum
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from ..errors import AlreadyExists, ConfigurationError, InvalidInput, KeyNotFound
from ..identity import SPIFFE, check_identity, identity_of
from . import certificates
from .certificates import Role, check_leaf_name
from .files import locked, read_ca_key, read_certificate, switch, sync, write

WARNING: Final = (
    "this is a development CA: whoever can read its key can be anybody. Use a PKI of your own in production"
)
CA_DAYS: Final = 3650
LEAF_DAYS: Final = 90


class CertificateState(enum.StrEnum):
    """What a certificate of the folder is worth now."""

    VALID = "valid"
    REPLACED = "replaced"  # a newer one of its name is in use; it is still accepted until it expires
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class Issued:
    """One certificate that the CA issued."""

    name: str
    role: Role
    identity: str
    sans: tuple[str, ...]
    serial: int
    not_before: datetime.datetime
    not_after: datetime.datetime
    state: CertificateState
    certificate: Path
    """The certificate in PEM; the CA signs it directly, so it is the whole chain."""
    key: Path
    """Its private key in PEM (PKCS #8), for its owner only; not there once it was replaced or revoked."""

    @property
    def der(self) -> bytes:
        """The certificate in DER, read from its file."""
        return read_certificate(self.certificate).public_bytes(Encoding.DER)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class DevelopmentCA:
    """The CA of a folder. Make one with ``create``, open it with ``open``."""

    def __init__(self, folder: Path, now: Callable[[], datetime.datetime] = _now) -> None:
        self.folder = folder.absolute()
        self._now = now
        self.certificate_path = self.folder / "ca.crt"
        self.crl_path = self.folder / "crl.pem"
        self._certificate = read_certificate(self.certificate_path)
        self._key = read_ca_key(self.folder / "ca.key", self._certificate)

    def __repr__(self) -> str:
        return f"<DevelopmentCA {self.folder}>"

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        *,
        days: float = CA_DAYS,
        now: Callable[[], datetime.datetime] = _now,
    ) -> DevelopmentCA:
        """Make a CA in a folder, which is made if it is missing.

        Args:
            days: how long the CA is valid, above 0 and at most 3650.

        Raises:
            AlreadyExists: the folder holds a CA, or anything else.
            InvalidInput: another number of days.
            OSError: the folder cannot be made.
        """
        path = Path(folder).resolve()
        lifetime = certificates.lifetime(days)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        draft.mkdir(mode=0o700)
        try:
            _fill(draft, now, lifetime)
            # Takes the place of nothing, or of an empty folder, and of nothing else.
            draft.rename(path)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise AlreadyExists(
                    f"{path} holds files already, and a CA's keys are never replaced; name another folder"
                ) from None
            raise
        sync(path.parent)
        return cls(path, now)

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], *, now: Callable[[], datetime.datetime] = _now
    ) -> DevelopmentCA:
        """Open the CA of a folder.

        Raises:
            KeyNotFound: there is none.
            ConfigurationError: its key is missing, readable by others, or another CA's.
        """
        if not os.path.lexists(Path(folder) / "ca.crt"):
            raise KeyNotFound(f"there is no CA in {folder}; make one with 'openkcm pki init'")
        return cls(Path(folder), now)

    @property
    def expires(self) -> datetime.datetime:
        """When the CA's own certificate ends, in UTC."""
        return self._certificate.not_valid_after_utc

    @property
    def certificate_der(self) -> bytes:
        """The CA's certificate in DER."""
        return self._certificate.public_bytes(Encoding.DER)

    # ---- issuing -------------------------------------------------------------------------------------

    def issue_server(
        self, name: str, *, dns: Sequence[str] = (), ips: Sequence[str] = (), days: float = LEAF_DAYS
    ) -> Issued:
        """Issue a certificate that a server shows to clients.

        Args:
            name: its folder's and common name, 1 to 64 characters.
            dns: host names by which clients reach it.
            ips: IP addresses by which they do.
            days: how long it is valid, above 0 and at most 3650, and not past the CA's own end.

        Raises:
            AlreadyExists: there is one of that name, which ``renew`` renews.
            InvalidInput: a name, address or number of days that is none; or neither host name nor address.
        """
        sans = [
            *(certificates.dns_name(each) for each in dns),
            *(certificates.ip_address(each) for each in ips),
        ]
        if not sans:
            raise InvalidInput("a server's certificate names at least one host (--dns) or address (--ip)")
        return self._issue(check_leaf_name(name), Role.SERVER, sans, days)

    def issue_client(self, name: str, *, spiffe: str | None = None, days: float = LEAF_DAYS) -> Issued:
        """Issue a certificate that a Gateway, or an operator, shows to a Core.

        Args:
            name: its folder's and common name, 1 to 64 characters.
            spiffe: its SPIFFE ID, which then is its identity; without it, that is ``cn:NAME``.
            days: as in ``issue_server``.

        Raises:
            AlreadyExists: there is one of that name, which ``renew`` renews.
            InvalidInput: a name, SPIFFE ID or number of days that is none.
        """
        check_leaf_name(name)
        sans: list[x509.GeneralName]
        if spiffe is not None:
            if not check_identity(spiffe).startswith(SPIFFE):
                raise InvalidInput("a SPIFFE ID is spiffe://TRUST-DOMAIN/PATH")
            sans = [x509.UniformResourceIdentifier(spiffe)]
        else:
            # Verifiers want an alternative name of some form; an e-mail address is nobody's host.
            sans = [x509.RFC822Name(f"{name}@openkcm.invalid")]
        return self._issue(name, Role.CLIENT, sans, days)

    def renew(self, name: str, *, days: float = LEAF_DAYS) -> Issued:
        """Issue a certificate with the same names for a new key; the old one stays valid until it expires.

        Raises:
            KeyNotFound: there is none of that name, or it was revoked: then issue a new one.
            InvalidInput: a number of days that is none.
        """
        lifetime = certificates.lifetime(days)
        with locked(self.folder):
            found = self.find(name)
            sans = certificates.sans_of(read_certificate(found.certificate))
            old_key = found.key.resolve()  # the same path leads to the new one in a moment
            self._make(name, found.role, sans, lifetime)
            old_key.unlink(missing_ok=True)
        return self.find(name)

    def _issue(self, name: str, role: Role, sans: list[x509.GeneralName], days: float) -> Issued:
        lifetime = certificates.lifetime(days)
        with locked(self.folder):
            if os.path.lexists(self.folder / name):
                raise AlreadyExists(
                    f"there is a certificate {name} already; 'openkcm pki renew {name}' renews it, "
                    f"'openkcm pki revoke {name}' frees the name"
                )
            self._make(name, role, sans, lifetime)
        return self.find(name)

    def _make(
        self, name: str, role: Role, sans: list[x509.GeneralName], lifetime: datetime.timedelta
    ) -> None:
        """Write a new key and certificate into a folder of their own, and have the name lead there."""
        now = self._now()
        if now + lifetime > self.expires:
            raise InvalidInput(f"the CA itself ends on {self.expires:%Y-%m-%d}; ask for fewer days")
        key = certificates.new_key()
        certificate = certificates.leaf_certificate(
            key.public_key(), name, role, sans, (now, lifetime), (self._certificate, self._key)
        )
        target = self.folder / "issued" / f"{certificate.serial_number:040x}"
        target.mkdir(mode=0o700)
        try:
            write(target / "tls.key", certificates.key_pem(key), 0o600)
            # The certificate last: without it, the folder counts for nothing.
            write(target / "tls.crt", certificate.public_bytes(Encoding.PEM), 0o644)
            sync(target.parent)
            switch(self.folder / name, target.relative_to(self.folder))
        except BaseException:
            if (self.folder / name).resolve() != target:
                shutil.rmtree(target, ignore_errors=True)
            raise

    # ---- what there is -------------------------------------------------------------------------------

    def find(self, name: str) -> Issued:
        """The newest certificate of a name.

        Raises:
            KeyNotFound: there is none, or it was revoked.
        """
        path = self.folder / check_leaf_name(name)
        if not path.is_symlink():
            raise KeyNotFound(f"there is no certificate {name} here; 'openkcm pki list' shows those that are")
        current = path.resolve()
        return self._read_issued(current, {current}, self._revoked_serials())

    def issued(self) -> tuple[Issued, ...]:
        """Every certificate that was issued, by name and then the newest first."""
        current = {path.resolve() for path in self.folder.iterdir() if path.is_symlink()}
        revoked = self._revoked_serials()
        # A crash may have left a folder without one.
        folders = [path for path in (self.folder / "issued").iterdir() if (path / "tls.crt").exists()]
        found = [self._read_issued(path, current, revoked) for path in folders]
        found.sort(key=lambda each: each.not_before, reverse=True)
        found.sort(key=lambda each: (each.name, each.certificate.parent.name != each.name))
        return tuple(found)

    def _read_issued(self, folder: Path, current: set[Path], revoked: set[int]) -> Issued:
        certificate = read_certificate(folder / "tls.crt")
        name = str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
        if certificate.serial_number in revoked:
            state = CertificateState.REVOKED
        elif certificate.not_valid_after_utc <= self._now():
            state = CertificateState.EXPIRED
        else:
            state = CertificateState.VALID if folder in current else CertificateState.REPLACED
        # By the path that stays when it is renewed.
        place = self.folder / name if folder in current else folder
        return Issued(
            name=name,
            role=certificates.role_of(certificate),
            identity=identity_of(certificate),
            sans=tuple(map(certificates.san_text, certificates.sans_of(certificate))),
            serial=certificate.serial_number,
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
            state=state,
            certificate=place / "tls.crt",
            key=place / "tls.key",
        )

    # ---- revoking ------------------------------------------------------------------------------------

    def unexpired(self, name: str) -> tuple[Issued, ...]:
        """Those certificates of a name, replaced ones too, that somebody could still show; the newest first."""
        check_leaf_name(name)
        states = (CertificateState.VALID, CertificateState.REPLACED)
        return tuple(each for each in self.issued() if each.name == name and each.state in states)

    def revoke(self, name: str) -> tuple[Issued, ...]:
        """Put every unexpired certificate of a name in the CRL, remove their keys and free the name.

        A CRL is for those who read it. A Core refuses what was revoked in its vault (``Core.revoke_certificate``),
        which is another list and comes first.

        Raises:
            KeyNotFound: the name has no certificate that is not revoked or expired.
        """
        with locked(self.folder):
            found = self.unexpired(name)
            if not found:
                raise KeyNotFound(
                    f"there is no valid certificate {name} here; 'openkcm pki list' shows those that are"
                )
            entries = [*self._crl(), *(_revoked_entry(each.serial, self._now()) for each in found)]
            crl = certificates.crl(self._certificate, self._key, entries, self._now())
            write(self.crl_path, crl, 0o644, replace=True)
            for each in found:
                each.key.unlink(missing_ok=True)
            (self.folder / name).unlink(missing_ok=True)
        return tuple(each for each in self.issued() if each.serial in {one.serial for one in found})

    def _crl(self) -> list[x509.RevokedCertificate]:
        try:
            crl = x509.load_pem_x509_crl(self.crl_path.read_bytes())
        except FileNotFoundError:
            # Without it, what was revoked would look valid.
            raise ConfigurationError(f"{self.crl_path} is missing; put it back") from None
        except ValueError:
            raise ConfigurationError(f"{self.crl_path} holds no CRL in PEM; put the right one back") from None
        if not crl.is_signature_valid(self._key.public_key()):
            raise ConfigurationError(f"{self.crl_path} is not signed by this CA; put the right one back")
        return list(crl)

    def _revoked_serials(self) -> set[int]:
        return {each.serial_number for each in self._crl()}


def _fill(folder: Path, now: Callable[[], datetime.datetime], lifetime: datetime.timedelta) -> None:
    """Make a CA's files."""
    key = certificates.new_key()
    certificate = certificates.ca_certificate(key, now(), lifetime)
    (folder / "issued").mkdir(mode=0o700)
    write(folder / "ca.key", certificates.key_pem(key), 0o600)
    write(folder / "ca.crt", certificate.public_bytes(Encoding.PEM), 0o644)
    write(folder / "crl.pem", certificates.crl(certificate, key, [], now()), 0o644)


def _revoked_entry(serial: int, at: datetime.datetime) -> x509.RevokedCertificate:
    return x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(at).build()
