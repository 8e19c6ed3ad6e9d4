# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""AES-256-GCM (NIST SP 800-38D) through OpenSSL's EVP.

Invariant: a context belongs to one call on one thread; freeing it cleanses the key schedule. A null key
keeps the context's key and only sets the next nonce.
"""

from libc.stdint cimport uint8_t

from .openssl cimport *

cdef enum:
    TAG = 16

cdef EVP_CIPHER *aes_256_gcm


cdef EVP_CIPHER_CTX *gcm_new(bint encrypt) noexcept nogil:
    """A context set to AES-256-GCM with no key yet; NULL when memory is short."""
    cdef EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new()
    cdef int status
    if context == NULL:
        return NULL
    if encrypt:
        status = EVP_EncryptInit_ex(context, aes_256_gcm, NULL, NULL, NULL)
    else:
        status = EVP_DecryptInit_ex(context, aes_256_gcm, NULL, NULL, NULL)
    if status != 1:
        EVP_CIPHER_CTX_free(context)
        return NULL
    return context


cdef int gcm_seal_start(EVP_CIPHER_CTX *context, const uint8_t *key, const uint8_t *nonce,
                        const uint8_t *aad, int aad_size) noexcept nogil:
    cdef int written
    if EVP_EncryptInit_ex(context, NULL, NULL, key, nonce) != 1:
        return -1
    if aad_size and EVP_EncryptUpdate(context, NULL, &written, aad, aad_size) != 1:
        return -1
    return 1


cdef int gcm_seal_part(EVP_CIPHER_CTX *context, uint8_t *output, const uint8_t *data, int size) noexcept nogil:
    cdef int written
    if size and EVP_EncryptUpdate(context, output, &written, data, size) != 1:
        return -1
    return 1


cdef int gcm_seal_end(EVP_CIPHER_CTX *context, uint8_t *tag) noexcept nogil:
    cdef int written
    cdef OSSL_PARAM wanted[2]
    if EVP_EncryptFinal_ex(context, tag, &written) != 1:
        return -1
    # Asking the provider itself is a third cheaper than the control call that builds the same question.
    wanted[0] = OSSL_PARAM_construct_octet_string(OSSL_CIPHER_PARAM_AEAD_TAG, tag, TAG)
    wanted[1] = OSSL_PARAM_construct_end()
    return 1 if EVP_CIPHER_CTX_get_params(context, wanted) == 1 else -1


cdef int gcm_open_start(EVP_CIPHER_CTX *context, const uint8_t *key, const uint8_t *nonce,
                        const uint8_t *aad, int aad_size) noexcept nogil:
    cdef int written
    if EVP_DecryptInit_ex(context, NULL, NULL, key, nonce) != 1:
        return -1
    if aad_size and EVP_DecryptUpdate(context, NULL, &written, aad, aad_size) != 1:
        return -1
    return 1


cdef int gcm_open_part(EVP_CIPHER_CTX *context, uint8_t *output, const uint8_t *data, int size) noexcept nogil:
    cdef int written
    if size and EVP_DecryptUpdate(context, output, &written, data, size) != 1:
        return -1
    return 1


cdef int gcm_open_end(EVP_CIPHER_CTX *context, const uint8_t *tag) noexcept nogil:
    cdef int written
    cdef uint8_t unused[TAG]
    if EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_SET_TAG, TAG, <void *>tag) != 1:
        return -1
    return 1 if EVP_DecryptFinal_ex(context, unused, &written) == 1 else 0


cdef int gcm_more_aad(EVP_CIPHER_CTX *context, bint encrypt, const uint8_t *aad, int aad_size) noexcept nogil:
    """Associated data that stands behind what the start took; GCM takes it in pieces."""
    cdef int written, status
    if aad_size == 0:
        return 1
    if encrypt:
        status = EVP_EncryptUpdate(context, NULL, &written, aad, aad_size)
    else:
        status = EVP_DecryptUpdate(context, NULL, &written, aad, aad_size)
    return 1 if status == 1 else -1


aes_256_gcm = EVP_CIPHER_fetch(NULL, b"AES-256-GCM", NULL)
if aes_256_gcm == NULL:
    raise ImportError("this OpenSSL offers no AES-256-GCM")
