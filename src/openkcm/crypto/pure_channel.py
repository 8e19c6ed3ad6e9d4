# SPDX-License-Identifier: Apache-2.0
"""The inner channel of the Cython-free backend: the same names and bytes as ``openkcm._fast.channel``.

Invariant: it refuses what the native backend refuses, with the same errors, and each opens what the other sealed. Its
promises about memory are weaker, as ``pure`` says: private key and session keys *rest* in secret memory, but at every
use ``cryptography`` keeps copies of them, of the shared secret and of the data keys on the heap until they are
collected, and those are not zeroed there.
"""

from __future__ import annotations

import os
import threading
from hashlib import sha256
from typing import Final

from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from ..errors import ConfigurationError, DecryptError, InvalidInput, LimitExceeded, SecretMemoryError
from ..limits import (
    CHANNEL_COUNTER_BYTES,
    KEY_BYTES,
    MAX_CHANNEL_MESSAGES,
    MAX_KEYS_PER_CALL,
    NONCE_BYTES,
    TAG_BYTES,
)
from .memory import Slot, lent, overwrite
from .pure import SecretKeys

__all__ = ["Channel", "ChannelOffer", "offer_channel", "open_keys", "seal_keys"]

_HALF: Final = KEY_BYTES + NONCE_BYTES
_FORWARD: Final = b"openkcm/v1/channel/initiator to responder"
_BACKWARD: Final = b"openkcm/v1/channel/responder to initiator"


