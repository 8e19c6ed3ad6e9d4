/* SPDX-License-Identifier: Apache-2.0
 *
 * Raw AES-256 blocks with the processor's instructions, and the few atomics the handles need.
 *
 * An L2 or L3 key lives in secret memory only as its expanded schedule, and the rounds take the round keys
 * as memory operands: no half of the key enters a register while records flow, so neither a signal frame
 * nor a core dump's register notes can hold one. Only the expansion itself, once for each key opened, has
 * the key in registers; it runs with signals blocked and clears them.
 */
#ifndef OPENKCM_NATIVE_H
#define OPENKCM_NATIVE_H

#include <Python.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <time.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>

#define OKC_SCHEDULE_BYTES 240

/* ---- without a GIL --------------------------------------------------------------------------------------------- */

/* Whether other threads may change any list or dict between two steps of ours. */
#ifdef Py_GIL_DISABLED
#define OKC_FREE_THREADED 1
#else
#define OKC_FREE_THREADED 0
#endif

/* What a dict has for a key, or None: with a reference of its own from the first, which Cython's dict.get has not (3.3),
 * so that another thread may take the key out meanwhile. NULL where looking raised. */
static inline PyObject *okc_find(PyObject *dict, PyObject *key)
{
    PyObject *found = NULL;
#if PY_VERSION_HEX >= 0x030D0000
    if (PyDict_GetItemRef(dict, key, &found) < 0)
        return NULL;
#else
    found = PyDict_GetItemWithError(dict, key);
    if (found == NULL && PyErr_Occurred())
        return NULL;
    Py_XINCREF(found);
#endif
    return found != NULL ? found : Py_NewRef(Py_None);
}

/* ---- AES-256 --------------------------------------------------------------------------------------------------- */

#if defined(__x86_64__) && defined(__GNUC__) && !defined(OPENKCM_PORTABLE_AES)
#define OKC_AES_X86 1
#endif

#ifdef OKC_AES_X86

static inline int okc_aes_instructions(void) { return __builtin_cpu_supports("aes") ? 1 : 0; }

#define OKC_EXPAND_EVEN(rcon, offset)                                                                        \
    "aeskeygenassist $" #rcon ", %%xmm3, %%xmm2\n\t"                                                         \
    "pshufd $0xff, %%xmm2, %%xmm2\n\t"                                                                       \
    "movdqa %%xmm1, %%xmm4\n\t"                                                                              \
    "pslldq $4, %%xmm4\n\t" "pxor %%xmm4, %%xmm1\n\t"                                                        \
    "pslldq $4, %%xmm4\n\t" "pxor %%xmm4, %%xmm1\n\t"                                                        \
    "pslldq $4, %%xmm4\n\t" "pxor %%xmm4, %%xmm1\n\t"                                                        \
    "pxor %%xmm2, %%xmm1\n\t"                                                                                \
    "movdqa %%xmm1, " #offset "(%[schedule])\n\t"

#define OKC_EXPAND_ODD(offset)                                                                               \
    "aeskeygenassist $0, %%xmm1, %%xmm2\n\t"                                                                 \
    "pshufd $0xaa, %%xmm2, %%xmm2\n\t"                                                                       \
    "movdqa %%xmm3, %%xmm4\n\t"                                                                              \
    "pslldq $4, %%xmm4\n\t" "pxor %%xmm4, %%xmm3\n\t"                                                        \
    "pslldq $4, %%xmm4\n\t" "pxor %%xmm4, %%xmm3\n\t"                                                        \
    "pslldq $4, %%xmm4\n\t" "pxor %%xmm4, %%xmm3\n\t"                                                        \
    "pxor %%xmm2, %%xmm3\n\t"                                                                                \
    "movdqa %%xmm3, " #offset "(%[schedule])\n\t"

