# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""Many open keys at once, by number, and rows put in the order of their keys.

Invariant: the keys stay in their slots in secret memory; while a ring is entered none of them is wiped.
"""

from cpython.bytes cimport PyBytes_AS_STRING
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memset

from .secret cimport SecretKeys, invalid_error


cdef class KeyRing:
    """Open keys of the values of a table, from number ``first`` on, with the middle part of each."""

    def __init__(self, Py_ssize_t first, keys, middles):
        self.handles, self.middles = list(keys), list(middles)
        self.first = first
        self.stride = len(self.handles[0])
        self.count = 0
        if len(self.handles) != len(self.middles) or len(self.handles) > MOST_HELD:
            raise invalid_error()("a ring has some handles, and middle parts for each")
        for at, handle in enumerate(self.handles):
            if len(<SecretKeys?>handle) != self.stride and at != len(self.handles) - 1:
                raise invalid_error()("every handle of a ring but the last has as many keys")
            self.count += len(handle)
        if len(self.handles[-1]) > self.stride:
            raise invalid_error()("the last handle of a ring has no more keys than the others")

    cdef int enter(self, Held *held, int middle_size) except -1:
        cdef Py_ssize_t at, entered = 0
        held.first, held.count, held.stride = self.first, self.count, self.stride
        for at in range(len(self.handles)):
            if len(<bytes?>self.middles[at]) != (<SecretKeys>self.handles[at]).count * middle_size:
                raise invalid_error()("each key needs its own middle part")
        try:
            for at in range(len(self.handles)):
                held.keys[at] = (<SecretKeys>self.handles[at]).enter()
                held.middles[at] = <const uint8_t *>PyBytes_AS_STRING(self.middles[at])
                entered += 1
        finally:
            if entered < len(self.handles):
                self.leave(entered)
        return 0

    cdef int leave(self, Py_ssize_t entered) except -1:
        cdef Py_ssize_t at
        for at in range(entered):
            (<SecretKeys>self.handles[at]).leave()
        return 0

    def wipe(self):
        """Zero every key; waits for the uses in flight."""
        for handle in self.handles:
            handle.wipe()


cdef void order_block(Block *block) noexcept nogil:
    """Chain rows of one key together: setting a key costs nearly as much as a small record."""
    cdef int at, slot
    memset(block.heads, 255, sizeof(block.heads))
    block.chain_count = 0
    for at in range(block.count - 1, -1, -1):
        slot = <int>((block.keys[at] * <uint32_t>2654435761U) >> 23)
        while block.heads[slot] >= 0 and block.names[slot] != block.keys[at]:
            slot = (slot + 1) & (CHAINS - 1)
        if block.heads[slot] < 0:
            block.names[slot] = block.keys[at]
            block.chains[block.chain_count] = slot
            block.chain_count += 1
        block.nexts[at] = block.heads[slot]
        block.heads[slot] = at
