/* SPDX-License-Identifier: Apache-2.0
 *
 * What columns need of C: a keyed hash for tables whose keys others choose, UTF-8, and large pages.
 */
#ifndef OPENKCM_COLUMN_H
#define OPENKCM_COLUMN_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline uint64_t okc_read64(const uint8_t *data)
{
    uint64_t value;
    memcpy(&value, data, 8);
    return value;
}

static inline uint64_t okc_fold(uint64_t first, uint64_t second)
{
    unsigned __int128 product = (unsigned __int128)first * second;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* Have a line of memory come nearer; any address will do. */
static inline void okc_prefetch(const void *place) { __builtin_prefetch(place); }

/* Folded multiplication with two random halves of a seed, after wyhash: without the seed nobody finds names that
 * fall into one place. */
static inline uint64_t okc_hash(const uint8_t *data, size_t size, const uint64_t *seed)
{
    uint64_t state = seed[0] ^ size;
    uint64_t rest = 0;
    while (size >= 8) {
        state = okc_fold(state ^ okc_read64(data), seed[1]);
        data += 8;
        size -= 8;
    }
    if (size)
        memcpy(&rest, data, size);
    return okc_fold(okc_fold(state ^ rest, seed[1]), seed[0] | 1);
}

/* Whether bytes are UTF-8 (Unicode 15, table 3-7): no surrogates, nothing longer than it must be. */
static inline int okc_is_utf8(const uint8_t *data, size_t size)
{
    const uint8_t *end = data + size;
    while (data < end) {
        size_t more;
        uint8_t low = 0x80, high = 0xBF;
        while ((size_t)(end - data) >= 8 && !(okc_read64(data) & 0x8080808080808080u))
            data += 8;
        if (data == end)
            break;
        if (*data < 0x80) {
            data++;
            continue;
        }
        if (*data >= 0xC2 && *data <= 0xDF)
            more = 1;
        else if (*data >= 0xE0 && *data <= 0xEF) {
            more = 2;
            low = *data == 0xE0 ? 0xA0 : low;
            high = *data == 0xED ? 0x9F : high;
        } else if (*data >= 0xF0 && *data <= 0xF4) {
            more = 3;
            low = *data == 0xF0 ? 0x90 : low;
            high = *data == 0xF4 ? 0x8F : high;
        } else
            return 0;
        if ((size_t)(end - data) <= more || data[1] < low || data[1] > high)
            return 0;
        for (size_t at = 2; at <= more; at++)
            if (data[at] < 0x80 || data[at] > 0xBF)
                return 0;
        data += more + 1;
    }
    return 1;
}

/* ---- rows between two offsets, none of them null: most columns ------------------------------------------- */

/* The bytes of `count` rows and the longest of them; -1 if an offset is negative, out of order or past the end (none
 * is looked for with a `size` of less than 0). Differences are taken as unsigned: one that overflows has a negative offset. */
#define OKC_MEASURE(name, type, unsigned_type)                                                                  \
    static inline int64_t name(const type *offsets, int64_t count, int64_t size, int64_t *longest)               \
    {                                                                                                           \
        const type first = offsets[0];                                                                          \
        type wrong = first, most = 0, last = first;                                                             \
        for (int64_t at = 0; at < count; at++) {                                                                \
            const type bytes = (type)((unsigned_type)offsets[at + 1] - (unsigned_type)offsets[at]);             \
            last = offsets[at + 1];                                                                             \
            wrong = (type)(wrong | bytes | last);                                                               \
            most = bytes > most ? bytes : most;                                                                 \
        }                                                                                                       \
        if (wrong < 0 || (size >= 0 && last > size))                                                            \
            return -1;                                                                                          \
        *longest = most;                                                                                        \
        return (int64_t)last - first;                                                                           \
    }
OKC_MEASURE(okc_measure32, int32_t, uint32_t)
OKC_MEASURE(okc_measure64, int64_t, uint64_t)

/* Where a row's result ends that begins at `place`, with `more` bytes than the row; -1 where the row has fewer than a
 * negative `more` takes away, or all have more than can be counted. */
static inline int64_t okc_after_row(int64_t place, int64_t bytes, int64_t more)
{
    if (bytes < (more < 0 ? -more : 0) || bytes > INT64_MAX - (more > 0 ? more : 0) - place)
        return -1;
    return place + bytes + more;
}

/* Write where each row's result ends: `place` and the row's bytes and `more` for each row up to it; the last of them, or -1.
 * What has changed since it was measured counts as nothing: a row's size is looked at again when it is worked on. */
#define OKC_LAY(name, type, placed)                                                                             \
    static inline int64_t name(const type *offsets, int64_t count, int64_t size, int64_t more, int64_t place,    \
                               placed *ends)                                                                    \
    {                                                                                                           \
        int64_t begin = offsets[0];                                                                             \
        for (int64_t at = 1; at <= count; at++) {                                                               \
            const int64_t end = offsets[at];                                                                    \
            if (begin >= 0 && end >= begin && (size < 0 || end <= size)) {                                      \
                place = okc_after_row(place, end - begin, more);                                                \
                if (place < 0)                                                                                  \
                    return -1;                                                                                  \
            }                                                                                                   \
            ends[at - 1] = (placed)place;                                                                       \
            begin = end;                                                                                        \
        }                                                                                                       \
        return place;                                                                                           \
    }
OKC_LAY(okc_lay32_32, int32_t, int32_t)
OKC_LAY(okc_lay32_64, int32_t, int64_t)
OKC_LAY(okc_lay64_32, int64_t, int32_t)
OKC_LAY(okc_lay64_64, int64_t, int64_t)

/* ---- a bit a row; threads clear the bits of rows of their own, which may share a word ------------------------- */

static inline void okc_clear_word(uint64_t *word, uint64_t bits)
{
    (void)__atomic_fetch_and(word, ~bits, __ATOMIC_RELAXED);
}

static inline void okc_clear_bit(uint64_t *words, int64_t at)
{
    okc_clear_word(words + (at >> 6), (uint64_t)1 << (at & 63));
}

static inline void okc_clear_bits(uint64_t *words, int64_t start, int64_t stop)
{
    while (start < stop) {
        const int64_t next = (start | 63) + 1 < stop ? (start | 63) + 1 : stop;
        const uint64_t bits = next - start == 64 ? ~(uint64_t)0 : (((uint64_t)1 << (next - start)) - 1) << (start & 63);
        okc_clear_word(words + (start >> 6), bits);
        start = next;
    }
}

/* The first bit from start on that is set, or -1. */
static inline int64_t okc_first_bit(const uint64_t *words, int64_t start, int64_t stop)
{
    while (start < stop) {
        const uint64_t word = __atomic_load_n(words + (start >> 6), __ATOMIC_RELAXED) >> (start & 63);
        if (word)
            return start + __builtin_ctzll(word) < stop ? start + __builtin_ctzll(word) : -1;
        start = (start | 63) + 1;
    }
    return -1;
}

#endif
