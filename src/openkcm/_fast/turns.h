/* SPDX-License-Identifier: Apache-2.0
 *
 * Turns in the interpreter for the threads of one call. Each is in it for a few microseconds a run of rows; one that
 * slept for its lock meanwhile would be woken by the kernel, which takes several times as long. So it spins before.
 */
#ifndef OPENKCM_TURNS_H
#define OPENKCM_TURNS_H

#include <stdint.h>
#include <time.h>

#define OKC_SPIN_NANOSECONDS 50000

typedef struct {
    uintptr_t holder;               /* who is in the interpreter, or 0 */
} okc_turns;

/* Those that this thread takes part in; its address is the thread's name. */
static __thread okc_turns *okc_mine;

static inline void okc_relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static inline int64_t okc_nanoseconds(void)
{
    struct timespec now = {0, 0};
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Before the interpreter's lock is let go of. */
static inline void okc_turn_end(void)
{
    uintptr_t me = (uintptr_t)&okc_mine;
    if (okc_mine != NULL)
        (void)__atomic_compare_exchange_n(&okc_mine->holder, &me, 0, 0, __ATOMIC_RELEASE, __ATOMIC_RELAXED);
}

/* Before it is asked for: spin while another of the call has it. Who has it for long waits for something else, and then
 * the turn is taken from it: the lock is what decides. */
static inline void okc_turn_begin(void)
{
    const uintptr_t me = (uintptr_t)&okc_mine;
    okc_turns *turns = okc_mine;
    int64_t end = 0;
    if (turns == NULL)
        return;
    for (unsigned tries = 0;; tries++) {
        uintptr_t holder = __atomic_load_n(&turns->holder, __ATOMIC_RELAXED);
        if (holder == me || (holder == 0 && __atomic_compare_exchange_n(&turns->holder, &holder, me, 0, __ATOMIC_ACQUIRE,
                                                                        __ATOMIC_RELAXED)))
            return;
        if (tries % 16 == 0) {
            const int64_t now = okc_nanoseconds();
            if (end == 0)
                end = now + OKC_SPIN_NANOSECONDS;
            else if (now >= end)
                break;
        }
        okc_relax();
    }
    __atomic_store_n(&turns->holder, me, __ATOMIC_RELAXED);
}

/* Without the interpreter's lock there are no turns to take. */
static inline void okc_turns_join(okc_turns *turns)
{
#ifdef Py_GIL_DISABLED
    (void)turns;
#else
    okc_mine = turns;
#endif
}

#endif
