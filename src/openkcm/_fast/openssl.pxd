# SPDX-License-Identifier: Apache-2.0
# The part of libcrypto 3.x that the native layer uses (man pages EVP_EncryptInit(3), RAND_bytes(3)).
from libc.stddef cimport size_t

cdef extern from "openssl/core_names.h" nogil:
    const char *OSSL_CIPHER_PARAM_AEAD_TAG

cdef extern from "openssl/params.h" nogil:
    ctypedef struct OSSL_PARAM:
        pass
    OSSL_PARAM OSSL_PARAM_construct_octet_string(const char *name, void *data, size_t size)
    OSSL_PARAM OSSL_PARAM_construct_end()

cdef extern from "openssl/evp.h" nogil:
    ctypedef struct EVP_CIPHER:
        pass
    ctypedef struct EVP_CIPHER_CTX:
        pass

    enum:
        EVP_CTRL_AEAD_SET_TAG

    EVP_CIPHER *EVP_CIPHER_fetch(void *library, const char *name, const char *properties)
    EVP_CIPHER_CTX *EVP_CIPHER_CTX_new()
    void EVP_CIPHER_CTX_free(EVP_CIPHER_CTX *context)
    int EVP_CIPHER_CTX_ctrl(EVP_CIPHER_CTX *context, int command, int number, void *pointer)
    int EVP_CIPHER_CTX_get_params(EVP_CIPHER_CTX *context, OSSL_PARAM *params)
    int EVP_EncryptInit_ex(EVP_CIPHER_CTX *context, const EVP_CIPHER *cipher, void *engine,
                           const unsigned char *key, const unsigned char *nonce)
    int EVP_EncryptUpdate(EVP_CIPHER_CTX *context, unsigned char *output, int *written,
                          const unsigned char *data, int size)
    int EVP_EncryptFinal_ex(EVP_CIPHER_CTX *context, unsigned char *output, int *written)
    int EVP_DecryptInit_ex(EVP_CIPHER_CTX *context, const EVP_CIPHER *cipher, void *engine,
                           const unsigned char *key, const unsigned char *nonce)
    int EVP_DecryptUpdate(EVP_CIPHER_CTX *context, unsigned char *output, int *written,
                          const unsigned char *data, int size)
    int EVP_DecryptFinal_ex(EVP_CIPHER_CTX *context, unsigned char *output, int *written)

cdef extern from "openssl/rand.h" nogil:
    int RAND_bytes(unsigned char *output, int size)
    int RAND_priv_bytes(unsigned char *output, int size)

cdef extern from "openssl/crypto.h" nogil:
    void OPENSSL_cleanse(void *pointer, size_t size)
    int CRYPTO_memcmp(const void *first, const void *second, size_t size)
    const char *OpenSSL_version(int kind)
    enum:
        OPENSSL_VERSION
