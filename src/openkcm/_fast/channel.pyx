# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""The inner channel: data keys between two processes, sealed under keys that only their native layers know.

Invariant: the ephemeral private key, the shared secret and the session keys are only in secret memory, and at work
in libcrypto's own transient objects, which are cleansed within the call; an offer agrees once; no counter, and so no
nonce, is used twice under a session key; and data keys go from slot to ciphertext and from ciphertext to slot.

X25519 (RFC 7748), HKDF with SHA-256 (RFC 5869), AES-256-GCM with the nonces of TLS 1.3 (RFC 8446, section 5.3).
"""

from hashlib import sha256

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcpy

from .arena cimport OK, Slot, exhausted, slot_give, slot_take
from .batch cimport bound_size
from .gcm cimport Gcm, forget, gcm_begin, gcm_end, gcm_open, gcm_seal, libcrypto
from .openssl cimport *
from .secret cimport *

cdef extern from "engine.h" nogil:
    ctypedef struct Libcrypto "okc_libcrypto":
        EVP_PKEY *EVP_PKEY_new_raw_private_key(int kind, void *engine, const uint8_t *key, size_t size) noexcept nogil
        EVP_PKEY *EVP_PKEY_new_raw_public_key(int kind, void *engine, const uint8_t *key, size_t size) noexcept nogil
        int EVP_PKEY_get_raw_public_key(const EVP_PKEY *key, uint8_t *output, size_t *size) noexcept nogil
        void EVP_PKEY_free(EVP_PKEY *key) noexcept nogil
        EVP_PKEY_CTX *EVP_PKEY_CTX_new(EVP_PKEY *key, void *engine) noexcept nogil
        void EVP_PKEY_CTX_free(EVP_PKEY_CTX *context) noexcept nogil
        int EVP_PKEY_derive_init(EVP_PKEY_CTX *context) noexcept nogil
        int EVP_PKEY_derive_set_peer(EVP_PKEY_CTX *context, EVP_PKEY *peer) noexcept nogil
        int EVP_PKEY_derive(EVP_PKEY_CTX *context, uint8_t *output, size_t *size) noexcept nogil
        EVP_KDF *EVP_KDF_fetch(void *library, const char *name, const char *properties) noexcept nogil
        void EVP_KDF_free(EVP_KDF *method) noexcept nogil
        EVP_KDF_CTX *EVP_KDF_CTX_new(EVP_KDF *method) noexcept nogil
        void EVP_KDF_CTX_free(EVP_KDF_CTX *context) noexcept nogil
        int EVP_KDF_derive(EVP_KDF_CTX *context, uint8_t *output, size_t size, const OSSL_PARAM *params) noexcept nogil
        void ERR_clear_error() noexcept nogil

cdef extern from *:
    """
    static inline uint64_t okc_count_add(uint64_t *count, uint64_t more)
    {
        return __atomic_fetch_add(count, more, __ATOMIC_SEQ_CST);
    }
    static inline uint64_t okc_count_get(uint64_t *count) { return __atomic_load_n(count, __ATOMIC_SEQ_CST); }
    """
    uint64_t okc_count_add(uint64_t *count, uint64_t more) nogil
    uint64_t okc_count_get(uint64_t *count) nogil

cdef enum:
    COUNTER = 8
    EXTRA = 24                      # counter and tag
    HALF = 44                       # one direction: key 32, IV 12
    SHARED = 96                     # where the shared secret lies in a channel's slot until the keys are derived
    ROOM = 128
    ALIGNED = 64                    # what the engine wants of a cipher's place

cdef uint64_t LIMIT = <uint64_t>1 << 32

cdef bytes FORWARD = b"openkcm/v1/channel/initiator to responder"
cdef bytes BACKWARD = b"openkcm/v1/channel/responder to initiator"


# ---- the primitives; each returns 1 for done, 0 for a refused peer, -1 when OpenSSL failed ---------------------

cdef int x25519_public(const uint8_t *private, uint8_t *public) noexcept nogil:
    cdef const Libcrypto *lib = <const Libcrypto *>libcrypto()
    cdef size_t size = KEY
    cdef EVP_PKEY *own = lib.EVP_PKEY_new_raw_private_key(EVP_PKEY_X25519, NULL, private, KEY)
    cdef int status = -1
    if own != NULL and lib.EVP_PKEY_get_raw_public_key(own, public, &size) == 1 and size == KEY:
        status = 1
    lib.EVP_PKEY_free(own)
    if status != 1:
        lib.ERR_clear_error()       # the queue is the process's: Python's ssl would find it there
    forget()
    return status


cdef int x25519_shared(const uint8_t *private, const uint8_t *peer, uint8_t *shared) noexcept nogil:
    """RFC 7748, section 6.1; OpenSSL refuses the all-zero result that a point of small order gives."""
    cdef const Libcrypto *lib = <const Libcrypto *>libcrypto()
    cdef size_t size = KEY
    cdef EVP_PKEY *own = lib.EVP_PKEY_new_raw_private_key(EVP_PKEY_X25519, NULL, private, KEY)
    cdef EVP_PKEY *other = lib.EVP_PKEY_new_raw_public_key(EVP_PKEY_X25519, NULL, peer, KEY)
    cdef EVP_PKEY_CTX *context = NULL
    cdef int status = -1
    if own != NULL and other != NULL:
        context = lib.EVP_PKEY_CTX_new(own, NULL)
    if context != NULL and lib.EVP_PKEY_derive_init(context) == 1:
        status = 0
        if (lib.EVP_PKEY_derive_set_peer(context, other) == 1
                and lib.EVP_PKEY_derive(context, shared, &size) == 1 and size == KEY):
            status = 1
    lib.EVP_PKEY_CTX_free(context)
    lib.EVP_PKEY_free(own)
    lib.EVP_PKEY_free(other)
    if status != 1:
        lib.ERR_clear_error()
    forget()
    return status


cdef int hkdf_sha256(const uint8_t *secret, size_t secret_size, const uint8_t *salt, size_t salt_size,
                     const uint8_t *info, size_t info_size, uint8_t *output, size_t size) noexcept nogil:
    """RFC 5869, extract and expand."""
    cdef const Libcrypto *lib = <const Libcrypto *>libcrypto()
    cdef EVP_KDF *method = lib.EVP_KDF_fetch(NULL, b"HKDF", NULL)
    cdef EVP_KDF_CTX *context = NULL
    cdef OSSL_PARAM params[5]
    cdef int status = -1
    if method != NULL:
        context = lib.EVP_KDF_CTX_new(method)
    if context != NULL:
        params[0] = OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, b"SHA256", 0)
        params[1] = OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_KEY, <void *>secret, secret_size)
        params[2] = OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_SALT, <void *>salt, salt_size)
        params[3] = OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_INFO, <void *>info, info_size)
        params[4] = OSSL_PARAM_construct_end()
        status = 1 if lib.EVP_KDF_derive(context, output, size, params) == 1 else -1
    lib.EVP_KDF_CTX_free(context)
    lib.EVP_KDF_free(method)
    if status != 1:
        lib.ERR_clear_error()
    forget()
    return status


cdef int derive(uint8_t *room, const uint8_t *salt, const uint8_t *first, size_t first_size,
                const uint8_t *second, size_t second_size) noexcept nogil:
    """Turn the shared secret in a channel's slot into its two halves, and wipe it."""
    cdef int status = hkdf_sha256(room + SHARED, KEY, salt, KEY, first, first_size, room, HALF)
    if status == 1:
        status = hkdf_sha256(room + SHARED, KEY, salt, KEY, second, second_size, room + HALF, HALF)
    OPENSSL_cleanse(room + SHARED, KEY)
    return status


