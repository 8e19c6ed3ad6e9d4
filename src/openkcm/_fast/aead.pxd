# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint8_t, uint32_t

cdef enum:
    DONE = 1
    REFUSED = 0
    BROKEN = -1
    ALONE = -1

cdef struct Item:
    const uint8_t *data
    Py_ssize_t size
    const uint8_t *context
    int context_size
    uint32_t key
    uint8_t *output

cdef int pin(object thing, const uint8_t **data, Py_ssize_t *size, list held, Py_ssize_t index) except -1
