# SPDX-License-Identifier: Apache-2.0
"""Google Cloud KMS on loopback, as its REST reference (v1) describes it, for Google's own SDK.

Invariant: it encrypts for real (AES-256-GCM under a key of the version), binds the additional authenticated data, and
checks and returns the checksums; a version is used only while it is ENABLED, and by whom the key's policy lets.

Two service accounts log in: ``core@openkcm``, to which each key grants the role cryptoKeyEncrypterDecrypter and whose
file ``settings`` names; and ``customer@...``, who administers the keys and may not use them, in ``customer_file``.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote

from ..base import FakeProvider
from ..https import Request, Response, Server
from . import errors
from .keys import GCPKey, Version, VersionState
from .login import FEDERATED, GoogleLogin, ServiceAccount

__all__ = ["GCPKMS", "GCPKey", "Version", "VersionState"]

PROJECT: Final = "customer-project"
LOCATION: Final = "europe-west3"
RING: Final = "openkcm"
USE_TO_ENCRYPT: Final = "cloudkms.cryptoKeyVersions.useToEncrypt"
USE_TO_DECRYPT: Final = "cloudkms.cryptoKeyVersions.useToDecrypt"
_PATH: Final = re.compile(
    r"/v1/(?P<key>projects/[^/]+/locations/[^/]+/keyRings/[^/]+/cryptoKeys/[^/:]+)"
    r"(?P<list>/cryptoKeyVersions(?:/(?P<version>[0-9]+))?)?(?::(?P<verb>[A-Za-z]+))?",
    re.ASCII,
)
_STATES: Final = ("UNSPECIFIED", "ENABLED", "DISABLED", "DESTROYED", "DESTROY_SCHEDULED")
_LEVELS: Final = ("UNSPECIFIED", "SOFTWARE", "HSM", "EXTERNAL", "EXTERNAL_VPC")


class GCPKMS(FakeProvider):
    """Cloud KMS and Google's login on one port.

    ``login`` has the levers of the login service; ``core`` and ``customer`` are the two accounts.
    """

    permissions = (USE_TO_ENCRYPT, USE_TO_DECRYPT)

    def __init__(self) -> None:
        super().__init__()
        self._server: Server | None = None
        self._folder: Path | None = None
        self._keys: dict[str, GCPKey] = {}
        self._login: GoogleLogin | None = None
        self._accounts: tuple[ServiceAccount, ServiceAccount] | None = None

    def start(self) -> None:
        """Listen on a free port of 127.0.0.1, and write the accounts' files into a private folder."""
        self._folder = Path(tempfile.mkdtemp(prefix="openkcm-testing-gcp-"))
        self._login = GoogleLogin(self._folder)
        self._server = Server(self._handle, tls=True)
        self._login.url = self._server.url
        self._accounts = (
            self._login.make_account("core", "openkcm"),
            self._login.make_account("customer", PROJECT),
        )

    def stop(self) -> None:
        """Close the port, end what is held, and remove the files."""
        for key in self._keys.values():
            key.heal()
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def settings(self) -> Mapping[str, str]:
        """How Google's SDK logs in, what it trusts, and where we send it."""
        server, folder = self._running()
        return {
            "GOOGLE_APPLICATION_CREDENTIALS": str(folder / "core.json"),
            "REQUESTS_CA_BUNDLE": str(server.authority),
            "OPENKCM_GCP_ENDPOINT": server.url,
            "NO_GCE_CHECK": "true",
        }

    def make_key(self, name: str) -> GCPKey:
        """Make a customer's key, which ``core`` may encrypt and decrypt with."""
        resource = f"projects/{PROJECT}/locations/{LOCATION}/keyRings/{RING}/cryptoKeys/{name}"
        key = GCPKey(name, f"gcp-kms://{resource}", resource=resource)
        self._keys[resource] = key
        return key

    @property
    def url(self) -> str:
        """Where the service is."""
        return self._running()[0].url

    @property
    def login(self) -> GoogleLogin:
        """Google's login."""
        assert self._login is not None, "it is not started"
        return self._login

    @property
    def core(self) -> ServiceAccount:
        """Our account."""
        assert self._accounts is not None, "it is not started"
        return self._accounts[0]

    @property
    def customer(self) -> ServiceAccount:
        """The customer's administrator."""
        assert self._accounts is not None, "it is not started"
        return self._accounts[1]

    @property
    def customer_file(self) -> Path:
        """Credentials of the customer's administrator."""
        return self._running()[1] / "customer.json"

    def _running(self) -> tuple[Server, Path]:
        assert self._server is not None and self._folder is not None, "it is not started"
        return self._server, self._folder

    # ---- requests ----------------------------------------------------------------------------------------

    def _handle(self, request: Request) -> Response:
        served = self.login.serve(request)
        if served is not None:
            return served
        match = _PATH.fullmatch(unquote(request.path))
        if match is None:
            return Response(
                404,
                b"<!DOCTYPE html><title>Error 404 (Not Found)!!1</title>",
                (("Content-Type", "text/html"),),
            )
        key = self._keys.get(match["key"])
        fault = key.fault() if key is not None else None
        if fault is not None:
            return fault
        who = self.login.who(request)
        if isinstance(who, Response):
            return who
        call = self._route(request.method, bool(match["list"]), match["version"] is not None, match["verb"])
        if call is None:
            return errors.status("NOT_FOUND", "Method not found.")
        permission, serve = call
        if key is None or not self._may(who, key, permission):
            if key is None and who == self.customer.email:
                return errors.status("NOT_FOUND", f"CryptoKey {match['key']} not found.")
            return _said(key, errors.denied(permission, match["key"]))
        number = int(match["version"]) if match["version"] else None
        if number is not None and number not in key.versions:
            return errors.status("NOT_FOUND", f"CryptoKeyVersion {key.version_name(number)} not found.")
        try:
            body = request.json() if request.body else {}
            return serve(_Call(key, number, body if isinstance(body, dict) else {}, request))
        except (ValueError, TypeError, KeyError):
            return errors.status("INVALID_ARGUMENT", "Invalid JSON payload received.")

    def _may(self, who: str, key: GCPKey, permission: str) -> bool:
        if permission in self.permissions:
            return who in (self.core.email, FEDERATED) and key.may(permission)
        return who == self.customer.email

    def _route(
        self, method: str, versions: bool, version: bool, verb: str | None
    ) -> tuple[str, Callable[[_Call], Response]] | None:
        routes: dict[tuple[str, bool, bool, str | None], tuple[str, Callable[[_Call], Response]]] = {
            ("POST", False, False, "encrypt"): (USE_TO_ENCRYPT, _encrypt),
            ("POST", True, True, "encrypt"): (USE_TO_ENCRYPT, _encrypt),
            ("POST", False, False, "decrypt"): (USE_TO_DECRYPT, _decrypt),
            ("GET", False, False, None): ("cloudkms.cryptoKeys.get", _get_key),
            ("POST", False, False, "updatePrimaryVersion"): ("cloudkms.cryptoKeys.update", _update_primary),
            ("GET", True, False, None): ("cloudkms.cryptoKeyVersions.list", _list_versions),
            ("POST", True, False, None): ("cloudkms.cryptoKeyVersions.create", _create_version),
            ("GET", True, True, None): ("cloudkms.cryptoKeyVersions.get", _get_version),
            ("PATCH", True, True, None): ("cloudkms.cryptoKeyVersions.update", _update_version),
            ("POST", True, True, "destroy"): ("cloudkms.cryptoKeyVersions.destroy", _destroy_version),
            ("POST", True, True, "restore"): ("cloudkms.cryptoKeyVersions.restore", _restore_version),
        }
        return routes.get((method, versions, version, verb))