cdef object no_agreement():
    return configuration_error()(
        "this OpenSSL, as it is configured, offers no X25519 or no HKDF with SHA-256, which the inner channel needs; "
        "use the default provider for them (OPENSSL_CONF, OPENKCM_LIBCRYPTO)"
    )


# ---- handles -------------------------------------------------------------------------------------------

cdef class ChannelOffer(Secret):
    """One side's ephemeral X25519 key pair: it agrees with one peer, once."""

    cdef int spent
    cdef bytes own_public

    def __repr__(self):
        return f"<ChannelOffer{' wiped' if self.wiped else ''}>"

    @property
    def public(self):
        """The public key, 32 bytes (RFC 7748)."""
        return self.own_public

    def agree(self, bytes peer_public not None, bytes transcript not None, bint initiator):
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
        cdef Channel channel
        if PyBytes_GET_SIZE(peer_public) != KEY:
            raise invalid_error()("an X25519 public key has 32 bytes")
        if okc_atomic_swap(&self.spent, 1):
            raise memory_error()("this offer has agreed before; make a new one with offer_channel()")
        try:
            channel = Channel.__new__(Channel)
            channel.allocate(ROOM)
            agree_into(self, channel, peer_public, sha256(transcript).digest(), initiator)
        finally:
            self.wipe()
        return channel


cdef class Channel(Secret):
    """The two session keys of an agreement, one a direction, in secret memory."""

    cdef uint64_t count
    cdef bint initiator

    def __repr__(self):
        return f"<Channel{' wiped' if self.wiped else ''}>"

    @property
    def sent(self):
        """How many messages this side has sealed; at most 2**32."""
        return min(okc_count_get(&self.count), LIMIT)


