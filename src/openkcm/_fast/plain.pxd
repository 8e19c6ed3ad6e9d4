# SPDX-License-Identifier: Apache-2.0
# Rows of a plain column that follow each other under one key and one context.
from libc.stdint cimport uint8_t, uint32_t

from .aead cimport RecordCipher
from .gcm cimport Gcm
from .places cimport Places
from .run cimport Run

cdef Py_ssize_t seal_plain(RecordCipher cipher, Gcm *context, Run *run, Places places, Py_ssize_t start,
                           Py_ssize_t stop, uint32_t version, const uint8_t *middle) noexcept nogil
cdef Py_ssize_t open_plain(RecordCipher cipher, Gcm *context, Run *run, Places places, Py_ssize_t start,
                           Py_ssize_t stop, const uint8_t *before, uint8_t *scratch) noexcept nogil
