# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport int32_t, int64_t, uint8_t, uint64_t

from .aead cimport RecordCipher
from .cells cimport Cells, Piece

cdef extern from "column.h" nogil:
    void okc_prefetch(const void *place)
    uint64_t okc_hash(const uint8_t *data, size_t size, const uint64_t *seed)
    bint okc_is_utf8(const uint8_t *data, size_t size)
    int64_t okc_after_row(int64_t place, int64_t bytes, int64_t more)
    int64_t okc_lay32_32(const int32_t *offsets, int64_t count, int64_t size, int64_t more, int64_t place, int32_t *ends)
    int64_t okc_lay32_64(const int32_t *offsets, int64_t count, int64_t size, int64_t more, int64_t place, int64_t *ends)
    int64_t okc_lay64_32(const int64_t *offsets, int64_t count, int64_t size, int64_t more, int64_t place, int32_t *ends)
    int64_t okc_lay64_64(const int64_t *offsets, int64_t count, int64_t size, int64_t more, int64_t place, int64_t *ends)

cdef extern from "pages.h" nogil:
    void *okc_take(size_t size)
    void *okc_take_again(size_t size, size_t *room)
    void okc_give_again(void *block, size_t room)

cdef class Memory:
    cdef uint8_t *data
    cdef Py_ssize_t size
    cdef size_t room                # what lies there, where it is to be used again; or 0

cdef extern from "column.h" nogil:
    void okc_clear_bit(uint64_t *words, int64_t at)
    void okc_clear_bits(uint64_t *words, int64_t start, int64_t stop)
    int64_t okc_first_bit(const uint64_t *words, int64_t start, int64_t stop)

cdef class Places:
    cdef readonly Py_ssize_t count, total, nulls
    cdef Py_ssize_t most            # the total that the width was chosen for
    cdef Memory unfilled            # a bit for each row whose place is yet to be filled
    cdef readonly int width
    cdef readonly Memory offsets, validity
    cdef readonly object data
    cdef uint8_t *target

    cdef inline Py_ssize_t begin(self, Py_ssize_t at) noexcept nogil:
        if self.width == 4:
            return (<const int32_t *>self.offsets.data)[at]
        return (<const int64_t *>self.offsets.data)[at]

    cdef inline void put(self, Py_ssize_t at, Py_ssize_t place) noexcept nogil:
        if self.width == 4:
            (<int32_t *>self.offsets.data)[at] = <int32_t>place
        else:
            (<int64_t *>self.offsets.data)[at] = place

    cdef inline void filled(self, Py_ssize_t at) noexcept nogil:
        """A row is done with: by any thread."""
        okc_clear_bit(<uint64_t *>self.unfilled.data, at)

    cdef inline void filled_run(self, Py_ssize_t start, Py_ssize_t stop) noexcept nogil:
        okc_clear_bits(<uint64_t *>self.unfilled.data, start, stop)

    cdef bint lay(self, Cells cells, Py_ssize_t more) except -1
    cdef int check_total(self) except -1
    cdef Py_ssize_t lay_plain(self, const Piece *piece, Py_ssize_t start, Py_ssize_t place, Py_ssize_t more) noexcept nogil
    cdef Py_ssize_t lay_run(self, Cells cells, RecordCipher first, RecordCipher second, Py_ssize_t start,
                            Py_ssize_t *counts) noexcept nogil
    cdef int check_range(self, Py_ssize_t count, Py_ssize_t start, Py_ssize_t stop) except -1
    cdef Memory bits(self)
