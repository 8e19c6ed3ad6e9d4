# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint8_t, uint32_t

cdef enum:
    ALONE = -1                      # the place of a record that is no part of a batch

cdef extern from "pages.h" nogil:
    ctypedef struct okc_span:
        pass
    void okc_enlarge(size_t low, size_t high, int now)
    int okc_heap_begin(size_t size)
    void okc_heap_end(int begun)
    void okc_span_add(okc_span *span, const void *start, size_t size)
    void okc_span_end(okc_span *span)

cdef struct Item:
    const uint8_t *data
    Py_ssize_t size
    const uint8_t *context
    int context_size
    uint32_t key
    uint8_t *output

cdef int pin(object thing, const uint8_t **data, Py_ssize_t *size, list held, Py_ssize_t index) except -1
cdef int bound_size(bytes aad) except -1
cdef object place_output(Item *item, Py_ssize_t size, out, list held)

cdef class Batch:
    cdef Item *items
    cdef uint32_t *order            # NULL: as they are
    cdef Py_ssize_t count
    cdef Py_ssize_t total
    cdef bint brief                 # hardly any key serves two records
    cdef list held
    cdef list inputs
    cdef object contexts
    cdef object index
    cdef int pin_inputs(self) except -1
    cdef int pin_contexts(self, contexts) except -1
    cdef int pin_keys(self, index, Py_ssize_t keys) except -1
    cdef int sort_by_key(self, Py_ssize_t keys) except -1
    cdef bint parallel(self) noexcept
    cdef list allocate(self, Py_ssize_t more)
    cdef void enlarge(self, Py_ssize_t more) noexcept nogil
