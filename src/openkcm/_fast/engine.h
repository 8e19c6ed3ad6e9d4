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
#include <openssl/core_names.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/kdf.h>
#include <openssl/params.h>
#include <openssl/rand.h>

/* musl has none, and the address sanitizer refuses it: a library's own symbols are found first if it was linked so. */
#if !defined(RTLD_DEEPBIND) || defined(__SANITIZE_ADDRESS__)
#define OKC_OWN_SYMBOLS_FIRST 0
#else
#define OKC_OWN_SYMBOLS_FIRST RTLD_DEEPBIND
#endif

#define OKC_LIBCRYPTO(X)                                                                                      \
    X(OpenSSL_version) X(OpenSSL_version_num)                                                                 \
    X(OPENSSL_init_crypto) X(EVP_default_properties_is_fips_enabled)                                          \
    X(EVP_CIPHER_fetch) X(EVP_CIPHER_CTX_new) X(EVP_CIPHER_CTX_free)                                          \
    X(EVP_CIPHER_CTX_get_params) X(EVP_CIPHER_CTX_set_params)                                                 \
    X(EVP_EncryptInit_ex) X(EVP_EncryptUpdate) X(EVP_EncryptFinal_ex)                                         \
    X(EVP_DecryptInit_ex) X(EVP_DecryptUpdate) X(EVP_DecryptFinal_ex)                                         \
    X(RAND_bytes) X(RAND_priv_bytes)                                                                          \
    X(EVP_PKEY_new_raw_private_key) X(EVP_PKEY_new_raw_public_key) X(EVP_PKEY_get_raw_public_key)             \
    X(EVP_PKEY_free) X(EVP_PKEY_CTX_new) X(EVP_PKEY_CTX_free)                                                 \
    X(EVP_PKEY_derive_init) X(EVP_PKEY_derive_set_peer) X(EVP_PKEY_derive)                                    \
    X(EVP_KDF_fetch) X(EVP_KDF_free) X(EVP_KDF_CTX_new) X(EVP_KDF_CTX_free) X(EVP_KDF_derive)                 \
    X(ERR_clear_error)

#define OKC_MEMBER(name) __typeof__(name) *name;
typedef struct { OKC_LIBCRYPTO(OKC_MEMBER) } okc_libcrypto;

#define OKC_LINKED(name) .name = name,
__attribute__((unused)) static const okc_libcrypto okc_linked = { OKC_LIBCRYPTO(OKC_LINKED) };

/* Fill the table from the library at a path; returns NULL, or what is wrong. */
static inline const char *okc_load_libcrypto(const char *path, okc_libcrypto *table)
{
    /* Its own symbols first: another libcrypto is in this process already. */
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL | OKC_OWN_SYMBOLS_FIRST);
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

/* ---- comparing ------------------------------------------------------------------------------------------- */

static inline uint64_t okc_word(const uint8_t *data)
{
    uint64_t value;
    memcpy(&value, data, 8);
    return value;
}

/* Whether tags are the same, in a time that does not tell where they differ: as CRYPTO_memcmp, which goes byte by
 * byte. The barrier keeps the compiler from ending at the first word that differs. */
static inline int okc_same_tag(const uint8_t *first, const uint8_t *second)
{
    uint64_t differ = (okc_word(first) ^ okc_word(second)) | (okc_word(first + 8) ^ okc_word(second + 8));
    __asm__("" : "+r"(differ));
    return differ == 0;
}

/* libIPSec_MB has no status: what it refuses to do must not look like a tag that verified. */
static inline void okc_spoil(uint8_t *computed, const uint8_t *tag)
{
    const uint64_t first = ~okc_word(tag), second = ~okc_word(tag + 8);
    memcpy(computed, &first, 8);
    memcpy(computed + 8, &second, 8);
}

/* Whether all bytes of a commitment are zero, in the same way. */
static inline int okc_is_zero32(const uint8_t *data)
{
    uint64_t set = okc_word(data) | okc_word(data + 8) | okc_word(data + 16) | okc_word(data + 24);
    __asm__("" : "+r"(set));
    return set == 0;
}

/* Whether bytes that are no secret are the same: short ones whose size the compiler does not know, without a call. They are
 * looked at from behind, where wrapped keys differ that begin alike. */
