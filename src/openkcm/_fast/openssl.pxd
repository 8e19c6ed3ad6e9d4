# SPDX-License-Identifier: Apache-2.0
# The part of libcrypto 3.x that the native layer uses (man pages EVP_EncryptInit(3), RAND_bytes(3)).
from libc.stddef cimport size_t

cdef extern from "openssl/core_names.h" nogil:
    const char *OSSL_CIPHER_PARAM_AEAD_TAG
    const char *OSSL_KDF_PARAM_DIGEST
    const char *OSSL_KDF_PARAM_KEY
    const char *OSSL_KDF_PARAM_SALT
    const char *OSSL_KDF_PARAM_INFO

cdef extern from "openssl/params.h" nogil:
    ctypedef struct OSSL_PARAM:
        void *data
    OSSL_PARAM OSSL_PARAM_construct_utf8_string(const char *name, char *text, size_t size)
    OSSL_PARAM OSSL_PARAM_construct_octet_string(const char *name, void *data, size_t size)
    OSSL_PARAM OSSL_PARAM_construct_end()

cdef extern from "openssl/evp.h" nogil:
    ctypedef struct EVP_CIPHER:
        pass
    ctypedef struct EVP_CIPHER_CTX:
        pass

    ctypedef struct EVP_PKEY:
        pass
    ctypedef struct EVP_PKEY_CTX:
        pass
    ctypedef struct EVP_KDF:
        pass
    ctypedef struct EVP_KDF_CTX:
        pass

    enum:
        EVP_PKEY_X25519

cdef extern from "openssl/rand.h" nogil:
    int RAND_bytes(unsigned char *output, int size)

cdef extern from "openssl/crypto.h" nogil:
    void OPENSSL_cleanse(void *pointer, size_t size)
    int CRYPTO_memcmp(const void *first, const void *second, size_t size)
    enum:
        OPENSSL_VERSION
        OPENSSL_INIT_LOAD_CONFIG