cdef int agree_into(ChannelOffer offer, Channel channel, bytes peer, bytes salt, bint initiator) except -1:
    cdef uint8_t *private = offer.enter()
    cdef uint8_t *room = channel.slot.data
    cdef const uint8_t *other = <const uint8_t *>PyBytes_AS_STRING(peer)
    cdef const uint8_t *salted = <const uint8_t *>PyBytes_AS_STRING(salt)
    cdef const uint8_t *forward = <const uint8_t *>PyBytes_AS_STRING(FORWARD)
    cdef const uint8_t *backward = <const uint8_t *>PyBytes_AS_STRING(BACKWARD)
    cdef size_t forward_size = <size_t>PyBytes_GET_SIZE(FORWARD)
    cdef size_t backward_size = <size_t>PyBytes_GET_SIZE(BACKWARD)
    cdef int status
    with nogil:
        status = x25519_shared(private, other, room + SHARED)
        if status == 1:
            status = derive(room, salted, forward, forward_size, backward, backward_size)
    offer.leave()
    channel.initiator = initiator
    if status != 1:
        channel.wipe()
        raise decrypt_error()() if status == 0 else no_agreement()
    return 0


def offer_channel():
    """Make an ephemeral X25519 key pair whose private half is only in secret memory.

    Raises:
        ConfigurationError: this OpenSSL offers no X25519.
        SecretMemoryError: no memory could be locked for it.
    """
    cdef ChannelOffer offer = ChannelOffer.__new__(ChannelOffer)
    offer.allocate(KEY)
    random_fill(offer.slot.data, KEY, True)
    return with_public(offer)


cdef ChannelOffer with_public(ChannelOffer offer):
    offer.own_public = PyBytes_FromStringAndSize(NULL, KEY)
    if x25519_public(offer.slot.data, <uint8_t *>PyBytes_AS_STRING(offer.own_public)) != 1:
        raise no_agreement()
    return offer


# ---- messages ------------------------------------------------------------------------------------------

cdef int cross(const uint8_t *half, uint64_t counter, bint sealing, const uint8_t *bound, int bound_size,
               uint8_t *output, const uint8_t *data, int size, uint8_t *tag) noexcept nogil:
    """Seal or open one message under a direction's key; -2 when no memory could be locked for the cipher."""
    cdef uint8_t nonce[NONCE]
    cdef Slot place
    cdef Gcm *cipher
    cdef int at, status
    # In secret memory rather than on the stack: with libIPSec_MB the key's schedule lies in it.
    if slot_take(&place, sizeof(Gcm) + ALIGNED) != OK:
        return -2
    cipher = <Gcm *>((<size_t>place.data + ALIGNED - 1) & ~<size_t>(ALIGNED - 1))
    memcpy(nonce, half + KEY, NONCE)
    for at in range(COUNTER):
        nonce[NONCE - 1 - at] ^= <uint8_t>((counter >> (8 * at)) & 0xFF)
    status = gcm_begin(cipher, sealing, True)
    if status == 1 and sealing:
        status = gcm_seal(cipher, half, nonce, bound, bound_size, output, data, size, tag)
    elif status == 1:
        status = gcm_open(cipher, half, nonce, bound, bound_size, output, data, size, tag)
    gcm_end(cipher)
    slot_give(&place)
    OPENSSL_cleanse(nonce, NONCE)
    return status


cdef object crossed(int status):
    """The error for a message that did not cross."""
    if status == -2:
        return memory_error()(exhausted())
    return decrypt_error()() if status == 0 else internal_error()("the cipher could not work on a message")


cdef bytes in_order(uint64_t counter):
    return int(counter).to_bytes(COUNTER, "big")