static inline int okc_same(const uint8_t *first, const uint8_t *second, size_t size)
{
    uint64_t differ = 0;
    if (size < 8)
        return memcmp(first, second, size) == 0;
    if (okc_word(first + size - 8) != okc_word(second + size - 8))
        return 0;
    for (size_t at = 0; at < size - 8; at += 8)
        differ |= okc_word(first + at) ^ okc_word(second + at);
    return differ == 0;
}

/* As memcpy. Where gcc knows that a size is small but not which it is, it makes a "rep movs" of it, which takes longer to
 * begin than the C library to be done. */
static inline void okc_copy(uint8_t *target, const uint8_t *source, size_t size)
{
    __asm__("" : "+r"(size));
    memcpy(target, source, size);
}

/* ---- leaving nothing behind ---------------------------------------------------------------------------- */

/* As OPENSSL_cleanse, which goes eight bytes at a time. */
static inline void okc_wipe(void *place, size_t size)
{
    memset(place, 0, size);
    __asm__ volatile("" : : "r"(place) : "memory");
}

/* The stack below the caller: what libcrypto's functions had there. The deepest were 4.3 KiB (OpenSSL 3.0). */
static __attribute__((noinline, unused)) void okc_wipe_stack(void)
{
    uint8_t below[6144];
    okc_wipe(below, sizeof below);
}

#if defined(__x86_64__) && defined(__GNUC__)
#define OKC_FOUR_16TO31(a, b, c, d)                                                                           \
    "vpxorq %%zmm" #a ", %%zmm" #a ", %%zmm" #a "\n\t" "vpxorq %%zmm" #b ", %%zmm" #b ", %%zmm" #b "\n\t"         \
    "vpxorq %%zmm" #c ", %%zmm" #c ", %%zmm" #c "\n\t" "vpxorq %%zmm" #d ", %%zmm" #d ", %%zmm" #d "\n\t"
#define OKC_FOUR_SSE(a, b, c, d)                                                                              \
    "pxor %%xmm" #a ", %%xmm" #a "\n\t" "pxor %%xmm" #b ", %%xmm" #b "\n\t"                                     \
    "pxor %%xmm" #c ", %%xmm" #c "\n\t" "pxor %%xmm" #d ", %%xmm" #d "\n\t"
#ifdef __AVX512F__
#define OKC_UPPER_CLOBBERS , "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24",   \
    "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31"
#else
#define OKC_UPPER_CLOBBERS              /* the compiler does not use them */
#endif
#define OKC_CLOBBERS "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",     \
    "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"
#endif

/* Which vector registers there are: 2 with AVX-512, 1 with AVX, else 0. */
static inline int okc_vectors(void)
{
#ifdef OKC_CLOBBERS
    return __builtin_cpu_supports("avx512f") ? 2 : __builtin_cpu_supports("avx") ? 1 : 0;
#else
    return 0;
#endif
}

/* Clear the vector registers: OpenSSL 3.0 returns with the hash key in one. `vectors` is what okc_vectors says. */
static inline void okc_wipe_registers(int vectors)
{
#ifdef OKC_CLOBBERS
    if (vectors == 2)
        __asm__ volatile("vzeroall\n\t" OKC_FOUR_16TO31(16, 17, 18, 19) OKC_FOUR_16TO31(20, 21, 22, 23)
                         OKC_FOUR_16TO31(24, 25, 26, 27) OKC_FOUR_16TO31(28, 29, 30, 31)
                         : : : OKC_CLOBBERS OKC_UPPER_CLOBBERS);
    else if (vectors == 1)
        __asm__ volatile("vzeroall" : : : OKC_CLOBBERS);
    else
        __asm__ volatile(OKC_FOUR_SSE(0, 1, 2, 3) OKC_FOUR_SSE(4, 5, 6, 7) OKC_FOUR_SSE(8, 9, 10, 11)
                         OKC_FOUR_SSE(12, 13, 14, 15) : : : OKC_CLOBBERS);
#else
    (void)vectors;
#endif
}

/* ---- libIPSec_MB ------------------------------------------------------------------------------------- */

#define OKC_SAFE_DATA (UINT64_C(1) << 14)  /* IMB_FEATURE_SAFE_DATA: it clears its registers and its stack */

