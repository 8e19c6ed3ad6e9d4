# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint8_t, uint32_t

cdef enum:
    BLOCK = 256                     # rows ordered by key at a time
    CHAINS = 512
    MOST_HELD = 16                  # handles on keys in one call

cdef struct Held:
    # Open keys by number; every handle but the last has ``stride`` of them.
    Py_ssize_t first, count, stride
    uint8_t *keys[MOST_HELD]
    const uint8_t *middles[MOST_HELD]

cdef struct Block:
    # Up to BLOCK rows that wait, and the key of each; then chained by key. A chain's end is BLOCK.
    int count
    Py_ssize_t[BLOCK] rows
    uint32_t[BLOCK] keys
    uint32_t[CHAINS] names
    int[CHAINS] heads
    int[BLOCK] nexts
    int[BLOCK] chains
    int chain_count

cdef class KeyRing:
    cdef list handles, middles
    cdef Py_ssize_t first, count, stride
    cdef object __weakref__
    cdef int enter(self, Held *held, int middle_size) except -1
    cdef int leave(self, Py_ssize_t entered) except -1

cdef void order_block(Block *block) noexcept nogil
