/* SPDX-License-Identifier: Apache-2.0
 *
 * What a program written in C alone would do for each record of a batch: the yardstick of bench/.
 *
 * It makes the cipher calls, the copies and the layout of src/openkcm/_fast (wrapping.pyx, aead.pyx) and nothing
 * else: no Python objects, no secret memory, no checks of what the caller passes. An engine (evp.c, ipsec_mb.c) defines
 * `struct cipher` and the functions declared first, and includes this file after them:
 *
 *   cipher_open, cipher_close     one context a batch and direction
 *   seal_whole, open_whole        one message in one piece; a null key keeps the one before
 *   seal_start, seal_part, seal_end, open_start, open_part, open_end
 *                                 one message in pieces. All return 1 on success.
 *
 * Layout of a record, as in openkcm/envelope.py:
 *   head 20 | service key version 4 | wrapped data key 24 + 32 + 16 | nonce 12 | ciphertext of 32 zeros and n bytes | tag 16
 */
#include <openssl/crypto.h>
#include <openssl/rand.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    HEAD = 24,          /* with the service key version */
    KEY = 32,
    NONCE = 12,
    TAG = 16,
    WRAP_NONCE = 24,    /* XAES: the first half names the subkey of the batch, the second counts */
    WRAPPED = WRAP_NONCE + KEY + TAG,
    COMMITMENT = 32,
    BODY = HEAD + WRAPPED + NONCE,
    OVERHEAD = BODY + COMMITMENT + TAG,
    RECORD_AAD = 19,    /* magic, suite, kind, service id, and the tag byte of "no context" */
    WRAP_AAD = 56,      /* label, tenant, region, service id, version and kind, each with its length */
    SMALL = 2048,       /* records up to here are put together for one call, as in aead.pyx */
    NONCES = 1024,      /* nonces drawn at a time */
};

static const uint8_t head[HEAD] = {'O', 'K', 'C', 1, 1, 1};
static const uint8_t record_aad[RECORD_AAD] = {'O', 'K', 'C', 1, 1, 1};
static const uint8_t wrap_aad[WRAP_AAD] = {0, 13, 'o', 'p', 'e', 'n', 'k', 'c', 'm', '/', 'v', '1', '/', 'L', '4'};
static const uint8_t zeros[COMMITMENT];
static const uint8_t subkey[KEY] = {7};

static void count_up(uint8_t *counter)
{
    for (int at = NONCE - 1; at >= 0 && ++counter[at] == 0; at--)
        ;
}

/* n wrapped data keys, each at `stride` from the one before, under the subkey of the batch. */
static int wrap_keys(const uint8_t *keys, size_t count, uint8_t *output, size_t stride)
{
    uint8_t nonce[WRAP_NONCE];
    struct cipher cipher;
    int done = cipher_open(&cipher, 1) && RAND_bytes(nonce, WRAP_NONCE) == 1;

    for (size_t at = 0; done && at < count; at++, output += stride) {
        memcpy(output, nonce, WRAP_NONCE);
        done = seal_whole(&cipher, at ? NULL : subkey, nonce + NONCE, wrap_aad, WRAP_AAD, output + WRAP_NONCE,
                          keys + at * KEY, KEY, output + WRAP_NONCE + KEY);
        count_up(nonce + NONCE);
    }
    cipher_close(&cipher);
    return done;
}

static int unwrap_keys(const uint8_t *wrapped, size_t count, size_t stride, uint8_t *keys)
{
    struct cipher cipher;
    int done = cipher_open(&cipher, 0);

    for (size_t at = 0; done && at < count; at++, wrapped += stride)
        done = open_whole(&cipher, at ? NULL : subkey, wrapped + NONCE, wrap_aad, WRAP_AAD, keys + at * KEY,
                          wrapped + WRAP_NONCE, KEY, wrapped + WRAP_NONCE + KEY);
    cipher_close(&cipher);
    return done;
}

static int seal_record(struct cipher *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *data,
                       size_t size, uint8_t *output)
{
    memcpy(output + HEAD + WRAPPED, nonce, NONCE);
    output += BODY;
    if (size <= SMALL) {
        memset(output, 0, COMMITMENT);
        memcpy(output + COMMITMENT, data, size);
        return seal_whole(cipher, key, nonce, record_aad, RECORD_AAD, output, output, COMMITMENT + size,
                          output + COMMITMENT + size);
    }
    return seal_start(cipher, key, nonce, record_aad, RECORD_AAD) && seal_part(cipher, output, zeros, COMMITMENT)
        && seal_part(cipher, output + COMMITMENT, data, size) && seal_end(cipher, output + COMMITMENT + size);
}

