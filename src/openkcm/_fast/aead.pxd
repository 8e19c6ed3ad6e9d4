# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint8_t, uint32_t

from .batch cimport Batch, Item
from .gcm cimport Gcm

cdef enum:
    DONE = 1
    REFUSED = 0
    BROKEN = -1
    VERSION = 4                     # bytes of the service key version
    SMALL = 2048                    # records up to here are ciphered in one call through a scratch buffer

cdef class RecordCipher:
    cdef bytes head, aad
    cdef const uint8_t *head_data
    cdef const uint8_t *aad_data
    cdef int head_size, middle_size, aad_size, body
    cdef bint bound
    cdef Py_ssize_t overhead(self) noexcept nogil
    cdef const uint8_t *bind(self, const uint8_t *middle, const Item *item, uint8_t *joined, int *size) noexcept nogil
    cdef int seal(self, Gcm *cipher, const uint8_t *key, const uint8_t *nonce, uint32_t version,
                  const uint8_t *middle, const Item *item) noexcept nogil
    cdef int open(self, Gcm *cipher, const uint8_t *key, const Item *item, uint8_t *scratch) noexcept nogil
    cdef int check_size(self, Py_ssize_t size, Py_ssize_t index) except -1
    cdef int seal_loop(self, uint8_t *keys, uint32_t version, const uint8_t *middles, Batch batch) noexcept nogil
    cdef Py_ssize_t open_loop(self, uint8_t *keys, Batch batch, uint8_t *failed, bint outcomes) noexcept nogil