def seal_keys(Channel channel not None, SecretKeys keys not None, *aad):
    """Seal data keys for the channel's other end: counter (8) || ciphertext (32 each) || tag (16).

    Args:
        channel: the session; any number of threads may use it at once.
        keys: 1 to 16,384 data keys.
        aad: what the message is for, whose parts are put together; the other end must name the same.

    Raises:
        LimitExceeded: this side has sealed 2**32 messages in this session; agree on a new one.
        SecretMemoryError: the channel or the keys were wiped or belong to the process before a fork.
    """
    cdef bytes sealed, bound
    cdef uint8_t *target
    cdef const uint8_t *bound_at
    cdef int bound_bytes, status
    cdef int size = <int>(keys.count * KEY)
    cdef uint8_t *room = channel.enter()
    cdef uint8_t *data
    cdef uint64_t counter
    try:
        data = keys.enter()
        try:
            counter = okc_count_add(&channel.count, 1)
            if counter >= LIMIT:
                raise limit_error()("this session has sealed 2**32 messages, which is all it may; agree on a new one")
            bound = b"".join((*aad, in_order(counter)))
            bound_bytes = bound_size(bound)
            bound_at = <const uint8_t *>PyBytes_AS_STRING(bound)
            sealed = PyBytes_FromStringAndSize(NULL, size + EXTRA)
            target = <uint8_t *>PyBytes_AS_STRING(sealed)
            memcpy(target, bound_at + bound_bytes - COUNTER, COUNTER)
            with nogil:
                status = cross(room if channel.initiator else room + HALF, counter, True, bound_at, bound_bytes,
                               target + COUNTER, data, size, target + COUNTER + size)
        finally:
            keys.leave()
    finally:
        channel.leave()
    if status != 1:
        raise crossed(status)
    return sealed


def open_keys(Channel channel not None, bytes sealed not None, *aad):
    """Open what the channel's other end sealed; the keys come out in secret memory.

    A message may be opened more than once, and in any order: what must happen once is for ``aad`` to say.

    Raises:
        DecryptError: another length, channel, direction or ``aad`` than it was sealed with, or altered.
        SecretMemoryError: the channel was wiped or belongs to the process before a fork, or no memory could be locked.
    """
    cdef Py_ssize_t size = PyBytes_GET_SIZE(sealed) - EXTRA
    cdef const uint8_t *source = <const uint8_t *>PyBytes_AS_STRING(sealed)
    cdef bytes bound
    cdef const uint8_t *bound_at
    cdef int bound_bytes, status
    cdef uint8_t *room = channel.enter()
    cdef uint64_t counter
    cdef SecretKeys keys
    try:
        if size < KEY or size % KEY or size // KEY > MOST_KEYS:
            raise decrypt_error()()
        counter = int.from_bytes(sealed[:COUNTER], "big")
        if counter >= LIMIT:
            raise decrypt_error()()
        bound = b"".join((*aad, sealed[:COUNTER]))
        bound_bytes = bound_size(bound)
        bound_at = <const uint8_t *>PyBytes_AS_STRING(bound)
        keys = new_keys(size // KEY)
        with nogil:
            status = cross(room + HALF if channel.initiator else room, counter, False, bound_at, bound_bytes,
                           keys.slot.data, source + COUNTER, <int>size, <uint8_t *>source + COUNTER + size)
    finally:
        channel.leave()
    if status != 1:
        keys.wipe()
        raise crossed(status)
    return keys


# ---- for test vectors only: nothing in the package calls these ------------------------------------------

def _offer_of(bytes private not None):
    """An offer with a given private key."""
    cdef ChannelOffer offer = ChannelOffer.__new__(ChannelOffer)
    if PyBytes_GET_SIZE(private) != KEY:
        raise invalid_error()("an X25519 private key has 32 bytes")
    offer.allocate(KEY)
    memcpy(offer.slot.data, PyBytes_AS_STRING(private), KEY)
    return with_public(offer)


def _skip_to(Channel channel not None, uint64_t sent):
    """Have the channel go on as if it had sealed so many messages."""
    channel.count = sent


def _x25519(bytes private not None, bytes public not None):
    """The shared secret (RFC 7748, section 5); None when it is all zero."""
    cdef bytes shared = PyBytes_FromStringAndSize(NULL, KEY)
    if PyBytes_GET_SIZE(private) != KEY or PyBytes_GET_SIZE(public) != KEY:
        raise invalid_error()("X25519 keys have 32 bytes")
    if x25519_shared(<const uint8_t *>PyBytes_AS_STRING(private), <const uint8_t *>PyBytes_AS_STRING(public),
                     <uint8_t *>PyBytes_AS_STRING(shared)) != 1:
        return None
    return shared


def _hkdf(bytes secret not None, bytes salt not None, bytes info not None, Py_ssize_t size):
    """HKDF with SHA-256 (RFC 5869)."""
    cdef bytes output = PyBytes_FromStringAndSize(NULL, size)
    if hkdf_sha256(<const uint8_t *>PyBytes_AS_STRING(secret), <size_t>PyBytes_GET_SIZE(secret),
                   <const uint8_t *>PyBytes_AS_STRING(salt), <size_t>PyBytes_GET_SIZE(salt),
                   <const uint8_t *>PyBytes_AS_STRING(info), <size_t>PyBytes_GET_SIZE(info),
                   <uint8_t *>PyBytes_AS_STRING(output), <size_t>size) != 1:
        raise no_agreement()
    return output
