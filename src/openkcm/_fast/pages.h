/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory for large results. A fresh megabyte comes zeroed from the system and page by page, which takes longer than to
 * encrypt into it: three things are done about that.
 *
 *   - large results lie in large pages, where the system has them to give: a fault for each 2 MiB;
 *   - so do the large objects of a list that the allocator put side by side (a span), whose headers it has written
 *     already, so that the pages have to be put together (MADV_COLLAPSE, Linux 6.1);
 *   - one large block that was given back waits for the next result of about its size: a caller who encrypts column
 *     after column, and lets go of each, writes into the same memory again. The system may take the pages of the block
 *     that waits whenever it is short of memory (MADV_FREE). Nothing of it is cleared: only what is no secret may lie
 *     in it;
 *   - one record of 32 to 64 MiB, which is an object of the interpreter's and so cannot lie in that block, is taken from
 *     the C library's heap, which keeps what is freed (heap.py), where it would be mapped anew each time. That heap is
 *     the main thread's, the only one with room for so much: other threads' large records are mapped as ever.
 */
#ifndef OPENKCM_PAGES_H
#define OPENKCM_PAGES_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef __GLIBC__
#include <malloc.h>
#include <sys/syscall.h>
#endif

#define OKC_LARGE_PAGE ((size_t)2 << 20)
#if !defined(MADV_COLLAPSE) && defined(__linux__)
#define MADV_COLLAPSE 25    /* headers older than the kernel; an older kernel says EINVAL */
#endif
#define OKC_SPAN_LEAST ((size_t)64 << 10)
#define OKC_SPAN_GAP ((size_t)16 << 10)

/* Ask for large pages wherever a whole one lies between two addresses; `now`: with all that lies there already. */
static inline void okc_enlarge(uintptr_t low, uintptr_t high, int now)
{
    low = (low + OKC_LARGE_PAGE - 1) & ~(OKC_LARGE_PAGE - 1);
    high &= ~(OKC_LARGE_PAGE - 1);
    if (low >= high)
        return;
#ifdef MADV_HUGEPAGE
    (void)madvise((void *)low, high - low, MADV_HUGEPAGE);
#endif
#ifdef MADV_COLLAPSE
    if (now)
        (void)madvise((void *)low, high - low, MADV_COLLAPSE);
#else
    (void)now;
#endif
}

/* Memory for a result. */
static inline void *okc_take(size_t size)
{
    void *memory = NULL;
    if (size < 2 * OKC_LARGE_PAGE)
        return malloc(size ? size : 1);
    if (posix_memalign(&memory, OKC_LARGE_PAGE, size) != 0)
        return NULL;
    okc_enlarge((uintptr_t)memory, (uintptr_t)memory + size, 0);
    return memory;
}

/* ---- a span: large objects from the allocator that lie side by side, upwards or downwards ---------------------- */

typedef struct {
    uintptr_t low, high;
    const uint8_t *last;        /* within the object that was added last */
    int fresh;                  /* whether the first or the last of them has no memory behind it yet */
} okc_span;

static inline int okc_is_fresh(const uint8_t *place)
{
    unsigned char there = 1;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    return mincore((void *)((uintptr_t)place & ~(page - 1)), page, &there) == 0 && !(there & 1);
}

/* Memory that was used before is left as it is: the system takes longer to find that there is nothing to do. */
static inline void okc_span_end(okc_span *span)
{
    if (span->high - span->low >= OKC_LARGE_PAGE && (span->fresh || okc_is_fresh(span->last)))
        okc_enlarge(span->low, span->high, 1);
    span->low = span->high = 0;
}

static inline void okc_span_add(okc_span *span, const void *start, size_t size)
{
    uintptr_t low = (uintptr_t)start, high = low + size;
    if (size < OKC_SPAN_LEAST)
        return;
    if (span->high && low >= span->high && low - span->high <= OKC_SPAN_GAP) {
        span->high = high;
    } else if (span->low >= high && span->low - high <= OKC_SPAN_GAP) {
        span->low = low;
    } else {
        okc_span_end(span);
        span->low = low;
        span->high = high;
        span->fresh = okc_is_fresh((const uint8_t *)start + size / 2);
    }
    span->last = (const uint8_t *)start + size / 2;
}

/* ---- the block that waits --------------------------------------------------------------------------------------- */

/* Below, the C library keeps what is freed (heap.py), which is cheaper than to have the system told of it. */
#define OKC_SPARE_LEAST (((size_t)32 << 20) - ((size_t)64 << 10))
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

/* ---- a large object in the C library's heap ----------------------------------------------------------------------- */

/* Two of the largest records: one that is in use while the next is made. */
#define OKC_HEAP_KEPT ((size_t)130 << 20)
#define OKC_MMAPS_MOST 65536    /* what glibc begins with (mallopt(3), M_MMAP_MAX); it cannot be asked */

/* Whether the C library's settings are its own, as far as can be seen: who chose others wants them to stand. What a program set
 * with mallopt itself cannot be asked for. */
static inline int okc_heap_untouched(void)
{
    static const char *const names[] = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_",
                                        "MALLOC_TOP_PAD_"};
    const char *tunables = getenv("GLIBC_TUNABLES");
    for (size_t at = 0; at < sizeof names / sizeof *names; at++)
        if (getenv(names[at]) != NULL)
            return 0;
    return tunables == NULL || strstr(tunables, "glibc.malloc.") == NULL;
}

/* Have what is allocated next lie in the heap, if it is a record of 32 to 64 MiB; whether okc_heap_end is due. */
static inline int okc_heap_begin(size_t size)
{
#if defined(__GLIBC__) && !defined(Py_GIL_DISABLED)
    static int kept;            /* 0 until it was tried, then 1, or -1: not to be */
    if (size < OKC_SPARE_LEAST || size > OKC_SPARE_MOST + ((size_t)64 << 10) || kept < 0
        || (pid_t)syscall(SYS_gettid) != getpid())
        return 0;
    if (kept == 0)
        kept = okc_heap_untouched() && mallopt(M_TRIM_THRESHOLD, (int)OKC_HEAP_KEPT) == 1 ? 1 : -1;
    return kept > 0 && mallopt(M_MMAP_MAX, 0) == 1;
#else
    (void)size;
    return 0;
#endif
}

static inline void okc_heap_end(int begun)
{
#ifdef __GLIBC__
    if (begun)
        (void)mallopt(M_MMAP_MAX, OKC_MMAPS_MOST);
#else
    (void)begun;
#endif
}

#endif
