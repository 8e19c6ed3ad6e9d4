/* SPDX-License-Identifier: Apache-2.0
 *
 * One large block of memory that was given back and waits for the next result of about its size. A fresh one of some
 * megabytes comes zeroed from the system, which takes as long as to encrypt into it; a caller who encrypts column after
 * column, and lets go of each, writes into the same memory again.
 *
 * The system may take the pages of the block that waits whenever it is short of memory (MADV_FREE). Nothing of it is
 * cleared: only what is no secret may lie in it.
 */
#ifndef OPENKCM_SPARE_H
#define OPENKCM_SPARE_H

#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "column.h"

#define OKC_SPARE_LEAST (2 * OKC_LARGE_PAGE)
#define OKC_SPARE_MOST ((size_t)64 << 20)

static struct {
    char busy;
    void *block;
    size_t size;
} okc_spare;

/* Put a block in place of the one that waits. Who finds another thread here goes on without. */
static inline int okc_spare_swap(void **block, size_t *size)
{
    void *other;
    size_t other_size;
    if (__atomic_test_and_set(&okc_spare.busy, __ATOMIC_ACQUIRE))
        return 0;
    other = okc_spare.block;
    other_size = okc_spare.size;
    okc_spare.block = *block;
    okc_spare.size = *size;
    __atomic_clear(&okc_spare.busy, __ATOMIC_RELEASE);
    *block = other;
    *size = other_size;
    return 1;
}

/* As okc_take: the block that waits, if it is large enough and hardly larger; `room` is what it really has. */
static inline void *okc_take_again(size_t size, size_t *room)
{
    void *block = NULL;
    size_t found = 0;
    *room = size;
    if (size < OKC_SPARE_LEAST || size > OKC_SPARE_MOST || !okc_spare_swap(&block, &found) || block == NULL)
        return okc_take(size);
    if (found >= size && found - size <= size / 8) {
        *room = found;
        return block;
    }
    free(block);
    return okc_take(size);
}

/* As free; `room` is what okc_take_again said. */
static inline void okc_give_again(void *block, size_t room)
{
    if (block != NULL && room >= OKC_SPARE_LEAST && room <= OKC_SPARE_MOST) {
#ifdef MADV_FREE
        (void)madvise(block, room & ~(OKC_LARGE_PAGE - 1), MADV_FREE);
#endif
        (void)okc_spare_swap(&block, &room);
    }
    free(block);
}

#endif
