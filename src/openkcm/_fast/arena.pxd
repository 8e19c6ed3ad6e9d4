# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint8_t

cdef enum:
    OK = 0
    NO_MEMORY = 1

cdef struct Region:
    Region *next
    uint8_t *mapping
    size_t mapped
    uint8_t *start
    size_t granules
    size_t available
    size_t hint
    uint8_t *taken

cdef struct Slot:
    Region *region
    uint8_t *data
    size_t size

cdef int slot_take(Slot *slot, size_t size) noexcept nogil
cdef void slot_give(Slot *slot) noexcept nogil
cdef unsigned long fork_count() noexcept nogil
cdef void arena_lock() noexcept nogil
cdef void arena_unlock() noexcept nogil
cdef str exhausted()