/* Expand in place: the key is the first 32 bytes of the 16-byte aligned schedule (FIPS 197, section 5.2). */
static inline int okc_aes256_expand(uint8_t *schedule)
{
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    __asm__ volatile(
        "movdqa (%[schedule]), %%xmm1\n\t"
        "movdqa 16(%[schedule]), %%xmm3\n\t"
        OKC_EXPAND_EVEN(0x01, 32) OKC_EXPAND_ODD(48)
        OKC_EXPAND_EVEN(0x02, 64) OKC_EXPAND_ODD(80)
        OKC_EXPAND_EVEN(0x04, 96) OKC_EXPAND_ODD(112)
        OKC_EXPAND_EVEN(0x08, 128) OKC_EXPAND_ODD(144)
        OKC_EXPAND_EVEN(0x10, 160) OKC_EXPAND_ODD(176)
        OKC_EXPAND_EVEN(0x20, 192) OKC_EXPAND_ODD(208)
        OKC_EXPAND_EVEN(0x40, 224)
        "pxor %%xmm1, %%xmm1\n\t" "pxor %%xmm2, %%xmm2\n\t"
        "pxor %%xmm3, %%xmm3\n\t" "pxor %%xmm4, %%xmm4\n\t"
        : : [schedule] "r"(schedule) : "xmm1", "xmm2", "xmm3", "xmm4", "memory");
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return 1;
}

/* One block (FIPS 197, section 5.1); input and output may be unaligned, the schedule is aligned to 16. */
static inline int okc_aes256_block(const uint8_t *schedule, const uint8_t *input, uint8_t *output)
{
    __asm__ volatile(
        "movdqu (%[input]), %%xmm0\n\t"
        "pxor (%[schedule]), %%xmm0\n\t"
        "aesenc 16(%[schedule]), %%xmm0\n\t" "aesenc 32(%[schedule]), %%xmm0\n\t"
        "aesenc 48(%[schedule]), %%xmm0\n\t" "aesenc 64(%[schedule]), %%xmm0\n\t"
        "aesenc 80(%[schedule]), %%xmm0\n\t" "aesenc 96(%[schedule]), %%xmm0\n\t"
        "aesenc 112(%[schedule]), %%xmm0\n\t" "aesenc 128(%[schedule]), %%xmm0\n\t"
        "aesenc 144(%[schedule]), %%xmm0\n\t" "aesenc 160(%[schedule]), %%xmm0\n\t"
        "aesenc 176(%[schedule]), %%xmm0\n\t" "aesenc 192(%[schedule]), %%xmm0\n\t"
        "aesenc 208(%[schedule]), %%xmm0\n\t"
        "aesenclast 224(%[schedule]), %%xmm0\n\t"
        "movdqu %%xmm0, (%[output])\n\t"
        "pxor %%xmm0, %%xmm0\n\t"
        : : [schedule] "r"(schedule), [input] "r"(input), [output] "r"(output) : "xmm0", "memory");
    return 1;
}

#else /* no instructions we drive ourselves: a short-lived OpenSSL context, cleansed when freed */

static inline int okc_aes_instructions(void) { return 0; }

static inline int okc_aes256_expand(uint8_t *schedule)
{
    memset(schedule + 32, 0, OKC_SCHEDULE_BYTES - 32);
    return 1;
}

static inline int okc_aes256_block(const uint8_t *schedule, const uint8_t *input, uint8_t *output)
{
    int written = 0, done = 0;
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    if (context != NULL) {
        done = EVP_EncryptInit_ex(context, EVP_aes_256_ecb(), NULL, schedule, NULL) == 1
            && EVP_CIPHER_CTX_set_padding(context, 0) == 1
            && EVP_EncryptUpdate(context, output, &written, input, 16) == 1 && written == 16;
        EVP_CIPHER_CTX_free(context);
    }
    return done;
}

#endif

static inline int okc_atomic_add(int *value, int amount) { return __atomic_add_fetch(value, amount, __ATOMIC_SEQ_CST); }
static inline int okc_atomic_get(int *value) { return __atomic_load_n(value, __ATOMIC_SEQ_CST); }
static inline int okc_atomic_swap(int *value, int next) { return __atomic_exchange_n(value, next, __ATOMIC_SEQ_CST); }

/* ---- time ---------------------------------------------------------------------------------------------------- */

/* Seconds that grow while the machine is suspended too; only asked for where there is such a clock. */
static inline double okc_awake_seconds(void)
{
    struct timespec now = {0, 0};
#ifdef CLOCK_BOOTTIME
    clock_gettime(CLOCK_BOOTTIME, &now);
#endif
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

#endif