@dataclass(frozen=True, slots=True)
class _Call:
    key: GCPKey
    number: int | None
    body: dict[str, Any]
    request: Request

    def octets(self, name: str) -> bytes:
        try:
            return base64.b64decode(str(self.body.get(name, "")).translate({45: 43, 95: 47}), validate=True)
        except binascii.Error:
            raise ValueError(name) from None

    def checked(self, name: str) -> tuple[bytes, bool] | Response:
        """A field's bytes, and whether its checksum came and was right; the refusal of a wrong one."""
        data, given = self.octets(name), self.body.get(f"{name}Crc32c")
        if given is not None and int(given) != _crc32c(data):
            snake = re.sub("[A-Z]", lambda found: "_" + found[0].lower(), name)
            message = f"The checksum in field {snake}_crc32c did not match the data in field {snake}."
            return errors.status("INVALID_ARGUMENT", message)
        return data, given is not None

    def enum(self, names: tuple[str, ...], name: str) -> str | int:
        """An enum's value as this caller wants it: its name, or its number."""
        asked = "".join(self.request.query.get("$alt", []))
        return names.index(name) if "enum-encoding=int" in asked else name


def _crc32c(data: bytes) -> int:
    return int(importlib.import_module("google_crc32c").value(data))


def _said(key: GCPKey | None, refusal: Response) -> Response:
    if key is not None:
        key.say_no()
    return refusal


