/* SPDX-License-Identifier: Apache-2.0
 *
 * The libraries that do AES-256-GCM for us, found when the process starts.
 *
 * libcrypto is linked, and is the reference: every function that has to do with keys is called through one
 * table, so that an operator can pin another copy of it, such as a validated one. libIPSec_MB is looked up by
 * name and may be missing: it does the same on the processor's widest instructions, which the OpenSSL of a
 * long-term distribution does not know yet. Its assembly is called by its exported names, since its manager
 * structure has another layout in each release; nothing in here is used before it has been compared with EVP.
 */
#ifndef OPENKCM_ENGINE_H
#define OPENKCM_ENGINE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdint.h>
#include <string.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/rand.h>

#ifndef RTLD_DEEPBIND
#define RTLD_DEEPBIND 0                 /* musl: a library's own symbols are found first if it was linked so */
#endif

#define OKC_LIBCRYPTO(X)                                                                                      \
    X(OpenSSL_version) X(OpenSSL_version_num)                                                                 \
    X(EVP_CIPHER_fetch) X(EVP_CIPHER_CTX_new) X(EVP_CIPHER_CTX_free) X(EVP_CIPHER_CTX_ctrl)                   \
    X(EVP_CIPHER_CTX_get_params)                                                                              \
    X(EVP_EncryptInit_ex) X(EVP_EncryptUpdate) X(EVP_EncryptFinal_ex)                                         \
    X(EVP_DecryptInit_ex) X(EVP_DecryptUpdate) X(EVP_DecryptFinal_ex)                                         \
    X(RAND_bytes) X(RAND_priv_bytes)

#define OKC_MEMBER(name) __typeof__(name) *name;
typedef struct { OKC_LIBCRYPTO(OKC_MEMBER) } okc_libcrypto;

#define OKC_LINKED(name) .name = name,
__attribute__((unused)) static const okc_libcrypto okc_linked = { OKC_LIBCRYPTO(OKC_LINKED) };

/* Fill the table from the library at a path; returns NULL, or what is wrong. */
static inline const char *okc_load_libcrypto(const char *path, okc_libcrypto *table)
{
    /* Its own symbols first: another libcrypto is in this process already. */
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND);
    if (library == NULL)
        return dlerror();
#define OKC_LOOK_UP(name)                                                                                     \
    if ((*(void **)&table->name = dlsym(library, #name)) == NULL)                                             \
        return "it has no " #name;
    OKC_LIBCRYPTO(OKC_LOOK_UP)
    return table->OpenSSL_version_num() < 0x30000000UL ? "it is older than OpenSSL 3" : NULL;
}

/* The file a function was loaded from, or NULL. */
static inline const char *okc_file_of(void *function)
{
    Dl_info info;
    return dladdr(function, &info) ? info.dli_fname : NULL;
}

static inline const char *okc_libcrypto_file(const okc_libcrypto *table)
{
    return okc_file_of(*(void **)&table->OpenSSL_version);
}

/* ---- libIPSec_MB ------------------------------------------------------------------------------------- */

/* struct gcm_key_data (the schedule and up to 48 powers of the hash key: 1,008 bytes) and struct
 * gcm_context_data (88 bytes) of libIPSec_MB.so.1, with room behind each. */
#define OKC_GCM_KEY_BYTES 1008
#define OKC_GCM_STATE_BYTES 88

typedef struct {
    void (*pre)(const void *key, void *expanded);
    void (*enc)(const void *, void *, uint8_t *, const uint8_t *, uint64_t, const uint8_t *, const uint8_t *,
                uint64_t, uint8_t *, uint64_t);
    void (*dec)(const void *, void *, uint8_t *, const uint8_t *, uint64_t, const uint8_t *, const uint8_t *,
                uint64_t, uint8_t *, uint64_t);
    void (*init)(const void *, void *, const uint8_t *, const uint8_t *, uint64_t);
    void (*enc_update)(const void *, void *, uint8_t *, const uint8_t *, uint64_t);
    void (*dec_update)(const void *, void *, uint8_t *, const uint8_t *, uint64_t);
    void (*enc_end)(const void *, void *, uint8_t *, uint64_t);
    void (*dec_end)(const void *, void *, uint8_t *, uint64_t);
} okc_method;

/* One cipher of one call on one thread, on its stack. */
typedef struct {
    uint8_t key[OKC_GCM_KEY_BYTES + 16] __attribute__((aligned(64)));
    uint8_t state[OKC_GCM_STATE_BYTES + 40] __attribute__((aligned(64)));
    const okc_method *method;           /* of the key that is set; NULL while none is, or with EVP */
    EVP_CIPHER_CTX *evp;                /* NULL with libIPSec_MB */
    int encrypt;
    int brief;                          /* each key serves one record */
} okc_gcm;

static inline int okc_look_up_method(void *library, const char *suffix, okc_method *method)
{
    static const struct { const char *name; size_t place; } wanted[] = {
        {"pre_256", offsetof(okc_method, pre)},
        {"enc_256", offsetof(okc_method, enc)},
        {"dec_256", offsetof(okc_method, dec)},
        {"init_256", offsetof(okc_method, init)},
        {"enc_256_update", offsetof(okc_method, enc_update)},
        {"dec_256_update", offsetof(okc_method, dec_update)},
        {"enc_256_finalize", offsetof(okc_method, enc_end)},
        {"dec_256_finalize", offsetof(okc_method, dec_end)},
    };
    char name[64];
    for (size_t at = 0; at < sizeof wanted / sizeof *wanted; at++) {
        snprintf(name, sizeof name, "aes_gcm_%s_%s", wanted[at].name, suffix);
        *(void **)((char *)method + wanted[at].place) = dlsym(library, name);
        if (*(void **)((char *)method + wanted[at].place) == NULL)
            return 0;
    }
    return 1;
}

/* What this processor runs: 2 with VAES and AVX-512 too, 1 with AVX2, else 0. */
static inline int okc_processor(void)
{
#if defined(__x86_64__) && defined(__GNUC__)
    if (!(__builtin_cpu_supports("aes") && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("avx2")
          && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2")))
        return 0;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")
        && __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("gfni")) {
        /* gcc 10 does not know "vaes" by name: CPUID leaf 7, ECX, bit 9. */
        unsigned int a = 7, b, c = 0, d;
        __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
        return c & (1u << 9) ? 2 : 1;
    }
    return 1;
#else
    return 0;
#endif
}

/* Find the methods for a key that is kept and for one that serves a single short record. VAES makes 48 powers
 * of the hash key for each key set, which pays from about half a kilobyte. Returns NULL, or what is missing. */
static inline const char *okc_load_ipsec_mb(okc_method *kept, okc_method *brief, const char **version)
{
    const int processor = okc_processor();
    void *library;
    const char *(*tell_version)(void);
    if (processor == 0)
        return "this processor has no AVX2 and AES instructions";
    library = dlopen("libIPSec_MB.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        return "libIPSec_MB.so.1 is not installed";
    *(void **)&tell_version = dlsym(library, "imb_get_version_str");
    if (tell_version == NULL || !okc_look_up_method(library, "avx_gen4", brief)
        || !okc_look_up_method(library, processor == 2 ? "vaes_avx512" : "avx_gen4", kept))
        return "this libIPSec_MB does not offer its AES-GCM by name";
    *version = tell_version();
    return NULL;
}

#endif
