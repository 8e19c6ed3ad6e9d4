# SPDX-License-Identifier: Apache-2.0
# Rows of a plain column that follow each other under one context: under the key that is set, or under a key each.
from libc.stdint cimport uint8_t, uint32_t

from .aead cimport RecordCipher
from .cells cimport Cells
from .gcm cimport Gcm
from .places cimport Places
from .run cimport Run

cdef Py_ssize_t seal_plain(RecordCipher cipher, Gcm *context, Run *run, Places places, Py_ssize_t start,
                           Py_ssize_t stop, uint32_t version, const uint8_t *middle) noexcept nogil
cdef Py_ssize_t open_plain(RecordCipher cipher, Gcm *context, Run *run, Places places, Py_ssize_t start,
                           Py_ssize_t stop, const uint8_t *before, uint8_t *scratch) noexcept nogil

cdef Py_ssize_t seal_each(RecordCipher cipher, Gcm *context, Run *run, Places places, Py_ssize_t start, Py_ssize_t stop,
                          uint32_t version, const uint8_t *keys, const uint8_t *middles,
                          Py_ssize_t count) noexcept nogil
cdef Py_ssize_t gather_plain(RecordCipher cipher, Cells cells, Py_ssize_t piece, Py_ssize_t start, Py_ssize_t stop,
                             const uint8_t **last, uint8_t *target, Py_ssize_t most, Py_ssize_t *count) noexcept nogil
cdef Py_ssize_t open_each(RecordCipher cipher, Gcm *context, Run *run, Places places, Py_ssize_t start, Py_ssize_t stop,
                          const uint8_t **before, const uint8_t *keys, Py_ssize_t count, Py_ssize_t *number,
                          uint8_t *scratch) noexcept nogil
