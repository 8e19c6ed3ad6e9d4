/* SPDX-License-Identifier: Apache-2.0
 * The C loop on OpenSSL's EVP, call for call as src/openkcm/_fast/gcm.pyx.
 */
#include <openssl/core_names.h>
#include <openssl/evp.h>
#include <stddef.h>
#include <stdint.h>

struct cipher {
    EVP_CIPHER_CTX *context;
    OSSL_PARAM tag[2];
};

static EVP_CIPHER *aes_256_gcm;

static int cipher_open(struct cipher *cipher, int encrypt)
{
    cipher->context = EVP_CIPHER_CTX_new();
    cipher->tag[0] = OSSL_PARAM_construct_octet_string(OSSL_CIPHER_PARAM_AEAD_TAG, NULL, 16);
    cipher->tag[1] = OSSL_PARAM_construct_end();
    return cipher->context != NULL && EVP_CipherInit_ex(cipher->context, aes_256_gcm, NULL, NULL, NULL, encrypt) == 1;
}

static void cipher_close(struct cipher *cipher)
{
    EVP_CIPHER_CTX_free(cipher->context);
}

static int seal_start(struct cipher *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size)
{
    int written;
    return EVP_EncryptInit_ex(cipher->context, NULL, NULL, key, nonce) == 1
        && (aad_size == 0 || EVP_EncryptUpdate(cipher->context, NULL, &written, aad, aad_size) == 1);
}

static int seal_part(struct cipher *cipher, uint8_t *output, const uint8_t *data, size_t size)
{
    int written;
    return EVP_EncryptUpdate(cipher->context, output, &written, data, (int)size) == 1;
}

static int seal_end(struct cipher *cipher, uint8_t *tag)
{
    int written;

    cipher->tag[0].data = tag;
    return EVP_EncryptFinal_ex(cipher->context, tag, &written) == 1
        && EVP_CIPHER_CTX_get_params(cipher->context, cipher->tag) == 1;
}

static int open_start(struct cipher *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size)
{
    int written;
    return EVP_DecryptInit_ex(cipher->context, NULL, NULL, key, nonce) == 1
        && (aad_size == 0 || EVP_DecryptUpdate(cipher->context, NULL, &written, aad, aad_size) == 1);
}

static int open_part(struct cipher *cipher, uint8_t *output, const uint8_t *data, size_t size)
{
    int written;
    return EVP_DecryptUpdate(cipher->context, output, &written, data, (int)size) == 1;
}

static int open_end(struct cipher *cipher, const uint8_t *tag)
{
    int written;
    uint8_t unused[16];

    cipher->tag[0].data = (void *)(uintptr_t)tag;
    return EVP_CIPHER_CTX_set_params(cipher->context, cipher->tag) == 1
        && EVP_DecryptFinal_ex(cipher->context, unused, &written) == 1;
}

static int seal_whole(struct cipher *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size,
                      uint8_t *output, const uint8_t *data, size_t size, uint8_t *tag)
{
    return seal_start(cipher, key, nonce, aad, aad_size) && seal_part(cipher, output, data, size)
        && seal_end(cipher, tag);
}

static int open_whole(struct cipher *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size,
                      uint8_t *output, const uint8_t *data, size_t size, const uint8_t *tag)
{
    return open_start(cipher, key, nonce, aad, aad_size) && open_part(cipher, output, data, size)
        && open_end(cipher, tag);
}

#include "loop.h"

/* Call once before all else; 1 when the engine can be used. */
int cloop_start(void)
{
    aes_256_gcm = EVP_CIPHER_fetch(NULL, "AES-256-GCM", NULL);
    return aes_256_gcm != NULL;
}

const char *cloop_engine(void)
{
    return OpenSSL_version(OPENSSL_VERSION);
}