static int open_record(struct cipher *cipher, const uint8_t *key, const uint8_t *blob, size_t size, uint8_t *output)
{
    uint8_t scratch[COMMITMENT + SMALL];
    const uint8_t *data = blob + BODY;
    const uint8_t *tag = data + COMMITMENT + size;
    int done;

    if (size <= SMALL)
        done = open_whole(cipher, key, data - NONCE, record_aad, RECORD_AAD, scratch, data, COMMITMENT + size, tag);
    else
        done = open_start(cipher, key, data - NONCE, record_aad, RECORD_AAD)
            && open_part(cipher, scratch, data, COMMITMENT)
            && open_part(cipher, output, data + COMMITMENT, size) && open_end(cipher, tag);
    if (!done || CRYPTO_memcmp(scratch, zeros, COMMITMENT) != 0)
        return 0;
    if (size <= SMALL)
        memcpy(output, scratch + COMMITMENT, size);
    return 1;
}

static int seal_records(const uint8_t *records, size_t size, size_t count, size_t keys_used, const uint8_t *keys,
                        uint8_t *output)
{
    uint8_t nonces[NONCES * NONCE];
    struct cipher cipher;
    int done = cipher_open(&cipher, 1);

    for (size_t at = 0; done && at < count; at++, output += size + OVERHEAD) {
        if (at % NONCES == 0)
            done = RAND_bytes(nonces, (int)((count - at < NONCES ? count - at : NONCES) * NONCE)) == 1;
        if (keys_used == 1 && at)
            memcpy(output + HEAD, output + HEAD - (size + OVERHEAD), WRAPPED);
        memcpy(output, head, HEAD);
        done = done && seal_record(&cipher, keys_used == 1 && at ? NULL : keys + (keys_used == 1 ? 0 : at) * KEY,
                                   nonces + at % NONCES * NONCE, records + at * size, size, output);
    }
    cipher_close(&cipher);
    return done;
}

/* Encrypt `count` records of `size` bytes, contiguous, into contiguous envelopes. 1 when all went well. */
int cloop_encrypt(const uint8_t *records, size_t size, size_t count, int key_each, uint8_t *output)
{
    size_t keys_used = key_each ? count : 1;
    uint8_t *keys = malloc(keys_used * KEY);
    int done = keys != NULL && RAND_bytes(keys, (int)(keys_used * KEY)) == 1
        && wrap_keys(keys, keys_used, output + HEAD, size + OVERHEAD)
        && seal_records(records, size, count, keys_used, keys, output);

    if (keys != NULL)
        OPENSSL_cleanse(keys, keys_used * KEY);
    free(keys);
    return done;
}

/* The inverse: contiguous envelopes into contiguous records. */
int cloop_decrypt(const uint8_t *blobs, size_t size, size_t count, int key_each, uint8_t *output)
{
    size_t stride = size + OVERHEAD, keys_used = key_each ? count : 1;
    uint8_t *keys = malloc(keys_used * KEY);
    struct cipher cipher;
    int done = keys != NULL && unwrap_keys(blobs + HEAD, keys_used, stride, keys);
    int opened = cipher_open(&cipher, 0);

    done = done && opened;
    for (size_t at = 0; done && at < count; at++, blobs += stride, output += size) {
        int kept = !key_each && at && memcmp(blobs + HEAD, blobs + HEAD - stride, WRAPPED) == 0;
        done = (key_each || !at || kept)
            && open_record(&cipher, kept ? NULL : keys + (key_each ? at : 0) * KEY, blobs, size, output);
    }
    cipher_close(&cipher);
    if (keys != NULL)
        OPENSSL_cleanse(keys, keys_used * KEY);
    free(keys);
    return done;
}

/* Bare AES-256-GCM under one key that is kept, record by record: ciphertext || tag. The most this engine can give. */
int cloop_bare_encrypt(const uint8_t *records, size_t size, size_t count, uint8_t *output)
{
    uint8_t nonce[NONCE] = {0};
    struct cipher cipher;
    int done = cipher_open(&cipher, 1);

    for (size_t at = 0; done && at < count; at++, output += size + TAG) {
        count_up(nonce);
        done = seal_whole(&cipher, at ? NULL : subkey, nonce, NULL, 0, output, records + at * size, size, output + size);
    }
    cipher_close(&cipher);
    return done;
}

int cloop_bare_decrypt(const uint8_t *blobs, size_t size, size_t count, uint8_t *output)
{
    uint8_t nonce[NONCE] = {0};
    struct cipher cipher;
    int done = cipher_open(&cipher, 0);

    for (size_t at = 0; done && at < count; at++, blobs += size + TAG) {
        count_up(nonce);
        done = open_whole(&cipher, at ? NULL : subkey, nonce, NULL, 0, output + at * size, blobs, size, blobs + size);
    }
    cipher_close(&cipher);
    return done;
}