/* Room for struct gcm_key_data, the schedule and powers of the hash key. Its size differs between releases that share the
 * library's name, and cannot be asked for: 2,288 bytes in the first, 1,008 in 1.3, 1,264 from 1.4 on (intel-ipsec-mb,
 * issue 116). So it is measured before anything is used, and what needs more room is not used. */
#define OKC_GCM_KEY_ROOM 2304
#define OKC_GCM_STATE_ROOM 128          /* struct gcm_context_data has 88 bytes in all of them */
#define OKC_MEASURED 16384

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
    size_t key_bytes;                   /* what pre writes */
} okc_method;

/* One cipher of one call on one thread, on its stack. */
typedef struct {
    uint8_t key[OKC_GCM_KEY_ROOM] __attribute__((aligned(64)));
    uint8_t state[OKC_GCM_STATE_ROOM] __attribute__((aligned(64)));
    const uint8_t *schedule;            /* of the key that is set: `key` above, or one that is kept elsewhere */
    const okc_method *method;           /* of the key that is set; NULL while none is, or with EVP */
    size_t used;                        /* bytes of key that were written so far */
    EVP_CIPHER_CTX *evp;                /* NULL with libIPSec_MB */
    OSSL_PARAM tag[2];                  /* with EVP: how it is asked for a tag and given one */
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

/* The end of what differs from a pattern, in a buffer that was filled with it. */
static inline size_t okc_written(const uint8_t *place, uint8_t pattern)
{
    size_t size = OKC_MEASURED;
    while (size > 0 && place[size - 1] == pattern)
        size--;
    return size;
}

/* Use each function once, with far more room than it needs; whether all stay within a cipher's. */
static inline int okc_fits(okc_method *method)
{
    static uint8_t key[OKC_MEASURED] __attribute__((aligned(64)));
    static uint8_t state[OKC_MEASURED] __attribute__((aligned(64)));
    static uint8_t data[1024], output[1024];
    static const uint8_t patterns[] = {0x5a, 0xa5};     /* what is written may equal one of them */
    size_t state_bytes = 0;
    method->key_bytes = 0;
    for (size_t turn = 0; turn < sizeof patterns; turn++) {
        size_t size;
        uint8_t tag[16];
        memset(key, patterns[turn], sizeof key);
        memset(state, patterns[turn], sizeof state);
        method->pre(data, key);
        method->init(key, state, data, data, 33);
        method->enc_update(key, state, output, data, 1001);
        method->enc_end(key, state, tag, sizeof tag);
        method->init(key, state, data, data, 33);
        method->dec_update(key, state, output, data, 1001);
        method->dec_end(key, state, tag, sizeof tag);
        method->enc(key, state, output, data, 1001, data, data, 33, tag, sizeof tag);
        method->dec(key, state, output, data, 1001, data, data, 33, tag, sizeof tag);
        size = okc_written(key, patterns[turn]);
        method->key_bytes = size > method->key_bytes ? size : method->key_bytes;
        size = okc_written(state, patterns[turn]);
        state_bytes = size > state_bytes ? size : state_bytes;
    }
    return method->key_bytes <= OKC_GCM_KEY_ROOM && state_bytes <= OKC_GCM_STATE_ROOM;
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
    uint64_t (*tell_features)(void);
    if (processor == 0)
        return "this processor has no AVX2 and AES instructions";
    library = dlopen("libIPSec_MB.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        const char *problem = dlerror();
        return problem == NULL || strstr(problem, "No such file") != NULL ? "libIPSec_MB.so.1 is not installed" : problem;
    }
    *(void **)&tell_version = dlsym(library, "imb_get_version_str");
    *(void **)&tell_features = dlsym(library, "imb_get_feature_flags");
    if (tell_version == NULL || tell_features == NULL || !okc_look_up_method(library, "avx_gen4", brief)
        || !okc_look_up_method(library, processor == 2 ? "vaes_avx512" : "avx_gen4", kept))
        return "this libIPSec_MB does not offer its AES-GCM and its features by name";
    if (!(tell_features() & OKC_SAFE_DATA))
        return "this libIPSec_MB was built to leave keys in registers and on the stack (without SAFE_DATA)";
    if (!okc_fits(kept) || !okc_fits(brief))
        return "this libIPSec_MB needs more room for a key than is known of any release";
    *version = tell_version();
    return NULL;
}

#endif
