# SPDX-License-Identifier: Apache-2.0
"""``gcp-kms:`` a root key in Google Cloud KMS: an ENCRYPT_DECRYPT key of the customer's project.

Invariant: the context is the additional authenticated data of every call; both directions carry CRC32C checksums, and
an answer whose checksum does not match, or which another key gave, is not used. The key's primary version encrypts,
and Cloud KMS finds by itself the version that decrypts, so the customer can rotate the key.

A wrapped blob is ``01 || Cloud KMS's ciphertext``. The ciphertext names the key's version, authenticated; no copy of
that name is kept, which could be altered.
"""

from __future__ import annotations

import os
import re
import shlex
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from ...context import encode_context
from ...errors import DecryptError, OpenKCMError, RootMisconfigured, RootUnavailable
from ..base import Grant
from .answers import ANSWERS, DECRYPT_PERMISSION, ENCRYPT_PERMISSION, translated
from .session import ENDPOINT_VARIABLE, Client, check_installed, crc32c, one_call
from .uri import GCPKeyURI, parse_gcp_uri

__all__ = ["ANSWERS", "ENDPOINT_VARIABLE", "GCPRoot", "open_gcp", "parse_blob"]

T = TypeVar("T")

FORMAT: Final = 1
MIN_CIPHERTEXT_BYTES: Final = 28
"""An AES-GCM nonce and tag; Cloud KMS's header comes on top."""
MAX_CIPHERTEXT_BYTES: Final = 16 * 1024
"""A wrapped tenant key takes some hundred bytes; an external key manager may add its own."""
MAX_PLAINTEXT_BYTES: Final = 8 * 1024
"""What every protection level takes, the associated data included."""

ROLE: Final = "roles/cloudkms.cryptoKeyEncrypterDecrypter"

_MEMBER: Final = re.compile(
    r"(?:serviceAccount|user|group):[^\s:@]+@[A-Za-z0-9.-]+(?:\[[A-Za-z0-9_/-]+\])?|principal(?:Set)?://[\x21-\x7e]+",
    re.ASCII,
)
_EMAIL: Final = re.compile(r"[^\s:@]+@[A-Za-z0-9.-]+", re.ASCII)
_ALTERED: Final = "an answer of Cloud KMS came altered, its checksum does not match; try again"

_roots: weakref.WeakSet[GCPRoot] = weakref.WeakSet()


