# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from .aead cimport RecordCipher
from .cells cimport Piece

cdef struct Entry:
    const uint8_t *data
    Py_ssize_t size
    Py_ssize_t row

cdef enum:
    SOUGHT = 32

cdef struct Sought:
    # Values that are looked for together, each with the row that it is of.
    int count
    Py_ssize_t[SOUGHT] rows
    const uint8_t *data[SOUGHT]
    Py_ssize_t[SOUGHT] sizes
    uint64_t[SOUGHT] hashes
    Py_ssize_t[SOUGHT] numbers

cdef inline void seek(Sought *sought, Py_ssize_t row, const uint8_t *data, Py_ssize_t size) noexcept nogil:
    """Look for one more; there must be room."""
    sought.rows[sought.count] = row
    sought.data[sought.count] = data
    sought.sizes[sought.count] = size
    sought.count += 1


cdef Py_ssize_t seek_ids(Sought *sought, RecordCipher cipher, const Piece *pieces, const Py_ssize_t *firsts, Py_ssize_t *piece,
                         Py_ssize_t at, Py_ssize_t stop) noexcept nogil

cdef class Table:
    cdef Entry *entries
    cdef uint64_t *slots
    cdef Py_ssize_t count, room
    cdef uint64_t[2] seed
    cdef list held
    cdef int grow(self) noexcept nogil
    cdef int add_all(self, Sought *sought) noexcept nogil
    cdef void find_all(self, Sought *sought) noexcept nogil
    cdef void prepare(self, Sought *sought) noexcept nogil
    cdef Py_ssize_t find(self, const uint8_t *data, Py_ssize_t size, uint64_t hashed) noexcept nogil
