# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""Sets of data key ids, asked about ten thousand at a time.

Invariant: a set never changes once it is made, so that any number of threads may read it. Its hash has a random seed:
who chooses ids cannot choose where they fall.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy

from .gcm cimport random_public
from .places cimport okc_hash
from .secret cimport internal_error, invalid_error

cdef enum:
    ID = 16

cdef Py_ssize_t MOST = 2**30


cdef class IdSet:
    """A set of 16-byte ids, made from packed ones."""
    cdef bytes packed
    cdef const uint8_t *data        # what lies in packed
    cdef uint32_t *slots            # the number of an id from 1 on, or 0
    cdef uint64_t mask
    cdef Py_ssize_t count
    cdef uint64_t[2] seed

    def __init__(self, bytes ids not None):
        cdef Py_ssize_t wanted = number_of(ids)
        cdef uint64_t room = 4
        while room < <uint64_t>wanted * 2:
            room *= 2
        if self.slots != NULL:
            raise internal_error()("a set of ids is made once")
        self.slots = <uint32_t *>calloc(<size_t>room, sizeof(uint32_t))
        if self.slots == NULL:
            raise MemoryError()
        if random_public(<uint8_t *>self.seed, sizeof(self.seed)) != 1:
            raise internal_error()("the random generator failed")
        self.packed, self.mask = ids, room - 1
        self.data = <const uint8_t *>PyBytes_AS_STRING(ids)
        with nogil:
            self.fill(wanted)

    def __dealloc__(self):
        free(self.slots)

    def __len__(self):
        return self.count

    @property
    def ids(self):
        """The packed ids it was made from."""
        return self.packed

    def positions(self, bytes ids not None):
        """The positions, among packed ids, of those that are in the set."""
        cdef const uint8_t *data = <const uint8_t *>PyBytes_AS_STRING(ids)
        cdef Py_ssize_t at, count = number_of(ids)
        cdef list found = []
        if self.count:
            for at in range(count):
                if self.slots[self.slot(data + at * ID)]:
                    found.append(at)
        return found

    def missing(self, bytes ids not None):
        """Those of packed ids that are not in the set, packed."""
        cdef const uint8_t *data = <const uint8_t *>PyBytes_AS_STRING(ids)
        cdef Py_ssize_t at, count = number_of(ids), kept = 0
        cdef bytes rest = PyBytes_FromStringAndSize(NULL, len(ids))
        cdef uint8_t *target = <uint8_t *>PyBytes_AS_STRING(rest)
        for at in range(count):
            if not self.slots[self.slot(data + at * ID)]:
                memcpy(target + kept * ID, data + at * ID, ID)
                kept += 1
        return rest[:kept * ID]

    cdef void fill(self, Py_ssize_t wanted) noexcept nogil:
        cdef Py_ssize_t at
        cdef uint64_t slot
        for at in range(wanted):
            slot = self.slot(self.data + at * ID)
            if not self.slots[slot]:
                self.slots[slot] = <uint32_t>(at + 1)
                self.count += 1

    cdef inline uint64_t slot(self, const uint8_t *key_id) noexcept nogil:
        """Where an id lies, or would lie."""
        cdef uint64_t at = okc_hash(key_id, ID, self.seed) & self.mask
        while self.slots[at] and memcmp(self.data + <Py_ssize_t>(self.slots[at] - 1) * ID, key_id, ID):
            at = (at + 1) & self.mask
        return at


cdef Py_ssize_t number_of(bytes ids) except -1:
    if len(ids) % ID or len(ids) > MOST * ID:
        raise invalid_error()("data key ids have 16 bytes each")
    return len(ids) // ID