class ChannelOffer(Slot):
    """One side's ephemeral X25519 key pair: it agrees with one peer, once."""

    def __init__(self, private: bytes) -> None:
        super().__init__(KEY_BYTES)
        self._spent = threading.Lock()
        with self as slot:
            slot[:] = private
        try:
            self._public = X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
        except UnsupportedAlgorithm:
            raise ConfigurationError(
                "the OpenSSL of `cryptography` offers no X25519, which the inner channel needs"
            ) from None

    def __repr__(self) -> str:
        return f"<ChannelOffer{' wiped' if self.wiped else ''}>"

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes (RFC 7748)."""
        return self._public

    def agree(self, peer_public: bytes, transcript: bytes, initiator: bool) -> Channel:
        """Make the channel with the owner of ``peer_public``; the offer is wiped, whatever the outcome.

        Args:
            peer_public: the other side's public key, 32 bytes.
            transcript: what both sides said; they get the same keys only if they name the same.
            initiator: whether this side spoke first. The two sides must differ.

        Raises:
            DecryptError: the peer's key is a point of small order (RFC 7748, section 6.1).
            InvalidInput: ``peer_public`` has not 32 bytes.
            SecretMemoryError: this offer has agreed before, was wiped, or belongs to the process before a fork.
        """
        if len(peer_public) != KEY_BYTES:
            raise InvalidInput("an X25519 public key has 32 bytes")
        if not self._spent.acquire(blocking=False):
            raise SecretMemoryError("this offer has agreed before; make a new one with offer_channel()")
        try:
            with self as slot, lent(slot) as private:
                shared = _x25519(private, peer_public)
        finally:
            self.wipe()
        if shared is None:
            raise DecryptError
        try:
            return Channel(shared, sha256(transcript).digest(), initiator)
        finally:
            overwrite(shared)


class Channel(Slot):
    """The two session keys of an agreement, one a direction, in secret memory."""

    def __init__(self, shared: bytes, salt: bytes, initiator: bool) -> None:
        super().__init__(2 * _HALF)
        self._count = 0
        self._counting = threading.Lock()
        forward, backward = slice(0, _HALF), slice(_HALF, 2 * _HALF)
        self._sends, self._receives = (forward, backward) if initiator else (backward, forward)
        with self as slot:
            for part, info in ((forward, _FORWARD), (backward, _BACKWARD)):
                derived = _hkdf(shared, salt, info, _HALF)
                slot[part] = derived
                overwrite(derived)

    def __repr__(self) -> str:
        return f"<Channel{' wiped' if self.wiped else ''}>"

    @property
    def sent(self) -> int:
        """How many messages this side has sealed; at most 2**32."""
        return self._count

    def _next(self) -> int:
        with self._counting:
            if self._count >= MAX_CHANNEL_MESSAGES:
                raise LimitExceeded(
                    "this session has sealed 2**32 messages, which is all it may; agree on a new one"
                )
            self._count += 1
            return self._count - 1


def offer_channel() -> ChannelOffer:
    """Make an ephemeral X25519 key pair whose private half rests in secret memory.

    Raises:
        ConfigurationError: the OpenSSL of ``cryptography`` offers no X25519.
        SecretMemoryError: no memory could be locked for it.
    """
    private = os.urandom(KEY_BYTES)
    try:
        return ChannelOffer(private)
    finally:
        overwrite(private)


def _nonce(iv: memoryview, counter: int) -> bytes:
    """The nonce of a message (RFC 8446, section 5.3)."""
    return (int.from_bytes(iv, "big") ^ counter).to_bytes(NONCE_BYTES, "big")


def seal_keys(channel: Channel, keys: SecretKeys, *aad: bytes) -> bytes:
    """Seal data keys for the channel's other end: counter (8) || ciphertext (32 each) || tag (16).

    Args:
        channel: the session; any number of threads may use it at once.
        keys: 1 to 16,384 data keys.
        aad: what the message is for, whose parts are put together; the other end must name the same.

    Raises:
        LimitExceeded: this side has sealed 2**32 messages in this session; agree on a new one.
        SecretMemoryError: the channel or the keys were wiped or belong to the process before a fork.
    """
    with channel as slot, keys as data:
        half = slot[channel._sends]
        counter = channel._next()
        head = counter.to_bytes(CHANNEL_COUNTER_BYTES, "big")
        with lent(half[:KEY_BYTES]) as key, lent(data) as plain:
            nonce, bound = _nonce(half[KEY_BYTES:], counter), b"".join((*aad, head))
            return head + AESGCM(key).encrypt(nonce, plain, bound)


def open_keys(channel: Channel, sealed: bytes, *aad: bytes) -> SecretKeys:
    """Open what the channel's other end sealed; the keys come out in secret memory.

    A message may be opened more than once, and in any order: what must happen once is for ``aad`` to say.

    Raises:
        DecryptError: another length, channel, direction or ``aad`` than it was sealed with, or altered.
        SecretMemoryError: the channel was wiped or belongs to the process before a fork, or no memory could be locked.
    """
    with channel as slot:
        half = slot[channel._receives]
        count, rest = divmod(len(sealed) - CHANNEL_COUNTER_BYTES - TAG_BYTES, KEY_BYTES)
        head = sealed[:CHANNEL_COUNTER_BYTES]
        counter = int.from_bytes(head, "big")
        if rest or not 1 <= count <= MAX_KEYS_PER_CALL or counter >= MAX_CHANNEL_MESSAGES:
            raise DecryptError
        keys = SecretKeys(count)
        try:
            with lent(half[:KEY_BYTES]) as key:
                nonce = _nonce(half[KEY_BYTES:], counter)
                plain = AESGCM(key).decrypt(nonce, sealed[CHANNEL_COUNTER_BYTES:], b"".join((*aad, head)))
        except InvalidTag:
            keys.wipe()
            raise DecryptError from None
    with keys as target:
        target[:] = plain
    overwrite(plain)
    return keys


# ---- the primitives, and for test vectors the first two -------------------------------------------------


def _offer_of(private: bytes) -> ChannelOffer:
    """An offer with a given private key."""
    if len(private) != KEY_BYTES:
        raise InvalidInput("an X25519 private key has 32 bytes")
    return ChannelOffer(private)


def _skip_to(channel: Channel, sent: int) -> None:
    """Have the channel go on as if it had sealed so many messages."""
    channel._count = sent


def _x25519(private: bytes, public: bytes) -> bytes | None:
    """The shared secret (RFC 7748, section 5); None when it is all zero."""
    if len(private) != KEY_BYTES or len(public) != KEY_BYTES:
        raise InvalidInput("X25519 keys have 32 bytes")
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError:  # `cryptography` refuses the result of a point of small order
        return None


def _hkdf(secret: bytes, salt: bytes, info: bytes, size: int) -> bytes:
    """HKDF with SHA-256 (RFC 5869)."""
    return HKDF(SHA256(), size, salt, info).derive(secret)
