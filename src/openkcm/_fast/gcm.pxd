# SPDX-License-Identifier: Apache-2.0
# AES-256-GCM through EVP, shared by the key wrapping and the record ciphers. Every function returns 1 for
# done, 0 for a tag that did not verify, -1 when OpenSSL failed.
from libc.stdint cimport uint8_t

from .openssl cimport EVP_CIPHER_CTX

cdef EVP_CIPHER_CTX *gcm_new(bint encrypt) noexcept nogil
cdef int gcm_seal_start(EVP_CIPHER_CTX *context, const uint8_t *key, const uint8_t *nonce,
                        const uint8_t *aad, int aad_size) noexcept nogil
cdef int gcm_seal_part(EVP_CIPHER_CTX *context, uint8_t *output, const uint8_t *data, int size) noexcept nogil
cdef int gcm_seal_end(EVP_CIPHER_CTX *context, uint8_t *tag) noexcept nogil
cdef int gcm_open_start(EVP_CIPHER_CTX *context, const uint8_t *key, const uint8_t *nonce,
                        const uint8_t *aad, int aad_size) noexcept nogil
cdef int gcm_open_part(EVP_CIPHER_CTX *context, uint8_t *output, const uint8_t *data, int size) noexcept nogil
cdef int gcm_open_end(EVP_CIPHER_CTX *context, const uint8_t *tag) noexcept nogil
cdef int gcm_more_aad(EVP_CIPHER_CTX *context, bint encrypt, const uint8_t *aad, int aad_size) noexcept nogil
