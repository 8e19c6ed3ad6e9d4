/* SPDX-License-Identifier: Apache-2.0
 * The C loop on intel-ipsec-mb's direct calls; random bytes come from OpenSSL as ever.
 */
#include <intel-ipsec-mb.h>
#include <openssl/crypto.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

struct cipher {
    struct gcm_key_data key;
    struct gcm_context_data state;
};

static IMB_MGR *manager;
static char engine[80];

static int cipher_open(struct cipher *cipher, int encrypt)
{
    (void)cipher;
    (void)encrypt;
    return 1;
}

static void cipher_close(struct cipher *cipher)
{
    OPENSSL_cleanse(cipher, sizeof *cipher);
}

static int seal_start(struct cipher *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size)
{
    if (key != NULL)
        IMB_AES256_GCM_PRE(manager, key, &cipher->key);
    IMB_AES256_GCM_INIT(manager, &cipher->key, &cipher->state, nonce, aad, (uint64_t)aad_size);
    return 1;
}

static int seal_part(struct cipher *cipher, uint8_t *output, const uint8_t *data, size_t size)
{
    IMB_AES256_GCM_ENC_UPDATE(manager, &cipher->key, &cipher->state, output, data, size);
    return 1;
}

static int seal_end(struct cipher *cipher, uint8_t *tag)
{
    IMB_AES256_GCM_ENC_FINALIZE(manager, &cipher->key, &cipher->state, tag, 16);
    return 1;
}

static int open_start(struct cipher *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size)
{
    return seal_start(cipher, key, nonce, aad, aad_size);
}

static int open_part(struct cipher *cipher, uint8_t *output, const uint8_t *data, size_t size)
{
    IMB_AES256_GCM_DEC_UPDATE(manager, &cipher->key, &cipher->state, output, data, size);
    return 1;
}

static int open_end(struct cipher *cipher, const uint8_t *tag)
{
    uint8_t computed[16];
    IMB_AES256_GCM_DEC_FINALIZE(manager, &cipher->key, &cipher->state, computed, 16);
    return CRYPTO_memcmp(computed, tag, 16) == 0;
}

static int seal_whole(struct cipher *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size,
                      uint8_t *output, const uint8_t *data, size_t size, uint8_t *tag)
{
    if (key != NULL)
        IMB_AES256_GCM_PRE(manager, key, &cipher->key);
    IMB_AES256_GCM_ENC(manager, &cipher->key, &cipher->state, output, data, size, nonce, aad, (uint64_t)aad_size, tag,
                       16);
    return 1;
}

static int open_whole(struct cipher *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size,
                      uint8_t *output, const uint8_t *data, size_t size, const uint8_t *tag)
{
    uint8_t computed[16];

    if (key != NULL)
        IMB_AES256_GCM_PRE(manager, key, &cipher->key);
    IMB_AES256_GCM_DEC(manager, &cipher->key, &cipher->state, output, data, size, nonce, aad, (uint64_t)aad_size,
                       computed, 16);
    return CRYPTO_memcmp(computed, tag, 16) == 0;
}

#include "loop.h"

int cloop_start(void)
{
    IMB_ARCH architecture;

    manager = alloc_mb_mgr(0);
    if (manager == NULL)
        return 0;
    init_mb_mgr_auto(manager, &architecture);
    snprintf(engine, sizeof engine, "intel-ipsec-mb %s, %s", imb_get_version_str(),
             architecture == IMB_ARCH_AVX512 ? "AVX-512" : architecture == IMB_ARCH_AVX2 ? "AVX2" : "SSE or AVX");
    return 1;
}

const char *cloop_engine(void)
{
    return engine;
}
