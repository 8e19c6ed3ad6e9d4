# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint8_t, uint32_t

from .arena cimport Slot

cdef extern from "native.h" nogil:
    int OKC_SCHEDULE_BYTES
    int okc_aes_instructions()
    int okc_aes256_expand(uint8_t *schedule)
    int okc_aes256_block(const uint8_t *schedule, const uint8_t *block, uint8_t *output)
    int okc_atomic_add(int *value, int amount)
    int okc_atomic_get(int *value)
    int okc_atomic_swap(int *value, int next)

cdef enum:
    KEY = 32
    NONCE = 12
    TAG = 16
    SCHEDULE = 48                   # where it lies in its slot: that is aligned to 64 bytes, as some engines want it
    XAES_NONCE = 24
    WRAPPED = 72
    KEY_ID = 16
    COMMITMENT = 32
    MOST_KEYS = 16384

cdef class Secret:
    cdef Slot slot
    cdef unsigned long born
    cdef int uses
    cdef int closing
    cdef int allocate(self, size_t size) except -1
    cdef uint8_t *enter(self) except NULL
    cdef void leave(self) noexcept nogil

cdef class SecretKeys(Secret):
    cdef Py_ssize_t count
    cdef const uint8_t *schedule    # of the only key, in the same slot; or NULL
    cdef uint8_t *enter_at(self, Py_ssize_t position) except NULL

cdef class WrappingKey(Secret):
    pass

cdef SecretKeys new_keys(Py_ssize_t count)
cdef WrappingKey new_wrapping_key()
cdef int expand(WrappingKey key, uint8_t *data) except -1

cdef object invalid_error()
cdef object limit_error()
cdef object decrypt_error()
cdef object memory_error()
cdef object internal_error()
cdef object configuration_error()

cdef int random_fill(uint8_t *target, size_t size, bint private) except -1

cdef int next_nonce(uint8_t *nonce) noexcept nogil