def _unusable(key: GCPKey, number: int) -> Response | None:
    """Why a version does not encrypt or decrypt now, if it does not."""
    if key.purpose != "ENCRYPT_DECRYPT":
        # The real service's words for this are not documented.
        return errors.status("INVALID_ARGUMENT", f"{key.resource} has purpose {key.purpose}.")
    state = key.versions[number].state
    return (
        None
        if state is VersionState.ENABLED
        else _said(key, errors.not_enabled(key.version_name(number), state))
    )


def _encrypt(call: _Call) -> Response:
    key, number = call.key, call.number or call.key.primary
    plaintext, aad = call.checked("plaintext"), call.checked("additionalAuthenticatedData")
    if isinstance(plaintext, Response):
        return plaintext
    if isinstance(aad, Response):
        return aad
    refused = _unusable(key, number)
    if refused is not None:
        return refused
    if not plaintext[0] or len(plaintext[0]) + len(aad[0]) > 8192:
        return errors.status("INVALID_ARGUMENT", "The plaintext is empty or too long.")
    ciphertext = key.seal(number, plaintext[0], aad[0])
    return Response(
        200,
        {
            "name": key.version_name(number),
            "ciphertext": base64.b64encode(ciphertext).decode(),
            "ciphertextCrc32c": str(_crc32c(ciphertext)),
            "verifiedPlaintextCrc32c": plaintext[1],
            "verifiedAdditionalAuthenticatedDataCrc32c": aad[1],
            "protectionLevel": call.enum(_LEVELS, key.level),
        },
    )


def _decrypt(call: _Call) -> Response:
    key = call.key
    ciphertext, aad = call.checked("ciphertext"), call.checked("additionalAuthenticatedData")
    if isinstance(ciphertext, Response):
        return ciphertext
    if isinstance(aad, Response):
        return aad
    number = key.version_of(ciphertext[0])
    if isinstance(number, Response):
        return number
    refused = _unusable(key, number)
    if refused is not None:
        return refused
    plaintext = key.open(number, ciphertext[0], aad[0])
    if isinstance(plaintext, Response):
        return plaintext
    if key.faults.lie:
        plaintext = secrets.token_bytes(len(plaintext))
    return Response(
        200,
        {
            "plaintext": base64.b64encode(plaintext).decode(),
            "plaintextCrc32c": str(_crc32c(plaintext)),
            "usedPrimary": number == key.primary,
            "protectionLevel": call.enum(_LEVELS, key.level),
        },
    )


# ---- what a customer's administrator does -------------------------------------------------------------------


def _version_json(call: _Call, number: int) -> dict[str, Any]:
    return {
        "name": call.key.version_name(number),
        "state": call.enum(_STATES, call.key.versions[number].state),
        "protectionLevel": call.enum(_LEVELS, call.key.level),
    }


def _get_key(call: _Call) -> Response:
    key = call.key
    purposes = ("UNSPECIFIED", "ENCRYPT_DECRYPT")
    purpose = call.enum(purposes, key.purpose) if key.purpose in purposes else key.purpose
    return Response(
        200,
        {"name": key.resource, "primary": _version_json(call, key.primary), "purpose": purpose},
    )


def _list_versions(call: _Call) -> Response:
    found = [_version_json(call, number) for number in sorted(call.key.versions)]
    return Response(200, {"cryptoKeyVersions": found, "totalSize": len(found)})


def _get_version(call: _Call) -> Response:
    assert call.number is not None
    return Response(200, _version_json(call, call.number))


def _create_version(call: _Call) -> Response:
    return Response(200, _version_json(call, call.key.add_version()))


def _update_primary(call: _Call) -> Response:
    number = int(call.body["cryptoKeyVersionId"])
    if number not in call.key.versions:
        return errors.status("NOT_FOUND", f"CryptoKeyVersion {call.key.version_name(number)} not found.")
    call.key.primary = number
    return _get_key(call)


def _update_version(call: _Call) -> Response:
    wanted = call.body["state"]
    state = VersionState(_STATES[wanted] if isinstance(wanted, int) else wanted)
    return _moved(call, state, {VersionState.ENABLED, VersionState.DISABLED})


def _destroy_version(call: _Call) -> Response:
    return _moved(call, VersionState.DESTROY_SCHEDULED, {VersionState.ENABLED, VersionState.DISABLED})


def _restore_version(call: _Call) -> Response:
    return _moved(call, VersionState.DISABLED, {VersionState.DESTROY_SCHEDULED})


def _moved(call: _Call, state: VersionState, allowed: set[VersionState]) -> Response:
    assert call.number is not None
    now = call.key.versions[call.number].state
    if now not in allowed:
        name = call.key.version_name(call.number)
        return errors.status(
            "FAILED_PRECONDITION",
            f"The request cannot be fulfilled. Resource {name} has value {now} in field crypto_key_version.state.",
        )
    call.key.move(call.number, state)
    return _get_version(call)
