# SPDX-License-Identifier: Apache-2.0
# AES-256-GCM by the engine in use, shared by the key wrapping and the record ciphers. Every function returns 1
# for done, 0 for a tag that did not verify, -1 when the engine failed.
from libc.stdint cimport uint8_t, uint64_t

from .openssl cimport EVP_CIPHER_CTX, OSSL_PARAM

cdef extern from "engine.h" nogil:
    bint okc_same_tag(const uint8_t *first, const uint8_t *second)
    void okc_spoil(uint8_t *computed, const uint8_t *tag)
    bint okc_is_zero32(const uint8_t *data)
    void okc_wipe(void *place, size_t size)
    void okc_copy(uint8_t *target, const uint8_t *source, size_t size)
    bint okc_same(const uint8_t *first, const uint8_t *second, size_t size)

    ctypedef struct Method "okc_method":
        void pre(const void *key, void *expanded) noexcept nogil
        void enc(const void *key, void *state, uint8_t *output, const uint8_t *data, uint64_t size,
                 const uint8_t *nonce, const uint8_t *aad, uint64_t aad_size, uint8_t *tag, uint64_t tag_size) noexcept nogil
        void dec(const void *key, void *state, uint8_t *output, const uint8_t *data, uint64_t size,
                 const uint8_t *nonce, const uint8_t *aad, uint64_t aad_size, uint8_t *tag, uint64_t tag_size) noexcept nogil
        void init(const void *key, void *state, const uint8_t *nonce, const uint8_t *aad, uint64_t aad_size) noexcept nogil
        void enc_update(const void *key, void *state, uint8_t *output, const uint8_t *data, uint64_t size) noexcept nogil
        void dec_update(const void *key, void *state, uint8_t *output, const uint8_t *data, uint64_t size) noexcept nogil
        void enc_end(const void *key, void *state, uint8_t *tag, uint64_t tag_size) noexcept nogil
        void dec_end(const void *key, void *state, uint8_t *tag, uint64_t tag_size) noexcept nogil
        size_t key_bytes

    ctypedef struct Gcm "okc_gcm":
        uint8_t *key
        uint8_t *state
        const uint8_t *schedule
        const Method *method
        size_t used
        EVP_CIPHER_CTX *evp
        OSSL_PARAM *tag
        bint encrypt
        bint brief                  # each key serves one record

# A cipher lives on the stack of one call: begin it, use it, end it. `brief` says that each key serves one record.
cdef int gcm_begin(Gcm *cipher, bint encrypt, bint brief) noexcept nogil
cdef int gcm_begin_made(Gcm *cipher, bint encrypt, const uint8_t *schedule) noexcept nogil
cdef void gcm_end(Gcm *cipher) noexcept nogil

# A schedule that is kept beside its key: how many bytes it has (0 where the engine keeps its own), and making it.
cdef size_t gcm_schedule_bytes() noexcept nogil
cdef void gcm_make_schedule(const uint8_t *key, uint8_t *schedule) noexcept nogil

# In one call; a null key keeps the one before. The tag of gcm_open is what was received.
cdef int gcm_seal(Gcm *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size,
                  uint8_t *output, const uint8_t *data, int size, uint8_t *tag) noexcept nogil
cdef int gcm_open(Gcm *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size,
                  uint8_t *output, const uint8_t *data, int size, const uint8_t *tag) noexcept nogil

# The same under the key that is set, without a call in between.
cdef inline int gcm_seal_kept(Gcm *cipher, const uint8_t *nonce, const uint8_t *aad, int aad_size, uint8_t *output,
                              const uint8_t *data, int size, uint8_t *tag) noexcept nogil:
    if cipher.method == NULL:
        return gcm_seal(cipher, NULL, nonce, aad, aad_size, output, data, size, tag)
    cipher.method.enc(cipher.schedule, cipher.state, output, data, <uint64_t>size, nonce, aad, <uint64_t>aad_size, tag, 16)
    return 1


cdef inline int gcm_open_kept(Gcm *cipher, const uint8_t *nonce, const uint8_t *aad, int aad_size, uint8_t *output,
                              const uint8_t *data, int size, const uint8_t *tag) noexcept nogil:
    cdef uint8_t computed[16]
    if cipher.method == NULL:
        return gcm_open(cipher, NULL, nonce, aad, aad_size, output, data, size, tag)
    okc_spoil(computed, tag)
    cipher.method.dec(cipher.schedule, cipher.state, output, data, <uint64_t>size, nonce, aad, <uint64_t>aad_size, computed, 16)
    return okc_same_tag(computed, tag)


# In parts.
cdef int gcm_start(Gcm *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad,
                   int aad_size) noexcept nogil
cdef int gcm_part(Gcm *cipher, uint8_t *output, const uint8_t *data, int size) noexcept nogil
cdef int gcm_seal_end(Gcm *cipher, uint8_t *tag) noexcept nogil
cdef int gcm_open_end(Gcm *cipher, const uint8_t *tag) noexcept nogil

# Random bytes of the libcrypto in use: public ones, and from the generator kept for keys.
cdef int random_public(uint8_t *output, int size) noexcept nogil
cdef int random_private(uint8_t *output, int size) noexcept nogil

# The libcrypto in use, as engine.h's okc_libcrypto, for what is no cipher; what it leaves is wiped by forget().
cdef const void *libcrypto() noexcept nogil
cdef void forget() noexcept nogil