class GCPRoot:
    """A key in Cloud KMS; the login is looked for when the key is first used."""

    development = False

    def __init__(self, key: GCPKeyURI) -> None:
        self._key = key
        self._client: Client | None = None
        self._lock = threading.Lock()
        self.uri = str(key)
        _roots.add(self)

    def __repr__(self) -> str:
        return f"<GCPRoot {self.uri}>"

    def wrap(self, sealed: bytes, context: Mapping[str, str]) -> bytes:
        """Encrypt with the key's primary version, binding the context as additional authenticated data."""
        plaintext, aad = bytes(sealed), encode_context(context)
        if not 0 < len(plaintext) <= MAX_PLAINTEXT_BYTES - len(aad):
            raise RootMisconfigured(
                f"Cloud KMS wraps 1 to {MAX_PLAINTEXT_BYTES} bytes, the encoded context included"
            )
        given = self._ask(
            lambda client: client.encrypt(
                name=self._key.name,
                plaintext=plaintext,
                plaintext_crc32c=crc32c(plaintext),
                additional_authenticated_data=aad,
                additional_authenticated_data_crc32c=crc32c(aad),
            )
        )
        ciphertext = bytes(given.ciphertext)
        if not given.verified_plaintext_crc32c or not given.verified_additional_authenticated_data_crc32c:
            raise RootUnavailable("Cloud KMS did not verify the checksums of what we sent; try again")
        if given.ciphertext_crc32c != crc32c(ciphertext):
            raise RootUnavailable(_ALTERED)
        if not re.fullmatch(re.escape(self._key.name) + r"/cryptoKeyVersions/[1-9][0-9]*", given.name):
            raise RootMisconfigured("Cloud KMS encrypted with another key than it was asked to")
        if not MIN_CIPHERTEXT_BYTES <= len(ciphertext) <= MAX_CIPHERTEXT_BYTES:
            raise RootMisconfigured("Cloud KMS answers with a ciphertext of a length that cannot be")
        return bytes((FORMAT,)) + ciphertext

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        """Decrypt; DecryptError for what the key did not encrypt, or under another context."""
        ciphertext, aad = parse_blob(wrapped), encode_context(context)
        given = self._ask(
            lambda client: client.decrypt(
                name=self._key.name,
                ciphertext=ciphertext,
                ciphertext_crc32c=crc32c(ciphertext),
                additional_authenticated_data=aad,
                additional_authenticated_data_crc32c=crc32c(aad),
            )
        )
        plaintext = bytes(given.plaintext)
        if not plaintext or given.plaintext_crc32c is None:
            raise RootMisconfigured("Cloud KMS answers a decryption without a plaintext or its checksum")
        if given.plaintext_crc32c != crc32c(plaintext):
            raise RootUnavailable(_ALTERED)
        return plaintext

    def grant(self, identity: str | None = None) -> Grant:
        """Say what the customer must run, so that our identity may use the key and do nothing else with it.

        Args:
            identity: a service account's address, or a member in IAM's form (``serviceAccount:``, ``user:``,
                ``group:``, ``principal://``, ``principalSet://``); else the account of the credentials found here.

        Raises:
            RootMisconfigured: a malformed identity, or none that could be found.
            RootUnavailable: the login service that knows it does not answer.
        """
        if identity is None:
            identity = self._ask(Client.email)
            if identity is None:
                raise RootMisconfigured(
                    "these credentials do not tell who we are; name the identity, "
                    "such as serviceAccount:NAME@PROJECT.iam.gserviceaccount.com or principal://..."
                )
        member = _member(identity)
        key = self._key
        command = (
            f"gcloud kms keys add-iam-policy-binding {key.key} --keyring {key.ring} --location {key.location} "
            f"--project {key.project} --member {shlex.quote(member)} --role {ROLE}"
        )
        return Grant("gcloud command", command, (ENCRYPT_PERMISSION, DECRYPT_PERMISSION), member)

    def warnings(self) -> list[str]:
        """What is weak about the login, in words for an operator; the key's own settings we may not read."""
        try:
            email, credentials = self._ask(lambda client: (client.email(), client.credentials))
        except OpenKCMError:
            return []  # a probe says it better
        found = []
        if type(credentials).__module__ == "google.oauth2.credentials":
            found.append(
                "we are logged in to Google Cloud as a person (gcloud); a service needs an account of its own"
            )
        if email is not None and email.endswith(f"@{self._key.project}.iam.gserviceaccount.com"):
            found.append(
                "the root key lies in the project of our own service account: whoever administers that project "
                "can give the key back to us after the customer took it away"
            )
        return found

    def close(self) -> None:
        """Close the connections; the next use logs in anew."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.close()

    # ---- inside --------------------------------------------------------------------------------------

    def _ask(self, use: Callable[[Client], T]) -> T:
        """Use the client, once. What was set up wrongly is looked at anew by the next call, and needs no restart."""
        try:
            with one_call(), translated():
                return use(self._open())
        except RootMisconfigured:
            self.close()
            raise

    def _open(self) -> Client:
        """The client of this process. Many threads may make one at first; the first counts, and none waits."""
        client = self._client
        if client is None:
            made = Client(self._key.endpoint)
            with self._lock:
                client = self._client = self._client or made
            if client is not made:
                made.close()
        return client

    def _forget(self) -> None:
        """In a forked child: its parent's connections are its parent's, and its lock may be held for ever."""
        self._lock = threading.Lock()
        self._client = None


def open_gcp(uri: str, *, create: bool = False) -> GCPRoot:
    """Open a ``gcp-kms:`` root; Cloud KMS is asked when the key is first used. ``create`` has no effect."""
    key = parse_gcp_uri(uri)
    check_installed()
    return GCPRoot(key)


def parse_blob(wrapped: bytes) -> bytes:
    """The ciphertext of a wrapped blob; DecryptError for anything malformed."""
    if wrapped[:1] != bytes((FORMAT,)) or not (
        MIN_CIPHERTEXT_BYTES < len(wrapped) <= MAX_CIPHERTEXT_BYTES + 1
    ):
        raise DecryptError
    return bytes(wrapped[1:])


def _member(identity: str) -> str:
    if _MEMBER.fullmatch(identity):
        return identity
    if _EMAIL.fullmatch(identity):
        kind = "serviceAccount" if identity.endswith(".gserviceaccount.com") else "user"
        return f"{kind}:{identity}"
    raise RootMisconfigured(
        "an identity is an address, or serviceAccount:ADDRESS, user:ADDRESS, group:ADDRESS, principal://... "
        "or principalSet://..."
    )


def _after_fork_in_child() -> None:
    for root in list(_roots):
        root._forget()


os.register_at_fork(after_in_child=_after_fork_in_child)
