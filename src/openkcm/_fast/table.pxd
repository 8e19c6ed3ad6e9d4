# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef struct Entry:
    const uint8_t *data
    Py_ssize_t size
    Py_ssize_t row

cdef class Table:
    cdef Entry *entries
    cdef uint64_t *slots
    cdef Py_ssize_t count, room
    cdef uint64_t[2] seed
    cdef list held
    cdef int grow(self) noexcept nogil
    cdef int add(self, const uint8_t *data, Py_ssize_t size, Py_ssize_t row) noexcept nogil
    cdef Py_ssize_t find(self, const uint8_t *data, Py_ssize_t size) noexcept nogil
